"""What a terminal is shown is what was written: prompts of Mistral and lists are markup to rich."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from ftexp import diff, progress, verb
from ftexp.progress import Sheet
from ftexp.sweep import frozen, screen, space
from ftexp.sweep.options import Options

PROMPT = "data.prompt=[INST] {prompt} [/INST] lora.targets=[q_proj] :smile:"


def printed(table, width=200):
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(table)
    return out.getvalue()


def test_brackets_stay_in_titles_heads_and_cells():
    made = Sheet(PROMPT)
    made.column(PROMPT)
    made.row(PROMPT)
    assert printed(made).count(PROMPT) == 3


def test_rows_stay_apart_where_the_terminal_is_narrow():
    made = Sheet()
    made.column("overrides")
    made.column("valid/loss", right=True)
    for n in (1, 2):
        made.row(f"lora=default lora.targets=q_proj trainer.lr={n}e-4", "5.3791")
    told = printed(made, 36)
    cells = [line.split("│")[1:3] for line in told.splitlines() if line.startswith("│")]
    assert "trainer.lr=1e-4" in told and "trainer.lr=2e-4" in told
    assert [c[1].strip() for c in cells if c[1].strip()] == ["5.3791", "5.3791"]


def test_a_sweep_over_prompts_is_shown(tmp_path):
    import optuna

    made = frozen.Frozen(tmp_path, "s", space.parse(["data.prompt='[INST] {prompt} [/INST]','Q: {prompt}'"]), Options(),
                         ["valid/loss"], None, "", {})  # fmt: skip
    record = optuna.create_study()
    record.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING, user_attrs={"ftexp:ticket": 0},
            system_attrs={"fixed_params": {"data.prompt": "[INST] {prompt} [/INST]"}},
        )
    )  # fmt: skip
    assert "[INST] {prompt} [/INST]" in printed(screen.table(made, record))


def test_a_difference_in_prompts_is_shown(capsys):
    told = diff.Difference({"data.prompt": (PROMPT, "x")}, {}, {}, True)
    diff.show(told, ["[/a]", "b"])
    out = capsys.readouterr().out
    assert "[INST] {prompt} [/INST]" in out and "[/a]" in out


@pytest.mark.parametrize("show", [progress._bar])
def test_a_bar_takes_any_label(show, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, width=120))
    with show("[/INST] loss", 2) as advance:
        advance(1, "[/x]")
    assert "[/INST] loss" in out.getvalue()


def test_a_terminal_without_a_letter_ends_no_work(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert verb.ended(lambda: print("caf\u00e9 \u2026") or 0) == 0
    assert raw.getvalue() == b"caf\\xe9 \\u2026\n"


def test_export_is_json_on_any_terminal(monkeypatch):
    import json

    from ftexp import report

    monkeypatch.setattr(report, "read", lambda *_: None)
    monkeypatch.setattr(report, "gather", lambda *_: None)
    monkeypatch.setattr(report, "data", lambda _: {"label": "caf\u00e9"})
    text = report.export(SimpleNamespace(), "json")
    assert text.isascii() and json.loads(text) == {"label": "caf\u00e9"}
