"""One run from start to end. With `run.py` this is the whole path from the command to the optimizer step."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftexp import config, data, evaluate, facts, metrics, model, track
from ftexp.config import Format, Kind, Run
from ftexp.data import prompts
from ftexp.errors import ConfigError, FtexpError
from ftexp.files import read_json, write_json
from ftexp.model import Base
from ftexp.overrides import ROOT
from ftexp.progress import say
from ftexp.train import TRAINERS

Tokenised = tuple[list[prompts.Example], list[prompts.Example]]


def check(run: Run, folder: Path) -> None:
    """Refuse what can be seen to be wrong before anything heavy is imported and before any file is written.

    Raises:
        ConfigError: an objective is unknown, keys are at odds, or the folder holds another run.
        DataError: a row cannot be used.
        MachineError: a model folder is not there.
    """
    for name in run.objectives:
        metrics.check_objective(name, run.eval.generate)
    if run.model.kind is Kind.tiny and run.quant.kind is not Format.none:
        raise ConfigError(f"quant.kind={run.quant.kind.value} needs stored weights: model=embedded or hub, got tiny")
    kept = read_json(folder / "trial.json")
    if kept is not None and kept["config"] != identity(run):
        raise ConfigError(
            f"name={run.name} is taken by another run in {folder}: {_difference(kept['config'], identity(run))}"
        )
    data.load(run.data)
    if run.model.kind is Kind.hub:
        model.source(run.model)


def identity(run: Run) -> dict[str, Any]:
    """Return what decides the result of a run, flat: the config without tracking and name."""
    return {k: v for k, v in track.flat(run).items() if k != "name"}


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in sorted(old | new) if old.get(k) != new.get(k)]
    return f"{', '.join(changed[:5])}; choose another name"


def complete(run: Run, folder: Path) -> dict[str, float] | None:
    """Return the scores of a run that is already in its folder and ended well."""
    kept = read_json(folder / "trial.json")
    if kept and kept["state"] == "complete" and kept["config"] == identity(run):
        return kept["scores"]
    return None


def execute(run: Run, folder: Path, label: str, parent: str | None = None) -> dict[str, float]:
    """Train one adapter and score it beside its base; everything about it is in `folder` afterwards.

    Args:
        run: the checked config.
        folder: its own folder; a complete run found there is not run again.
        label: its name in the tracking store.
        parent: id of the sweep's run in the tracking store.

    Returns:
        Metrics by name: `valid/*` of the adapter and `base/*` of the base model on the same rows, and what it cost.

    Raises:
        FtexpError: the run was refused or ended badly; the reason is in `folder/trial.json` too.
    """
    if (kept := complete(run, folder)) is not None:
        say(f"{label}: complete already, kept as it is in {folder}")
        return kept
    trial: dict[str, Any] = {"label": label, "state": "running", "config": identity(run), "folder": str(folder)}
    write_json(folder / "trial.json", trial)
    try:
        scores = _execute(run, folder, label, parent, trial)
    except BaseException as error:
        reason = str(error) if isinstance(error, FtexpError) else f"{type(error).__name__}: {error}"
        write_json(folder / "trial.json", trial | {"state": "failed", "error": reason.splitlines()[0]})
        raise
    write_json(folder / "trial.json", trial | {"state": "complete", "scores": scores})
    return scores


def _execute(run: Run, folder: Path, label: str, parent: str | None, trial: dict[str, Any]) -> dict[str, float]:
    splits = data.load(run.data)
    train, valid = tokenised(run, splits)
    base = model.load(run.model, run.quant)
    with track.start(run, folder, label, parent) as log:
        trial["mlflow_run"] = log.run_id
        log.params(track.flat(run))
        untrained = base_scores(run, base, valid, splits.digest())
        facts.reset_peak_memory()
        began = time.monotonic()
        with model.adapted(base, run.lora, run.seed) as tuned:
            trial["facts"] = _facts(run, base, splits, tuned)
            log.tags({f"ftexp.{k}": v for k, v in config.flat(trial["facts"]).items()})
            trained = TRAINERS[run.trainer.kind](run, base, tuned, train, valid, folder / "trainer", log.metrics)
            scored = evaluate.score(tuned, base.tokenizer, valid, run.eval, "valid")
            tuned.save_pretrained(str(folder / "adapter"))
        scores = {f"valid/{k}": v for k, v in scored.scores.items()} | {
            f"base/{k}": v for k, v in untrained.scores.items()
        }
        scores |= {"cost/trainable": float(trial["facts"]["parameters"]["trainable"])}
        scores |= {f"cost/{k}": v for k, v in facts.peak_memory_gib().items()}
        scores["cost/seconds"] = time.monotonic() - began
        _store(run, folder, log, scores, untrained.table, scored.table, int(trained["train/steps"]))
    return scores


_tokens: tuple[str, Tokenised] | None = None


def tokenised(run: Run, splits: data.Splits) -> Tokenised:
    """Return train and valid rows as token ids; kept in memory while trials ask for the same."""
    global _tokens
    key = f"{splits.digest()} {config.digest(run.model, run.data)}"
    if _tokens is None or _tokens[0] != key:
        tokenizer = model.tokenizer(run.model)
        train = prompts.render(splits.train, tokenizer, run.data)
        _tokens = key, (train, prompts.render(splits.valid, tokenizer, run.data))
    return _tokens[1]


_base_scores: dict[str, evaluate.Scored] = {}


def base_scores(run: Run, base: Base, valid: list[prompts.Example], rows: str) -> evaluate.Scored:
    """Score the model before training: once for a model, its rows and the way of scoring, not once a trial."""
    key = f"{base.weights} {rows} {config.digest(run.data, run.eval)}"
    if key not in _base_scores:
        _base_scores[key] = evaluate.score(base.model, base.tokenizer, valid, run.eval, "base")
    return _base_scores[key]


def _facts(run: Run, base: Base, splits: data.Splits, tuned: Any) -> dict[str, Any]:
    """What the result depends on beside the config, and sizes that a reader asks for first."""
    return {
        "rows": {"train": len(splits.train), "valid": len(splits.valid), "test": len(splits.test),
                 "duplicates": splits.duplicates, "sha256": splits.digest()},
        "template_sha256": prompts.template_digest(base.tokenizer, run.data),
        "weights_sha256": base.weights,
        "parameters": asdict(model.count(tuned)),
        "compute": asdict(base.compute),
        "versions": facts.versions(),
        "git": facts.git(ROOT),
    }  # fmt: skip


def _store(
    run: Run, folder: Path, log: track.Log, scores: dict[str, float],
    before: list[dict[str, Any]], after: list[dict[str, Any]], step: int,
) -> None:  # fmt: skip
    """Write the per-row table, and show scores, examples and adapter in the tracking store."""
    import pyarrow
    import pyarrow.parquet

    rows = [{**b, "base_nats": a["nats"], **({"base_prediction": a["prediction"]} if "prediction" in a else {})}
            for a, b in zip(before, after, strict=True)]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "examples.parquet")
    log.metrics({"valid/loss": scores["valid/loss"]}, step)
    log.metrics({k: v for k, v in scores.items() if k != "valid/loss"}, 0)  # single values: the UI draws bars
    shown = ("prompt", "reference", "base_prediction", "prediction", "exact_match", "jaccard", "f1")
    log.table([{k: row[k] for k in shown if k in row} for row in rows[: run.eval.examples]], "examples")
    log.files(folder / "examples.parquet")
    log.files(folder / "adapter", "adapter")
