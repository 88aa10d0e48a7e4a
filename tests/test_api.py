"""A run from Python is the run of the command line."""

import threading
import time
from pathlib import Path

import hydra
import pytest
import torch
from conftest import TINY, UNWRITTEN

from ftexp import api, track
from ftexp.config import Track
from ftexp.errors import ConfigError, DataError, MachineError
from ftexp.files import read_json
from ftexp.sweep import plugin
from ftexp.train import control

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
    given = [*UNWRITTEN, "track=none", "eval=loss"]
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
    "more",
    [
        ["sweep=rank"],
        ["lora.r=2", "-m"],
        ["sweep.workers=2"],
        ["--cfg", "job"],
        ["--help"],
        ["--version"],
        ["lora.r=2,4"],
    ],
)
def test_what_asks_for_more_than_one_run_is_refused(more, capfd):
    with pytest.raises(ConfigError, match=r"ftexp\.api takes the overrides of one run"):
        api.run("model=tiny", *more)
    assert capfd.readouterr() == ("", "")


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
    keys = (
        "model=hub",
        "model.path=./m",
        *[k for k in UNWRITTEN if not k.startswith("model")],
        "track=none",
        "eval=loss",
    )
    losses = []
    for name in ("a", "b", "a"):
        monkeypatch.chdir(tmp_path / name)
        losses.append(api.run(*keys, folder=tmp_path / f"r{len(losses)}")["base/loss"])
    saved(tmp_path / "a" / "m", 9.0)
    losses.append(api.run(*keys, folder=tmp_path / "last")["base/loss"])
    assert losses[0] == losses[2] != losses[1] == losses[3]


def test_run_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    """Environment, resolvers, loggers, handlers, warnings and random numbers are the caller's."""
    import gc
    import logging
    import os
    import random
    import signal
    import warnings

    import numpy as np
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("mul", lambda a, b: f"{a}-{b}", replace=True)
    logging.getLogger("datasets").setLevel(logging.DEBUG)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)

    def state():
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
        return (
            dict(os.environ), logging.getLogger("datasets").level, logging.getLogger("mlflow").level, gc.get_freeze_count(),
            signal.getsignal(signal.SIGINT), list(warnings.filters), torch.get_num_threads(), Path.cwd(), drawn,
            OmegaConf.create({"a": "${mul:2,3}"}).a,
        )  # fmt: skip

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "mine")
    environment = dict(os.environ)
    api.run(*TINY, folder="warm")  # imports set what they set, but for this
    assert dict(os.environ) == environment
    seed()
    before = state()
    seed()
    for name in ("one", "two"):
        api.run(*TINY, f"track.uri=sqlite:///{tmp_path}/ml.db", folder=name)
    assert state() == before
    OmegaConf.clear_resolver("mul")


def test_an_accelerator_and_the_bars_of_the_caller_stay_as_they_were(tmp_path, monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from transformers.utils import logging

    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(True)
    logging.enable_progress_bar()
    try:
        api.run(*TINY, "track=none", folder="one")
        mine = Accelerator(mixed_precision="bf16", cpu=True)  # which one of another precision would refuse
        api.run(*TINY, "track=none", folder="two")
        assert mine.mixed_precision == AcceleratorState().mixed_precision == "bf16"
        assert logging.is_progress_bar_enabled()
    finally:
        AcceleratorState._reset_state(True)


def test_ctrl_c_keeps_a_checkpoint_and_the_next_call_goes_on(tmp_path):
    import signal

    keys = [k for k in TINY if not k.startswith(("trainer.steps", "data.max_length"))] + [
        "trainer.steps=400",
        "track=none",
    ]
    main = threading.current_thread()

    def press():
        while not list(tmp_path.glob("r/metrics.jsonl")):
            time.sleep(0.05)
        time.sleep(0.3)
        signal.pthread_kill(main.ident, signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        api.run(*keys, "data.max_length=256", folder=tmp_path / "r")
    pressing.join()
    (kept,) = tmp_path.glob("r/checkpoints/checkpoint-*")
    step = int(kept.name.removeprefix("checkpoint-"))
    assert 0 < step < 400
    assert not control.LEAVE.is_set()
    api.run(*keys, "data.max_length=256", folder=tmp_path / "r")
    assert read_json(tmp_path / "r" / "trial.json")["resumed_at"] == [step]


def test_run_in_another_folder_is_tracked_there(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        api.run(*TINY, "track.uri=sqlite:///ml.db", folder="r")
        client, experiment = track.store(Track(uri=f"sqlite:///{tmp_path}/{name}/ml.db"))
        assert len(client.search_runs([experiment])) == 1


def test_server_that_was_dead_is_asked_again_by_the_next_run(tmp_path, capfd):
    for name in ("a", "b"):
        api.run(*TINY, "track.uri=http://127.0.0.1:9", folder=tmp_path / name)
        assert "the run goes on with files only" in capfd.readouterr().err


def test_runs_of_two_threads_are_one_after_the_other(tmp_path):
    told, keys = {}, [*TINY, "track=none"]

    def work(rank):
        told[rank] = api.run(*keys, f"lora.r={rank}", folder=tmp_path / str(rank))["valid/loss"]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = [api.run(*keys, f"lora.r={rank}", folder=tmp_path / f"alone{rank}")["valid/loss"] for rank in (2, 4)]
    assert [told[2], told[4]] == alone


@pytest.mark.parametrize(
    ("given", "rows", "message"),
    [
        (["--bogus"], None, "unknown option --bogus"),
        ([3], None, "an override must be text such as 'lora.r=8', got 3"),
        (["data=yoda"], [{"prompt": "a", "completion": "b"}] * 9, "data=yoda must be left out where rows are given"),
        (["lora.r=abc"], None, r"lora\.r=abc: Value 'abc'.*could not be converted to Integer"),
        (["lora.targets=all-linear"], None, "a list is wanted"),
    ],
)
def test_what_cannot_be_is_told_whole(given, rows, message, tmp_path, capfd):
    with pytest.raises(ConfigError, match=message):
        api.run(*KEYS, *given, rows=rows, folder=tmp_path / "r")
    assert "usage" not in capfd.readouterr().err


def test_folder_of_a_sweep_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ConfigError, match="must be the folder of one run, this is a sweep's"):
        api.run(*TINY, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "r").write_text("")
    with pytest.raises(MachineError, match="a file of this name is in the way"):
        api.run(*TINY, "track=none", folder=tmp_path / "r")
