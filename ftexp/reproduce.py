"""`python -m ftexp.reproduce RUN`: train a run again from what its folder tells, and compare step by step."""

from __future__ import annotations

import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftexp import config, data, experiment, runs, verb
from ftexp.config import Tracker
from ftexp.errors import DataError, MachineError
from ftexp.files import read_json, write_json
from ftexp.progress import quiet_libraries, say
from ftexp.runs import Kept
from ftexp.sweep import plugin
from ftexp.train import control

TOLERANCE = 0.01
"""Largest relative difference of a loss that still counts as the same training, rounded otherwise."""
FILE = "reproduced.json"
USAGE = """usage: python -m ftexp.reproduce RUN [--tolerance 0.01] [--json]

Trains a complete run again into its folder's `reproduced/` and tells whether it is bit-exact, the same within a
tolerance, or different, and from which step on.

  RUN          folder of a run or trial, or its MLflow id or the beginning of it (8 letters at least)
  --tolerance  largest relative difference of a loss that counts as equal (0.01)
  --json       one JSON object on stdout
"""


@dataclass(frozen=True)
class Result:
    """How a run compares with its repetition."""

    verdict: str
    """`bit-exact`: losses and adapter equal to the last bit; `within tolerance`; or `different`."""
    steps: int
    """Points of the curves that were compared."""
    first_difference: str | None
    """Metric, step and both values where the curves part; None where they do not."""
    largest: float
    """Largest relative difference of a loss."""
    adapter_equal: bool
    """Whether the adapters' files are equal."""
    causes: dict[str, tuple[Any, Any]]
    """What the two did not share: versions, code, compute, weights."""


def reproduce(kept: Kept, tolerance: float = TOLERANCE) -> Result:
    """Train a run again and compare; where that was interrupted it goes on.

    Raises:
        MachineError: the run is not complete, its weights are gone, or another process is at it.
        Preempted: the process was asked to leave; the same call goes on.
        DataError: its rows are no longer those it was trained on.
    """
    if kept.trial.get("state") != "complete":
        raise MachineError(f"{kept.folder}: must be complete to be reproduced, it is {kept.trial.get('state')}")
    if kept.weights() is None:
        raise MachineError(f"{kept.folder}: what it trained is gone, so nothing is left to compare with")
    run = kept.config()
    run.track.kind = Tracker.none
    rows, told = data.load(run.data).digest(), kept.trial["facts"]["rows"]["sha256"]
    if rows != told:
        raise DataError(f"{kept.folder}: its rows were {told[:12]}, those of data.kind={run.data.kind.value} are now "
                        f"{rows[:12]}: the file or its generator was changed")  # fmt: skip
    _take_threads(kept)
    folder = kept.folder / "reproduced"
    experiment.check(run, None)
    experiment.prepare(run)
    with plugin.only(folder, f"{kept.name} again"):
        if (read_json(folder / "trial.json") or {}).get("state") == "complete":
            _forget(folder)
        experiment.execute(run, folder, f"{kept.name} again")
    again = runs.find(str(folder))
    result = compared(kept, again, tolerance)
    write_json(kept.folder / FILE, asdict(result))
    return result


def _forget(folder: Path) -> None:
    """Remove what an earlier repetition left, but for the lock, which is ours."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != plugin.LOCK:
            path.unlink()


def _take_threads(kept: Kept) -> None:
    """Compute with as many threads as the run did; on some chips another number rounds otherwise."""
    import torch

    compute = kept.trial["facts"].get("compute", {})
    if compute.get("device") == "cpu" and compute.get("threads"):
        torch.set_num_threads(compute["threads"])


def compared(old: Kept, new: Kept, tolerance: float) -> Result:
    """Compare two runs of one config, point by point.

    On a CPU, other weights after losses that are equal to the last bit are not what the run trained.
    """
    before, after = (_losses(kept) for kept in (old, new))
    first, largest = None, 0.0
    for key in sorted(before.keys() | after.keys(), key=lambda k: (k[1], k[0])):
        a, b = before.get(key, math.nan), after.get(key, math.nan)
        if a == b:
            continue
        first = first or f"{key[0]} at step {key[1]}: {a!r} and {b!r}"
        off = abs(a - b) / max(abs(a), abs(b), 1e-12)
        largest = max(largest, math.inf if math.isnan(off) else off)
    equal = old.weights() is not None and old.weights() == new.weights()
    others = first is None and not equal and old.trial["facts"].get("compute", {}).get("device") == "cpu"
    exact = first is None and equal
    verdict = "bit-exact" if exact else "within tolerance" if largest <= tolerance and not others else "different"
    return Result(verdict, len(before), first, largest, equal, runs.changed(runs.facts(old), runs.facts(new)))


def _losses(kept: Kept) -> dict[tuple[str, int], float]:
    """Losses by metric and step; the last of a step counts, as it does in the tracking store."""
    return {
        (name, int(point["step"])): value
        for point in kept.points() for name, value in point.items() if name.endswith("/loss") and point["step"] > 0
    }  # fmt: skip


def told(result: Result) -> list[str]:
    """Tell a result in plain lines."""
    lines = [
        f"{result.verdict}: {result.steps} losses compared, adapters {'equal' if result.adapter_equal else 'differ'}"
    ]
    if result.first_difference is not None:
        lines.append(f"first difference: {result.first_difference}; largest {result.largest:.2g} of the loss")
    if result.causes:
        for key, both in result.causes.items():
            old, new = ("absent" if value is None else value for value in both)
            lines.append(f"not shared: {key}: {old} -> {new}")
    elif result.first_difference is None and result.verdict == "different":
        lines.append("the losses are equal to the last bit: the weights in the folder are not those that it trained")
    elif result.verdict != "bit-exact":
        lines.append("nothing that is recorded differs: the device rounds otherwise from run to run (GPUs do)")
    return lines


def main() -> int:
    """Run the command line; return the exit code."""
    words, tolerance = list(sys.argv[1:]), TOLERANCE
    try:
        if "--tolerance" in words:
            at = words.index("--tolerance")
            tolerance = float(words[at + 1])
            del words[at : at + 2]
    except (IndexError, ValueError):
        words = []
    names = [word for word in words if word != "--json"]
    if len(names) != 1 or names[0].startswith("-"):
        asked = names in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr, end="")
        return 0 if asked else 2
    quiet_libraries()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    config.register()
    with control.listening():
        return verb.ended(lambda: _main(names[0], tolerance, "--json" in words))


def _main(target: str, tolerance: float, plain: bool) -> int:
    kept = runs.find(target)
    result = reproduce(kept, tolerance)
    if plain:
        print(verb.as_json(asdict(result)))
    else:
        print("\n".join(told(result)))
        say(f"kept in {Path(os.path.relpath(kept.folder)) / FILE}")
    return 5 if result.verdict == "different" else 0


if __name__ == "__main__":
    sys.exit(main())
