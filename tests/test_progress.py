import io

import pytest
from rich.console import Console

from ftexp import progress as module


@pytest.fixture
def terminal(monkeypatch):
    def make(interactive: bool) -> io.StringIO:
        out = io.StringIO()
        monkeypatch.setattr(module, "console", Console(file=out, force_terminal=interactive, width=100))
        return out

    return make


def test_lines_without_terminal(terminal, monkeypatch):
    monkeypatch.setattr(module, "QUIET_SECONDS", 0)
    out = terminal(False)
    with module.progress("training", 3) as advance:
        for _ in range(3):
            advance(1, "loss 0.5")
    assert out.getvalue().splitlines() == ["training 1/3 loss 0.5", "training 2/3 loss 0.5"]


def test_quiet_when_fast(terminal):
    out = terminal(False)
    with module.progress("training", 3) as advance:
        advance(3)
    assert out.getvalue() == ""


def test_bar_on_terminal(terminal):
    out = terminal(True)
    with module.progress("training", 3) as advance:
        advance(2, "loss 0.5")
        advance(1)
    assert "training" in out.getvalue()
    assert "3/3" in out.getvalue()


@pytest.mark.parametrize(("value", "told"), [("", True), ("0", True), ("1", False), ("yes", False)])
@pytest.mark.parametrize("interactive", [True, False])
def test_quiet_leaves_warnings_alone(value, told, interactive, terminal, monkeypatch):
    monkeypatch.setenv(module.QUIET, value)
    monkeypatch.setattr(module, "QUIET_SECONDS", 0)
    out = terminal(interactive)
    with module.progress("training", 3) as advance:
        advance(2, "loss 0.5")
        advance(1)
    module.say("a note")
    module.say("rows left out", always=True)
    module.warn("no server")
    text = out.getvalue()
    assert ("training" in text) is ("a note" in text) is told
    assert "rows left out" in text and "warning: no server" in text
