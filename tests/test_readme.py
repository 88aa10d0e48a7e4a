"""Every command of the README and the pages of `analysis/` is run: `make` targets exist, the others on a tiny model."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

sys.path.insert(0, str(Path(__file__).parent / "cluster"))
import servers

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "analysis").glob("*.md")))}


def commands(text):
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split("   #")[0].split()) for line in lines if line.strip()]


COMMANDS = list(dict.fromkeys(command for text in PAGES.values() for command in commands(text)))
RUNS = [c for c in COMMANDS if c.startswith("python -m ftexp.run")]
MAKES = [c for c in COMMANDS if c.startswith("make ")]
FOREIGN = ("pip install 'ftexp[", "ray start ", "export PGPASSWORD=")
"""Beginnings of commands that are not ours and are not run."""
OTHERS = [c for c in COMMANDS if c not in (*RUNS, *MAKES) and not c.startswith(FOREIGN)]


def test_readme_has_commands_and_all_are_run_here():
    assert len(RUNS) >= 5
    assert {c.split()[0:3][-1] for c in OTHERS} <= {
        "ftexp.doctor",
        "ftexp.diff",
        "ftexp.export",
        "ftexp.generate",
        "ftexp.reproduce",
        "ftexp.report",
        "ftexp.plan",
        "ftexp.power",
        "ftexp.show",
        "ftexp.sweep",
        "ftexp.confirm",
        "bash",  # of ftexp --completion
    }, OTHERS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pip install 'ftexp[")])
def test_extras_of_the_pages_are_there(command):
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(command.split("[")[1].split("]")[0].split(",")) <= known.keys()


@pytest.mark.parametrize("command", MAKES)
def test_make_target_exists(command):
    done = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a person's own model and rows in it."""
    from ftexp import model
    from ftexp.config import Kind, Model, Quant

    here = tmp_path_factory.mktemp("readme")
    base = model.load(Model(kind=Kind.tiny), Quant())
    base.model.save_pretrained(here / "my-model")
    base.tokenizer.save_pretrained(here / "my-model")
    rows = [
        {"prompt": f"what is {n}", "completion": f"{n} it is", "topic": f"t{n}", "quote": f"q{n}"} for n in range(200)
    ]
    (here / "my.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    for name, text in re.findall(
        r"```(?:yaml|python)\n# (\S+)\n(.*?)```", TEXT, re.DOTALL
    ):  # files that the page writes
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    return here


@pytest.mark.parametrize("command", RUNS)
def test_run_works(command, cli, folder, monkeypatch):
    """As written, but for a small model and few steps; what names the person's own model and rows stays."""
    monkeypatch.chdir(folder)
    if "trainer.reward=judge" in command:
        [before] = [c for c in RUNS if "name=judge" in c]
        assert run_small(before, cli)[0] == 0
    code, out, err = run_small(command, cli)
    assert code == 0, err
    assert out


def run_small(command, cli):
    argv = shlex.split(command)[3:]
    small = [o for o in TINY if not any(a.split("=")[0] == o.split("=")[0] for a in argv)]
    if any(a.startswith(("data=jsonl", "--config-dir")) for a in argv):
        small = [o for o in small if not o.startswith("data.")] + ["data.valid=12"]
    if {"trainer=classify", "trainer=reward"} & set(argv):  # which write nothing
        small = [o for o in small if not o.startswith("eval.")]
    if "quant=nf4" in argv:  # the tiny model has no stored weights
        small = [o for o in small if o != "model=tiny"] + ["model=hub", "model.path=./my-model"]
    if any(a.startswith("experiment=") for a in argv):
        small += ["quant=none"]  # the tiny model has no stored weights
    if {"--cfg", "--help"} & set(argv):
        small = []
    if "sweep.engine=slurm" in argv:
        argv = [a for a in argv if not a.startswith("sweep.engine_args.gpus")]  # which are not here
        small.append("sweep.engine_args.cluster=local")  # jobs are processes here
    if "sweep.engine=ray" in argv:
        pytest.importorskip("ray", reason="needs ray; `make test-cluster` installs it and runs a sweep on two nodes")
        with servers.ray_nodes(1) as address:
            return cli(*argv, *small, "sweep.workers=1", f"sweep.engine_args.address={address}")
    if any(a.startswith("sweep.storage=postgresql") for a in argv):
        with servers.postgres() as url:
            return cli(*(a for a in argv if not a.startswith("sweep.storage=")), f"sweep.storage={url}", *small)
    return cli(*argv, *small)


@pytest.mark.parametrize("command", OTHERS)
def test_other_verbs_work_after_their_sweep(command, cli, folder, monkeypatch, capsys):
    from importlib import import_module

    from ftexp import __main__ as verbs

    monkeypatch.chdir(folder)
    if not list(folder.glob("outputs/sweeps/lora.r-8-16-64/2/adapter")):
        code, _, err = cli("lora.r=8,16,64", "-m", *TINY, "track=none", "name=lora.r-8-16-64")
        assert code == 0, err
    for name in ("mine", "shared"):
        if f" {name}" in command or f"/{name}" in command:
            launch = next(c for c in RUNS if f"name={name}" in c)
            assert run_small(launch, cli)[0] == 0
    capsys.readouterr()
    if command.startswith("ftexp "):
        monkeypatch.setattr(sys, "argv", shlex.split(command.split(">")[0]))
        assert verbs.main() == 0
        assert capsys.readouterr().out
        return
    verb, *argv = shlex.split(command)[2:]
    monkeypatch.setattr(sys, "argv", [verb, *argv, *(["model=tiny"] if verb in ("ftexp.show", "ftexp.doctor") else [])])
    assert import_module(verbs.module(verb.removeprefix("ftexp."))).main() == 0
    assert capsys.readouterr().out


def test_exit_codes_of_the_readme_are_those_of_the_code():
    from ftexp import errors

    told = {int(code): names for code, names in re.findall(r"^\| (\d+) \| (.*?) \|$", TEXT, re.MULTILINE)}
    raised = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.FtexpError)}
    assert raised - {1} <= set(told)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pictures_and_files_a_page_shows_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (page.parent / target).exists(), target


def test_every_score_has_a_line_in_the_page_of_numbers():
    from ftexp.metrics import METRICS

    page = PAGES[ROOT / "analysis" / "NUMBERS.md"]
    for name in METRICS:
        short = name.split("/")[1]
        average = short.rpartition("_")[2]  # f1_macro and its like are told by their average
        assert any(f"`{word}`" in page for word in (name, short, average)), name
