"""Colours that can be read, and a script that a browser accepts."""

import base64
import hashlib

import pytest

from ftexp.page import style


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["paper", "card"])
@pytest.mark.parametrize("name", style.TEXT)
def test_text_stands_out(name, ground, which):
    assert style.contrast(style.COLOURS[name][which], style.COLOURS[ground][which]) >= 4.5


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_lines_stand_out(which):
    assert style.contrast(style.COLOURS["faint"][which], style.COLOURS["paper"][which]) >= 3


def test_contrast_of_a_known_pair():
    assert style.contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)  # as WebAIM's checker gives it


def test_policy_names_the_script_and_nothing_from_elsewhere():
    digest = base64.b64encode(hashlib.sha256(style.SCRIPT.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in style.POLICY and "default-src 'none'" in style.POLICY
    for text in (style.SHEET, style.SCRIPT):
        assert "url(" not in text and "http" not in text and "@import" not in text and "@font-face" not in text


def test_dark_and_print_are_told():
    assert "prefers-color-scheme:dark" in style.SHEET and "@media print" in style.SHEET
