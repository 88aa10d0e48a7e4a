"""Fixtures: runs of the tiny model that take a second, and the command line in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads that wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

from hydra import compose, initialize_config_dir

from ftexp import config, overrides
from ftexp import run as command
from ftexp.sweep import plugin

TINY = ["model=tiny", "model.dtype=float32", "data.rows=120", "data.valid=12", "data.max_length=256", "trainer.steps=4", "trainer.lr=1e-2",
        "trainer.report_steps=2", "eval.max_new_tokens=8"]  # fmt: skip
"""Overrides of a run of the real code path that takes about a second."""
UNWRITTEN = [text for text in TINY if not text.startswith("eval.")]
"""The same for `eval=loss`, with which no completion is written."""


@pytest.fixture
def composed():
    """Return a function that composes and checks a `Run` from overrides, as the command line does."""
    config.register()
    plugin.register()

    def build(*given: str) -> config.Run:
        with initialize_config_dir(str(overrides.CONF), **overrides.BASE):
            return config.build(compose("config", list(given)))

    return build


@pytest.fixture
def tiny(composed):
    """Return a function that composes a run of the tiny model without tracking."""
    return lambda *given: composed(*TINY, "track=none", *given)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Return a function that runs `python -m ftexp.run` in this process and an empty folder.

    Gives exit code, stdout and stderr.
    """
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ftexp.run", *argv])
        try:
            code = command.main()
        except SystemExit as left:  # Hydra's own way out of --help
            code = left.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def mine(tmp_path):
    """A function that writes files into a folder of options, and gives the folder."""

    def write(**files: str):
        for name, text in files.items():
            path = tmp_path / "mine" / name.replace("__", "/")
            path = path if path.suffix else path.with_suffix(".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "mine"

    yield write
    overrides.choose(None)


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """A folder with a finished sweep `s` of two ranks, which keeps rows sealed, and a classifier `c`, both of the tiny model."""
    folder = tmp_path_factory.mktemp("shipped")
    small = [t for t in TINY if not t.startswith("trainer.")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for given in (
            [*TINY, "lora.r=2,4", "data.test=10", "name=s", "-m"],
            [
                *(t for t in small if t in UNWRITTEN),
                "data=genres",
                "trainer=classify",
                "trainer.steps=4",
                "trainer.lr=1e-2",
                "name=c",
            ],
        ):
            patch.setattr(sys, "argv", ["ftexp.run", *given, "track=none"])
            assert command.main() == 0
    return folder


@pytest.fixture
def at(shipped, monkeypatch):
    """Stand in the folder of `shipped`; leave it as it is."""
    config.register()
    monkeypatch.chdir(shipped)
    return shipped


STAGES = {
    "sft": ["trainer=default", "trainer.steps=12", "trainer.lr=1e-2"],
    "whole": ["trainer=default", "trainer.steps=4", "trainer.lr=1e-2", "lora=none"],
    "judge": ["data=preference", "trainer=reward", "trainer.steps=20", "trainer.lr=1e-2"],
    "judge_whole": ["data=preference", "trainer=reward", "trainer.steps=20", "trainer.lr=1e-2", "lora=none"],
    "sorter_whole": ["data=genres", "trainer=classify", "trainer.steps=4", "trainer.lr=1e-2", "lora=none"],
}
"""Runs of the tiny model that others are made from, by name."""


@pytest.fixture(scope="session")
def trained_stages(tmp_path_factory):
    """A folder with a run of each of `STAGES`."""
    from ftexp import experiment

    folder = tmp_path_factory.mktemp("stages")
    config.register()
    plugin.register()
    small = [t for t in TINY if not t.startswith("trainer.")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, given in STAGES.items():
            with initialize_config_dir(str(overrides.CONF), **overrides.BASE):
                cfg = compose("config", [*small, "trainer.report_steps=0", *given, "data.valid=12", "data.max_length=256",
                                         f"name={name}", "track=none"])  # fmt: skip
            run = config.build(cfg)
            experiment.execute(run, folder / "outputs" / "runs" / name, name)
    return folder


@pytest.fixture
def stages(trained_stages, tmp_path, monkeypatch):
    """Stand in an own copy of the folder of `trained_stages`."""
    import shutil

    shutil.copytree(trained_stages / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs" / "runs"


@pytest.fixture
def rewarded(stages, tiny):
    """Return a function that composes a run of reinforcement learning that starts from `sft` and is scored by `judge`."""
    given = ("model=run", "model.path=sft", "trainer=rloo", "trainer.reward=judge", "trainer.batch=8",
             "trainer.max_new_tokens=6", "trainer.steps=3", "trainer.report_steps=0")  # fmt: skip
    return lambda *more: tiny(*given, *more)
