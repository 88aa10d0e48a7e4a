"""Text of data in a page."""

import html

from hypothesis import given
from hypothesis import strategies as st

from ftexp.page.text import escape


@given(st.text(st.characters(categories=None)))
def test_no_text_is_markup_or_turns_its_neighbours(text):
    told = escape(text)
    assert not set(told) & set("<>\"'")
    assert not set(told) & {chr(n) for n in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
    told.encode()  # raises for half a surrogate


@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs"))))
def test_plain_text_comes_back(text):
    assert html.unescape(escape(text)) == text


def test_lines_stay_and_control_signs_are_written_out():
    assert escape("a\n\tb\0\u202ec\ud800") == "a\n\tb\\u0000\\u202ec\\ud800"
