"""What the tab key offers, and that bash takes it."""

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import made
import pytest

from ftexp import __main__ as verbs
from ftexp import completion, config, overrides, runs
from ftexp.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("words", "wanted"),
    [(["p"], ["plan", "power"]), (["-q", "po"], ["power"]), (["sweep", "s"], ["show", "stop"]), (["show", ""], ["data"]),
     (["run", "lora="], ["lora=default", "lora=dora", "lora=fixed_alpha", "lora=loftq", "lora=loraplus", "lora=none", "lora=pissa", "lora=rslora"]),
     (["run", "-m", "lora=dora,rs"], ["lora=dora,rslora"]), (["run", "lora.var"], ["lora.variant="]),
     (["run", "lo"], ["lora.", "lora="]), (["plan", "quant.dou"], ["quant.double="]),
     (["plan", "quant.double=t"], ["quant.double=true"]), (["run", "quant.kind=n"], ["quant.kind=nf4", "quant.kind=none"]),
     (["run", "sweep.samp"], ["sweep.sampler=", "sweep.sampler_args="]), (["run", "no.such=x"], []),
     (["power", "sd_r"], ["sd_rows="]), (["report", "--format", ""], ["csv", "json", "md"]),
     (["confirm", "s", "--by", "valid/chr"], ["valid/chrf"]), (["confirm", "s", "--by", "cost/"], []),
     (["report", "--by", "valid/ch"], ["valid/chosen_likelier", "valid/chosen_loss", "valid/chrf"]),
     (["sweep", "export", "--format", ""], ["csv", "json"]), (["--completion", "z"], ["zsh"]), (["unknown", ""], [])],
)  # fmt: skip
def test_words_and_what_they_can_become(words, wanted):
    assert list(dict.fromkeys(completion.candidates(words))) == wanted


def test_names_of_sweeps_and_runs_are_offered(tmp_path, monkeypatch):
    made.sweep(tmp_path / "outputs/sweeps/rank-8")
    made.sweep(tmp_path / "x")
    shutil.copytree(tmp_path / "x/0", tmp_path / "outputs/runs/alone")
    monkeypatch.chdir(tmp_path)
    offered = completion.candidates
    assert offered(["sweep", "resume", "r"]) == offered(["confirm", ""]) == ["rank-8"]
    assert offered(["report", ""]) == ["outputs/runs/alone", "outputs/sweeps/rank-8"]
    trials = [f"outputs/sweeps/rank-8/{n}" for n in range(3)]
    assert offered(["diff", "outputs/runs/alone", ""]) == ["outputs/runs/alone", *trials]
    assert offered(["power", "--from", ""]) == ["outputs/sweeps/rank-8"]
    runs.keep(tmp_path / "x", "mine")
    assert offered(["sweep", "show", ""]) == ["mine", "rank-8"]
    runs.LIST.write_text("{")
    assert offered(["sweep", "show", ""]) == ["rank-8"]


def test_all_overrides_can_be_reached_a_level_at_a_time():
    """Whoever takes each thing that is offered comes to every key and every option of every group."""
    found, left = set(), [""]
    while left:
        for offer in set(completion.candidates(["run", left.pop()])):
            found.add(offer.rstrip("="))
            left += [offer] if offer.endswith(".") else []
    assert set(config.keys()) - set(overrides.groups()) <= found
    assert set(overrides.groups()) <= found


@pytest.mark.parametrize("verb", [v for v in completion.OPTIONS if v != "run"])
def test_options_are_those_of_the_verbs_help(verb, monkeypatch, capsys):
    from importlib import import_module

    name, *more = verb.split()
    monkeypatch.setattr(sys, "argv", [f"ftexp {name}", *more, "--help"])
    with contextlib.suppress(SystemExit):
        import_module(verbs.module(name)).main()
    out, err = capsys.readouterr()
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", out + err))
    hydras = {"--multirun"} if name in ("plan", "doctor") else set()
    told -= {"--outfile"}  # of llama.cpp's converter, in the help of export
    assert told | {"--help"} | hydras == set(completion.OPTIONS[verb])
    for (of, option), words in completion.CHOICES.items():
        if of == verb:
            shown = re.search(rf"{option} \{{([^}}]+)\}}", out + err)
            assert shown is not None and sorted(shown[1].split(",")) == sorted(words)


def test_verbs_are_those_of_the_command():
    assert {verb for verb in completion.OPTIONS if " " not in verb} == set(verbs.VERBS)


def test_unknown_shell_is_named():
    with pytest.raises(ConfigError, match="--completion must be one of bash, zsh, fish, got 'csh'"):
        completion.script("csh")


@pytest.fixture
def typed(tmp_path):
    """A function that types a line in bash, presses tab, and gives what is offered for the word."""
    command = tmp_path / "bin" / "ftexp"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m ftexp "$@"\n')
    command.chmod(0o755)
    (tmp_path / "c.sh").write_text(completion.SCRIPTS["bash"])

    def tab(line: str, breaks: str = " \t\n\"'><=;|&(:") -> list[str]:
        code = 'source c.sh; COMP_LINE="$1" COMP_POINT=${#1} COMP_WORDBREAKS="$2"; _ftexp; printf "%s\\n" "${COMPREPLY[@]}"'
        env = {"PATH": f"{command.parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-c", code, "x", line, breaks], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.stderr == ""
        return done.stdout.split()

    return tab


def test_bash_takes_it(typed):
    assert typed("ftexp rep") == ["report", "reproduce"]
    assert typed("ftexp run lora=d") == ["default", "dora"]  # bash replaces what stands behind the "="
    assert typed("ftexp run lora=d", breaks=" ") == ["lora=default", "lora=dora"]
    assert typed("ftexp sweep ") == ["export", "ls", "resume", "show", "stop"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_theirs(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"install {shell}, whose own completion is asked")
    (tmp_path / "c").write_text(completion.SCRIPTS[shell])
    assert subprocess.run([shell, "-n", str(tmp_path / "c")]).returncode == 0


def test_the_command_prints_the_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ftexp", "--completion", "bash"])
    assert verbs.main() == 0
    assert capsys.readouterr().out == completion.SCRIPTS["bash"]
    monkeypatch.setattr(sys, "argv", ["ftexp", "--completion"])
    assert verbs.main() == 2


def test_completion_loads_nothing_heavy():
    from test_layers import HEAVY

    code = "import sys; from ftexp import completion; completion.candidates(['run', 'lora.']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)
