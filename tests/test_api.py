"""A run from Python is the run of the command line."""

import hydra
import pytest
import torch
from conftest import TINY

from ftexp import api
from ftexp.errors import ConfigError, DataError, MachineError
from ftexp.files import read_json
from ftexp.sweep import plugin

KEYS = ["model=tiny", "track=none", "trainer.steps=2", "data.valid=4", "eval=loss"]
ROWS = [{"prompt": f"Say {n} now", "completion": f"{n}!"} for n in range(20)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "cache"))


def test_run_of_rows_ends_in_its_folder_and_is_not_run_again(tmp_path, monkeypatch):
    import pandas

    scores = api.run(*KEYS, rows=pandas.DataFrame(ROWS))
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert read_json(folder / "trial.json")["scores"] == scores
    assert scores["valid/rows"] == 4
    monkeypatch.setattr(api.experiment, "_execute", None)
    assert api.run(*KEYS, rows=ROWS) == scores  # equal rows, equal folder


def test_other_rows_are_another_folder(tmp_path):
    api.run(*KEYS, rows=ROWS)
    api.run(*KEYS, rows=ROWS[::-1])
    assert len(list((tmp_path / "outputs" / "runs").iterdir())) == 2


def test_run_from_python_is_that_of_the_command_line(cli, tmp_path):
    given = [*TINY, "track=none", "eval=loss"]
    mine = api.run(*given, folder=tmp_path / "mine")
    assert cli(*given, "name=theirs")[0] == 0
    theirs = read_json(tmp_path / "outputs" / "runs" / "theirs" / "trial.json")["scores"]
    assert {k: v for k, v in mine.items() if "cost" not in k} == {k: v for k, v in theirs.items() if "cost" not in k}


@pytest.mark.parametrize(
    ("given", "rows", "error", "message"),
    [
        (["lora.rank=8"], None, ConfigError, r"unknown key lora\.rank"),
        (["lora.r=0"], None, ConfigError, r"lora\.r must be"),
        ([], [{"prompt": 1, "completion": "x"}] * 9, DataError, r"\.jsonl:1: column 'prompt' must be text, got 1"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(given, rows, error, message, tmp_path):
    with pytest.raises(error, match=message):
        api.run(*KEYS, *given, rows=rows)
    assert not (tmp_path / "outputs").exists()


def test_long_commands_that_differ_in_what_a_name_cuts_off_have_two_names():
    given = ["model=tiny", "trainer=default", "trainer.steps=2", "trainer.report_steps=1", "eval=loss", "track=none"]
    one, other = (api._name([*given, f"trainer.lr={lr}"], ["12345678"]) for lr in (1e-3, 2e-3))
    assert one != other
    assert max(len(one), len(other)) <= 63
    assert api._name(["lora.r=8"], ["12345678"]) == "lora.r-8-12345678"


def test_run_that_another_process_is_at_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with plugin.only(tmp_path / "r", "r"), pytest.raises(MachineError, match="is being run by process"):
        api.run(*TINY, "track=none", folder=tmp_path / "r")
    assert not (tmp_path / "r" / "trial.json").exists()


@pytest.mark.parametrize(
    "more", [["sweep=rank"], ["lora.r=2", "-m"], ["sweep.workers=2"], ["--cfg", "job"], ["--help"]]
)
def test_what_asks_for_more_than_one_run_is_refused(more):
    with pytest.raises(ConfigError, match=r"ftexp\.api takes the overrides of one run"):
        api.run("model=tiny", *more)


def test_run_within_an_application_of_hydra_leaves_it_its_own(tmp_path):
    (tmp_path / "app.yaml").write_text("size: 3\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        size = hydra.compose("app").size
        assert api.compose([f"lora.r={size}"]).lora.r == 3
        with pytest.raises(ConfigError):
            api.compose(["lora.r=many"])
        assert hydra.compose("app").size == 3
    assert api.compose(["lora.r=4"]).lora.r == 4


def test_model_saved_again_into_its_folder_is_the_one_that_is_trained(tmp_path, monkeypatch):
    """Also where the same relative name is another folder by now; its files of before come back as they were."""
    from ftexp.model import tiny

    def saved(folder, scale):
        made = tiny.model("eager")
        with torch.no_grad():
            made.get_output_embeddings().weight.mul_(scale)
        made.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)

    for name in ("a", "b"):
        saved(tmp_path / name / "m", 1.0 if name == "a" else 9.0)
    keys = ("model=hub", "model.path=./m", *[k for k in TINY if not k.startswith("model")], "track=none", "eval=loss")
    losses = []
    for name in ("a", "b", "a"):
        monkeypatch.chdir(tmp_path / name)
        losses.append(api.run(*keys, folder=tmp_path / f"r{len(losses)}")["base/loss"])
    saved(tmp_path / "a" / "m", 9.0)
    losses.append(api.run(*keys, folder=tmp_path / "last")["base/loss"])
    assert losses[0] == losses[2] != losses[1] == losses[3]
