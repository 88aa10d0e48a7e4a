"""One run from Python: `ftexp.api.run("lora.r=8", rows=frame)`.

The same path as `python -m ftexp.run`, with the same overrides, checks and folders; a sweep belongs on the command
line, whose processes can be killed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import zip_longest
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra

from ftexp import config, data, experiment, model, overrides, track
from ftexp.config import Run
from ftexp.errors import ConfigError
from ftexp.files import check_folder
from ftexp.progress import LOUD, quiet_libraries
from ftexp.sweep import plugin
from ftexp.train import control, losses


def compose(given: list[str], caller: str = "ftexp.api") -> Run:
    """Compose and check a run from overrides, and Hydra's `--config-dir` where options of one's own are chosen.

    Args:
        given: overrides.
        caller: what takes them, as a message names it.

    Raises:
        ConfigError: a key is unknown, or a value out of range.
    """
    if stray := [text for text in given if not isinstance(text, str)]:
        raise ConfigError(f"an override must be text such as 'lora.r=8', got {stray[0]!r}")
    plugin.register()
    alone = f"{' '.join(given)}: {caller} takes the overrides of one run; sweeps and --help are for ftexp run"
    several = f"{caller} takes the overrides of one run; a sweep is for ftexp run"
    with _ONE, config.registered():  # prepared here too: options of --config-dir are one for the process
        told = io.StringIO()
        try:
            with redirect_stderr(told), redirect_stdout(told):
                prepared = overrides.prepare(given, several=several)
        except SystemExit as error:  # of Hydra's command line
            why = f"{' '.join(given)}: {told.getvalue().strip().splitlines()[-1]}" if error.code else alone  # --version
            raise ConfigError(why) from error
        if overrides.runs(prepared) != "single":
            raise ConfigError(alone)
        given = overrides.given(prepared)
        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()  # of the caller, who may be an application of Hydra's
        try:
            with hydra.initialize_config_dir(str(overrides.CONF), **overrides.BASE):
                made = config.build(hydra.compose("config", given))
                overrides.check_effect(given, [made])
                return made
        except config.COMPOSING as error:
            raise ConfigError(overrides.told(error)) from error
        finally:
            GlobalHydra.instance().hydra = outer


def run(
    *given: str,
    rows: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    folder: str | Path | None = None,
) -> dict[str, float]:
    """Train one adapter and score it beside its base; a run that is complete in its folder is not run again.

    Args:
        given: overrides, as on the command line; `"--config-dir=mine"` among them brings options of one's own.
        rows: a `pandas.DataFrame`, a `datasets.Dataset` or dicts; None where the overrides say where rows are.
        loss: what is learned from a token, as a function of logits (supervised, vocabulary) and the tokens they should
            predict (supervised,) that returns a term for each (supervised,); `ftexp/train/losses.py` holds examples.
            Its source is part of the run. None where the overrides choose a loss.
        folder: of the run; `outputs/runs/<name>` where none is given.

    Returns:
        Metrics by name, as `valid/loss`, `base/loss` and `cost/seconds`.

    Raises:
        FtexpError: the run was refused, or ended badly.
    """
    asked, marks = list(given), []
    if rows is not None:
        if both := [text for text in given if str(text).startswith(("data=", "data.path=", "data.kind="))]:
            raise ConfigError(f"{both[0]} must be left out where rows are given: they are the data")
        asked += data.of(rows)
        marks.append(Path(asked[-1].rstrip("'")).stem[:8])
    if loss is not None:
        marks.append(losses.give(loss)[:8])
        asked += ["trainer.loss=own", f"trainer.loss_sha256={losses.give(loss)}"]
    if marks and not any(text.startswith("name=") for text in given):
        asked.append(f"name={_name(list(given), marks)}")
    made = compose(asked)
    into = Path(folder) if folder is not None else Path("outputs/runs") / made.name
    with _ONE, _as_found(), control.listening():
        check_folder(into)
        experiment.check(made, into)
        if experiment.complete(made, into) is None:
            experiment.prepare(made)
        with plugin.only(into, made.name):
            return experiment.execute(made, into, made.name)


_ONE = threading.RLock()
"""Held by the thread that composes or trains: base model and random numbers are one for the process."""


@contextmanager
def _as_found() -> Iterator[None]:
    """Silence libraries for a while, and leave the process as the caller has it.

    That is environment, levels of logging, warnings, random numbers, garbage collection, bars, and what an Accelerator
    of the caller's computes with. A tracking server that did not answer an earlier run is asked again.
    """
    np, torch = sys.modules.get("numpy"), sys.modules.get("torch")  # one that is not there yet has drawn nothing
    loggers = [logging.getLogger(name) for name in (*LOUD, "alembic", "mlflow")]
    levels, environment = [logger.level for logger in loggers], dict(os.environ)
    drawn = random.getstate(), np and np.random.get_state(), torch and torch.random.get_rng_state()
    shared, bars = [dict(state) for state in _accelerate()], _bars()
    track.hope()
    try:
        with warnings.catch_warnings():
            quiet_libraries()
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        random.setstate(drawn[0])
        if np is not None:
            np.random.set_state(drawn[1])
        if torch is not None:
            torch.random.set_rng_state(drawn[2])
        for state, values in zip_longest(_accelerate(), shared, fillvalue={}):
            state.clear()
            state.update(values)
        if bars and (told := sys.modules.get("transformers.utils.logging")) is not None:
            told.enable_progress_bar()
        model.thaw()
        control.LEAVE.clear()


def _accelerate() -> list[dict[str, Any]]:
    """List what accelerate keeps for the whole process, the device and precision of the first Accelerator."""
    state = sys.modules.get("accelerate.state")
    kinds = ("PartialState", "AcceleratorState", "GradientState")
    return [] if state is None else [getattr(state, kind)._shared_state for kind in kinds]


def _bars() -> bool:
    """Whether transformers shows bars, as it does where nobody told it otherwise."""
    told = sys.modules.get("transformers.utils.logging")
    return told is None or told.is_progress_bar_enabled()


def _name(given: list[str], marks: list[str]) -> str:
    """Name a run after its overrides and the content of its rows and its loss, wherever the cache lies."""
    end = "".join(f"-{mark}" for mark in marks)
    whole = overrides.slug(given)
    if len(whole) > 63 - len(end):  # what is cut off must tell two runs apart all the same
        end = f"-{hashlib.sha256(json.dumps(sorted(given)).encode()).hexdigest()[:8]}{end}"
    return f"{whole[: 63 - len(end)].rstrip('-._')}{end}"
