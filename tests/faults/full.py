"""Where a disk fills up: before each thing that is written."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

POINTS = {
    # what is written -> where the disk fills up: module, name, and at which call
    "hydra files": ("hydra.core.utils", "_save_config", 1),
    "trial.json": ("ftexp.experiment", "write_json", 1),
    "metrics.jsonl": ("ftexp.track", "Log.metrics", 1),
    "metrics.jsonl in the middle": ("ftexp.track", "Log.metrics", 4),
    "checkpoint": ("transformers", "Trainer._save_checkpoint", 2),
    "optimizer of a checkpoint": ("transformers", "Trainer._save_optimizer_and_scheduler", 2),
    "seal": ("ftexp.train.checkpoints", "write_json", 2),
    "adapter": ("ftexp.model", "save", 1),
    "examples.parquet": ("ftexp.experiment", "_write_table", 1),
    "trial.json at the end": ("ftexp.experiment", "write_json", 3),
    "page": ("ftexp.report", "write_page", 1),
    "token cache": ("ftexp.data.tokens", "_write", 1),
    "frozen configs": ("ftexp.sweep.frozen", "freeze", 1),
    "sweep.json": ("ftexp.sweep.frozen", "Frozen.save", 1),
    "record": ("ftexp.sweep.study", "queue", 1),
    "record at a claim": ("ftexp.sweep.study", "claim", 1),
    "record at an end": ("optuna.study", "Study.tell", 1),
    "hydra files of a trial": ("ftexp.sweep.worker", "keep_hydra_files", 1),
    "MLflow store": ("ftexp.track", "Log.flush", 1),
}


def arm(point: str, fill: Callable[[], None], patch: Callable[[Any, str, Any], None] = setattr) -> list[int]:
    """Have the disk fill up as the point is reached; return the list that gets an entry each time it is."""
    module, name, at = POINTS[point]
    holder = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        holder = getattr(holder, part)
    honest, calls = getattr(holder, last), []

    def filling(*given: Any, **keys: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            fill()
        return honest(*given, **keys)

    patch(holder, last, filling)
    return calls
