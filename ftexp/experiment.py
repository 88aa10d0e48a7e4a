"""One run from start to end. With `run.py` this is the whole path from the command to the optimizer step."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ftexp import config, data, evaluate, facts, metrics, model, track
from ftexp.config import Format, Kind, Method, Run
from ftexp.data import gates, prompts
from ftexp.errors import ConfigError, DataError, FtexpError, Pruned
from ftexp.files import read_json, write_json
from ftexp.model import Base
from ftexp.overrides import ROOT
from ftexp.progress import say
from ftexp.train import TRAINERS, sft
from ftexp.train.sft import Judge

Tokenised = tuple[list[prompts.Example], list[prompts.Example]]


def check(run: Run, folder: Path | None) -> None:
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
    kept = None if folder is None else read_json(folder / "trial.json")
    if kept is not None and kept["config"] != identity(run):
        raise ConfigError(
            f"name={run.name} is taken by another run in {folder}: {_difference(kept['config'], identity(run))}"
        )
    splits = data.load(run.data)
    _check_shape(run, splits)
    rows = splits.digest()
    if kept is not None and kept.get("facts", {}).get("rows", {}).get("sha256", rows) != rows:
        raise ConfigError(f"name={run.name}: the rows changed since the run in {folder}; choose another name")
    if run.model.kind is Kind.hub:
        model.source(run.model)


def _check_shape(run: Run, splits: data.Splits) -> None:
    """Refuse rows that the method or the scoring cannot use."""
    pair = next((row for row in splits.train if row.rejected), None)
    if pair is not None and run.trainer.kind is Method.sft:
        raise ConfigError(
            f"trainer.kind=sft cannot learn from pairs of answers, as in {pair.where}; "
            "data.completion='{chosen}' learns the chosen ones"
        )
    text = next((row for row in splits.valid if not row.prompt), None)
    if text is not None and run.eval.generate:
        raise ConfigError(f"eval.generate must be false, {text.where} has no prompt to complete; use eval=loss")


def prepare(run: Run) -> None:
    """Refuse what only the libraries and the tokenizer can see to be wrong; imports them, loads no weights.

    Raises:
        ConfigError: peft or TRL refuses a keyword, or a template or token is missing.
        DataError: a row is longer than `data.max_length` or the model, or a held-out row nearly one of another split.
    """
    model.adapter(run.lora)
    sft.arguments(run.trainer, "cpu", run.seed, "", 1)
    train, valid = tokenised(run, data.load(run.data))
    limit = model.positions(run.model)
    longest = max((*train, *valid), key=lambda e: len(e.ids))
    if limit is not None and len(longest.ids) > limit:
        raise DataError(f"{longest.row.where}: the model takes at most {limit} tokens, this row has {len(longest.ids)}")
    if run.eval.generate:
        asked, room = max(valid, key=lambda e: len(e.prompt)), evaluate.planned_tokens(valid, run.eval)
        if limit is not None and len(asked.prompt) + room > limit:
            raise ConfigError(
                f"eval.max_new_tokens must leave room for the prompt of {asked.row.where}: the model takes at most "
                f"{limit} tokens, the prompt has {len(asked.prompt)} and {room} may be written"
            )


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


def execute(
    run: Run, folder: Path, label: str, parent: str | None = None,
    judge: Judge | None = None, deadline: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train one adapter and score it beside its base; everything about it is in `folder` afterwards.

    Where memory runs out, the forward pass is cut and accumulation raised, so that the effective batch stays.

    Args:
        run: the checked config.
        folder: its own folder; a complete run found there is not run again.
        label: its name in the tracking store.
        parent: id of the sweep's run in the tracking store.
        judge: asked at each rung of the held-out loss whether to go on.
        deadline: when training stops at the latest, on the monotonic clock.

    Returns:
        Metrics by name: `valid/*` of the adapter and `base/*` of the base model on the same rows, and what it cost.

    Raises:
        FtexpError: the run was refused, pruned or ended badly; the reason is in `folder/trial.json` too.
    """
    if (kept := complete(run, folder)) is not None:
        say(f"{label}: complete already, kept as it is in {folder}")
        return kept
    before = read_json(folder / "trial.json") or {}
    trial: dict[str, Any] = {"label": label, "state": "running", "config": identity(run), "folder": str(folder)}
    trial["mlflow_run"] = before.get("mlflow_run")
    write_json(folder / "trial.json", trial)
    try:
        scores = _fitting(run, folder, label, parent, trial, judge, deadline)
    except BaseException as error:
        reason = str(error) if isinstance(error, FtexpError) else f"{type(error).__name__}: {error}"
        state = "pruned" if isinstance(error, Pruned) else "failed"
        write_json(folder / "trial.json", trial | {"state": state, "error": reason.splitlines()[0]})
        raise
    write_json(folder / "trial.json", trial | {"state": "complete", "scores": scores})
    return scores


def _fitting(
    run: Run, folder: Path, label: str, parent: str | None, trial: dict[str, Any],
    judge: Judge | None, deadline: float | None,
) -> dict[str, float]:  # fmt: skip
    """Run with smaller and smaller forward passes until one fits in memory."""
    while True:
        try:
            return _execute(run, folder, label, parent, trial, judge, deadline)
        except Exception as error:
            smaller = halved(run) if out_of_memory(error) else None
            if smaller is None:
                raise
            run = smaller
        free_memory()
        shape = {"batch": run.trainer.batch, "accumulation": run.trainer.accumulation}
        trial.setdefault("out_of_memory", []).append(shape)
        say(f"{label}: out of memory; again with trainer.batch={shape['batch']} accumulation={shape['accumulation']}")


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, on the host or a GPU."""
    import torch

    told = isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def halved(run: Run) -> Run | None:
    """Cut the forward pass by the smallest factor that divides its rows, and accumulate as much more.

    None where a forward pass is one row already.
    """
    batch = run.trainer.batch
    factor = next((f for f in range(2, batch + 1) if batch % f == 0), None)
    if factor is None:
        return None
    trainer = replace(run.trainer, batch=batch // factor, accumulation=run.trainer.accumulation * factor)
    return replace(run, trainer=trainer)


def free_memory() -> None:
    """Give back what a failed attempt held."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _execute(
    run: Run, folder: Path, label: str, parent: str | None, trial: dict[str, Any],
    judge: Judge | None, deadline: float | None,
) -> dict[str, float]:  # fmt: skip
    splits = data.load(run.data)
    train, valid = tokenised(run, splits)
    base = model.load(run.model, run.quant)
    with track.start(run, folder, label, parent, trial["mlflow_run"]) as log:
        trial["mlflow_run"] = log.run_id
        write_json(folder / "trial.json", trial)  # so that a restart after a kill finds its run in the store
        log.params(track.flat(run))
        untrained = base_scores(run, base, valid, splits.digest())
        facts.reset_peak_memory()
        began = time.monotonic()
        with model.adapted(base, run.lora, run.seed) as tuned:
            trial["facts"] = _facts(run, base, splits, (train, valid), tuned)
            log.tags({f"ftexp.{k}": v for k, v in config.flat(trial["facts"]).items()})
            train_adapter = TRAINERS[run.trainer.kind]
            try:
                trained = train_adapter(
                    run, base, tuned, train, valid, folder / "trainer", log.metrics, judge, deadline
                )
            except Pruned:
                tuned.save_pretrained(str(folder / "adapter"))
                raise
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
        gates.near_leaks(splits, run.data)
        tokenizer = model.tokenizer(run.model)
        train = prompts.render(splits.train, tokenizer, run.data)
        _tokens = key, (train, prompts.render(splits.valid, tokenizer, run.data))
    return _tokens[1]


_base_scores: dict[str, evaluate.Scored] = {}


def base_scores(run: Run, base: Base, valid: list[prompts.Example], rows: str) -> evaluate.Scored:
    """Score the model before training: once for a model, its rows and the way of scoring, not once a trial."""
    key = f"{base.weights} {base.key} {rows} {config.digest(run.data, run.eval)}"
    if key not in _base_scores:
        _base_scores[key] = evaluate.score(base.model, base.tokenizer, valid, run.eval, "base")
    return _base_scores[key]


def _facts(run: Run, base: Base, splits: data.Splits, used: Tokenised, tuned: Any) -> dict[str, Any]:
    """What the result depends on beside the config, and sizes that a reader asks for first."""
    return {
        "rows": _counts(splits, used),
        "template_sha256": prompts.template_digest(base.tokenizer, run.data),
        "weights_sha256": base.weights,
        "parameters": asdict(model.count(tuned)),
        "compute": asdict(base.compute),
        "versions": facts.versions(),
        "git": facts.git(ROOT),
    }  # fmt: skip


def _counts(splits: data.Splits, used: Tokenised) -> dict[str, Any]:
    """Count rows; read = train + valid + test + dropped, by reason. The sealed rows were not tokenised."""
    kept = {"train": len(used[0]), "valid": len(used[1]), "test": len(splits.test)}
    lost = len(splits.train) + len(splits.valid) - kept["train"] - kept["valid"]
    dropped = splits.dropped() | ({"length": lost} if lost else {})
    return {"read": splits.read, **kept, "duplicates": splits.duplicates, "dropped": dropped, "sha256": splits.digest()}


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
