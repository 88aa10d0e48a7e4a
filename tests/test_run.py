"""The command line as a person meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, UNWRITTEN

from ftexp.files import read_json

REFUSED = [  # command line, exit code, what the one line must say
    (["trainer.bf16=true"], 2, "unknown key trainer.bf16 in trainer.bf16=true; ftexp calls it model.dtype"),
    (["lora.rank=8"], 2, "unknown key lora.rank in lora.rank=8; ftexp calls it lora.r"),
    (["+lora.dropuot=0.1"], 2, "unknown key lora.dropuot in +lora.dropuot=0.1; did you mean lora.dropout?"),
    (["lora.r=-1"], 2, "lora.r must be a rank between 1 and 4096, got -1"),
    (["trainer.lr=nan"], 2, "trainer.lr must be a finite number, got nan"),
    (["model=nope"], 2, "smollm2_360m, tiny, got 'nope'"),
    (["lora.alpha=0"], 2, "lora.alpha must be above 0 and at most 8192 (0 switches the adapter off), got 0.0"),
    (["+model._target_=os.system"], 2, "unknown key model._target_ in +model._target_=os.system"),
    (["lora.r=8,0", "-m"], 2, "lora.r must be a rank between 1 and 4096, got 0 (trial 1: lora.r=0 name=lora.r-8-0)"),
    (
        ["lora.r=abc"],
        2,
        "Error merging override lora.r=abc: Value 'abc' of type 'str' could not be converted to Integer",
    ),
    (
        ["sweep.sampler=tpee", "lora.r=8,16"],
        2,
        "Error merging override sweep.sampler=tpee: Invalid value 'tpee', expected one of [grid",
    ),
    (["lora.rank=8,16", "-m"], 2, "unknown key lora.rank"),
    (["lora.r"], 2, "not a Hydra override"),
    (["trainer.lr=interval(0.1,0.2)", "-m"], 2, "a grid needs single values"),
    (
        ["sweep=rank,seeds", "-m"],
        2,
        "sweep=rank,seeds: a launch takes one sweep; start each of them by its own command",
    ),
    (["sweep=rank", "lora.r=0,1"], 2, "lora.r must be a rank between 1 and 4096, got 0 (trial 0"),
    (["lora.r=8,16"], 2, "lora.r"),  # a sweep without -m
    (["model=null"], 2, "smollm2_360m, tiny, got None"),
    (["hydra/sweeper=basic", "-m"], 2, "ftexp brings its own sweeper"),
    (["track.uri="], 2, "track.uri must be an address"),
    ([*TINY, "data.prompt={foo}"], 3, "yoda:0: column 'foo' is missing"),
    ([*TINY, "trainer.extra.nope=1"], 2, "trainer.extra is refused by SFTConfig"),
    (
        [*TINY, "trainer.extra.num_train_epochs=50"],
        2,
        "trainer.extra.num_train_epochs must not be set, it has a key of its own",
    ),
    ([*TINY, "trainer.extra.adam_beta1=high"], 2, "trainer.extra.adam_beta1 must be a number, got 'high'"),
    ([*TINY, "lora.extra.fan_in_fan_out=1"], 2, "lora.extra.fan_in_fan_out must be true or false, got 1"),
    (
        [*TINY, "trainer.optimizer=foo"],
        2,
        "trainer.optimizer must be an optimizer of transformers, got 'foo': adamw_torch",
    ),
    (
        [*TINY, "trainer.optimizer=adamw"],
        2,
        "trainer.optimizer must be an optimizer of transformers, got 'adamw'; did you mean adamw_torch or adamw_",
    ),
    ([*TINY, "lora.extra.nope=1,2", "-m"], 2, "lora.extra is refused by LoraConfig"),
    ([*TINY, "data.max_length=16"], 3, "a row must be at most data.max_length=16 tokens"),
    (
        [*TINY, "data.prompt=" + "long " * 200 + "{prompt}", "data.max_length=4096"],
        3,
        "the model takes at most 512 tokens",
    ),
    (
        ["model=tiny", "trainer.epochs=1"],
        2,
        "trainer.epochs would change nothing, got 1: trainer.steps=20 goes before (trainer.steps=null trains for epochs)",
    ),
    (
        ["experiment=latex_gpt2", "lora.r=8"],
        2,
        "lora.r would change nothing, got 8: lora.variant=none has no adapter (lora=default has one)",
    ),
    (
        ["data=jsonl", "data.path=a.jsonl", "data.valid_path=b.jsonl", "data.valid=0.4"],
        2,
        "data.valid would change nothing, got 0.4: data.valid_path holds the held-out rows",
    ),
    (
        ["data=jsonl", "data.path=a.jsonl", "data.columns={text: plot, lables: genre}"],
        2,
        "data.columns.lables would change nothing, got genre: no column of this name is read; "
        "did you mean data.columns.labels?",
    ),
    (["lora.r=4,8", "trainer.epochs=1", "-m"], 2, "trainer.epochs would change nothing, got 1: trainer.steps=20 goes"),
    ([*TINY, "lora=none", "lora.train=[layers.1],[foo]", "-m"], 2, "lora.train: 'foo' is in the name of no weight"),
    (["data=jsonl", "data.path=none.jsonl"], 3, "none.jsonl: data.path must be a file"),
    (["model=hub", "model.path=./none"], 4, "model.path must be a folder with a config.json, got './none'"),
]


@pytest.mark.parametrize(("argv", "code", "message"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistake_ends_in_one_line_and_starts_nothing(cli, tmp_path, argv, code, message):
    got, out, err = cli(*argv)
    assert got == code
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("ftexp: ")
    assert "Traceback" not in err
    assert out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["lora.rank=8"], ["lora.r=8,0", "-m"], ["--cfg", "job"]], ids=" ".join)
def test_command_ends_before_anything_heavy_is_imported(tmp_path, argv):
    code = (
        "import sys; from ftexp import run; sys.argv[1:] = " + repr(argv) + "\n"
        "try:\n    run.main()\nexcept SystemExit:\n    pass\n"
        "print(*sorted({'torch', 'transformers', 'peft', 'trl', 'mlflow', 'datasets', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == ""


def test_single_run_trains_scores_and_shows(cli, tmp_path):
    code, out, err = cli(*TINY, "track=none", "name=one")
    assert code == 0, err
    folder = tmp_path / "outputs" / "runs" / "one"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert (folder / ".hydra" / "config.yaml").exists()
    assert "files: outputs/runs/one" in out


def test_rows_that_changed_are_refused_and_the_first_run_is_kept(cli, tmp_path):
    import json

    def write(word):
        rows = [{"prompt": f"say {n}", "completion": f"{word} {n}"} for n in range(30)]
        (tmp_path / "my.jsonl").write_text("\n".join(json.dumps(r) for r in rows))

    given = [
        "model=tiny",
        "data=jsonl",
        "data.path=my.jsonl",
        "data.valid=4",
        "trainer.steps=2",
        "eval=loss",
        "track=none",
    ]
    write("one")
    assert cli(*given, "name=single")[0] == 0
    assert cli(*given, "name=many", "lora.r=2,4", "-m")[0] == 0
    write("two")
    for more in (["name=single"], ["name=many", "lora.r=2,4", "-m"]):
        code, _, err = cli(*given, *more)
        assert code == 2
        assert "the rows changed since" in err


def test_second_run_under_a_taken_name_is_refused_and_the_first_is_whole(cli, tmp_path):
    cli(*TINY, "track=none", "name=one")
    before = {p: p.read_bytes() for p in (tmp_path / "outputs").rglob("*") if p.is_file()}
    code, _, err = cli(*TINY, "track=none", "name=one", "lora.r=3")
    assert code == 2
    assert "name=one is taken by another run" in err
    assert {p: p.read_bytes() for p in (tmp_path / "outputs").rglob("*") if p.is_file()} == before


def test_flags_may_stand_anywhere(cli):
    code, _, err = cli("lora.r=8", "-m", "lora.alpha=0")
    assert code == 2
    assert "lora.alpha must be above 0" in err


def test_bad_row_is_refused_with_file_and_line_before_the_model_loads(cli, tmp_path, monkeypatch):
    from ftexp import model

    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    code, _, err = cli("lora.r=8,16,64", "-m", "model=hub", "model.path=org/model", "data=jsonl", "data.path=my.jsonl")
    assert code == 3
    assert "my.jsonl:2: column 'completion' is missing" in err


def test_own_data_and_own_model_folder(cli, tmp_path):
    """The README's way to train a model of one's own on rows of one's own, with a folder in place of a hub id."""
    import json

    from ftexp import model
    from ftexp.config import Kind, Model, Quant

    base = model.load(Model(kind=Kind.tiny), Quant())
    base.model.save_pretrained(tmp_path / "mine")
    base.tokenizer.save_pretrained(tmp_path / "mine")
    rows = [{"prompt": f"what is {n}", "completion": f"{n} it is"} for n in range(40)]
    (tmp_path / "my.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    code, out, err = cli(
        "lora.r=2,4", "-m", "model=hub", f"model.path={tmp_path}/mine", "data=jsonl", "data.path=my.jsonl", "data.valid=8",
        "track=none", "trainer.lr=1e-2",
    )  # fmt: skip
    assert code == 0, err
    assert "best" in out


def test_interrupt_ends_in_130_and_keeps_what_is_done(cli, tmp_path, monkeypatch):
    from ftexp import experiment

    honest = experiment._execute

    def interrupted(run, *rest):
        if run.lora.r == 4:
            raise KeyboardInterrupt
        return honest(run, *rest)

    monkeypatch.setattr(experiment, "_execute", interrupted)
    code, _, err = cli(*TINY, "track=none", "name=s", "lora.r=2,4", "-m")
    assert code == 130
    assert "the same command goes on" in err
    assert (tmp_path / "outputs/sweeps/s/0/adapter/adapter_model.safetensors").exists()


def test_help_and_config_are_hydras_own(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert "lora: default, dora, fixed_alpha, loftq, loraplus, none, pissa, rslora" in out
    code, out, _ = cli("--cfg", "job", "lora.r=3")
    assert code == 0
    assert "r: 3" in out


def test_every_verb_has_a_module_with_main(monkeypatch, capsys):
    from importlib import import_module

    from ftexp import __main__ as verbs

    for verb in verbs.VERBS:
        assert callable(import_module(verbs.module(verb)).main)
    monkeypatch.setattr(sys, "argv", ["ftexp"])
    assert verbs.main() == 2
    assert "report" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["ftexp", "run", "lora.rank=8"])
    assert verbs.main() == 2


def test_tab_completion_knows_groups_and_keys(tmp_path):
    env = {**os.environ, "COMP_LINE": "ftexp-run lora.", "COMP_POINT": "15"}
    query = [sys.executable, "-m", "ftexp.run", "-sc", "query=bash"]
    out = subprocess.run(query, capture_output=True, text=True, cwd=tmp_path, env=env).stdout.split()
    assert "lora.r=" in out
    assert "lora.dropout=" in out


BADINPUT = Path(__file__).parent / "badinput"


@pytest.mark.slow
def test_absurd_configs_are_refused_in_one_line_before_torch(tmp_path):
    """Golden texts: `python tests/badinput/configs.py` writes them anew."""
    done = subprocess.run(
        [sys.executable, BADINPUT / "configs.py", "--json"], capture_output=True, text=True, check=True
    )
    golden = dict(line.split(" -> ", 1) for line in (BADINPUT / "configs.txt").read_text().splitlines())
    found = json.loads(done.stdout)
    assert len({one["message"] for one in found.values()}) >= 80
    assert {line: f"ftexp: {golden.get(line)}" for line in found} == {k: one["message"] for k, one in found.items()}
    assert {one["code"] for one in found.values()} == {2, 3, 4}
    assert not [line for line, one in found.items() if one["torch"] or one["written"]]


def test_sabotage_config_without_limits_is_accepted(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport configs\nfrom ftexp import config\n"
        "config.require = lambda *_: None\nprint(configs.told('lora.dropout=1')['code'])"
    )
    done = subprocess.run([sys.executable, "-c", code, BADINPUT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "AssertionError: accepted"


@pytest.mark.parametrize("way", ["single", "sweep"])
def test_file_where_a_folder_should_be_is_named(cli, tmp_path, way):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / ("runs" if way == "single" else "sweeps")).write_text("in the way")
    code, out, err = cli(*TINY, "track=none", *(["lora.r=2,4", "-m"] if way == "sweep" else []))
    assert code == 4
    assert "must be a folder, a file of this name is in the way" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_mappings_are_taken_whole(cli, tmp_path, sign):
    (tmp_path / "qa.jsonl").write_text("".join(f'{{"question": "q{n}", "answer": "a{n}"}}\n' for n in range(40)))
    given = [
        *TINY,
        "data=jsonl",
        "data.path=qa.jsonl",
        "data.valid=8",
        "trainer=default",
        "trainer.steps=1",
        "track=none",
    ]
    code, _, err = cli(*given, f"{sign}data.columns={{prompt: question, completion: answer}}",
                       f"{sign}trainer.extra={{adam_beta2: 0.95}}", "name=m")  # fmt: skip
    assert code == 0, err
    told = read_json(tmp_path / "outputs/runs/m/trial.json")["config"]
    assert (told["data.columns.prompt"], told["trainer.extra.adam_beta2"]) == ("question", 0.95)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["lora.targets=q_proj"], "a list is wanted, such as [q_proj] for lora.targets"),
        (["objectives=valid/perplexity"], "a list is wanted, such as [valid/perplexity] for objectives"),
        (
            ["--config-path", "mine"],
            "configs are closed and checked; a file of values of yours goes into the folder of its group",
        ),
        (["eval.labels=, ", "trainer.steps=0"], "trainer.steps must be"),
    ],
)
def test_what_a_person_would_type_is_taken_or_told(cli, given, told):
    code, _, err = cli(*TINY, "track=none", *given)
    assert code == 2
    assert told in err


def test_target_that_is_no_layer_is_refused_before_a_sweep_begins(cli, tmp_path):
    code, _, err = cli(*TINY, "track=none", "lora.targets=[q_proj],[q_prj]", "-m", "name=s")
    assert code == 2
    assert "lora.targets: 'q_prj' matches no layer, did you mean q_proj?" in err
    assert not (tmp_path / "outputs/sweeps/s/identity.json").exists()


def test_split_that_leaves_little_to_train_on_is_told(cli, tmp_path):
    (tmp_path / "my.jsonl").write_text("".join(f'{{"prompt": "q{n}", "completion": "a{n}"}}\n' for n in range(160)))
    given = [t for t in UNWRITTEN if not t.startswith("data.")]
    given += ["data=jsonl", "data.path=my.jsonl", "track=none", "eval=loss", "name=m"]
    assert "my.jsonl: of 160 rows 128 are held out, 32 are left to train on; data.valid=0.2" in cli(*given)[2]
    assert "held out" not in cli(*given, "data.valid=0.2", "name=n")[2]
