"""The same trials by a shell loop over a TRL script, as it comes and tuned, and as one sweep: wall time, side by side.

Run by `make bench`. Same model, rows, steps, ranks and scoring; every way is run in turn, so that a machine that slows
down slows all of them. Prints ratios; nothing here is a test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ftexp import config, data
from ftexp.config import Data, Source, Template
from ftexp.facts import versions
from ftexp.model import embedded

RANKS = (4, 8, 16, 32)
RESULT = Path("outputs/bench/loop.json")
SCRIPT = Path(__file__).with_name("trl_trial.py")


def rows(folder: Path) -> Path:
    """Write the demo's rows with their split, for the script."""
    splits = data.load(Data(kind=Source.yoda, template=Template.chatml, valid=48, max_length=128))
    path = folder / "rows.jsonl"
    told = [{"split": name, "prompt": r.prompt, "completion": r.completion}
            for name, part in (("train", splits.train), ("valid", splits.valid)) for r in part]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in told))
    return path


def timed(command: list[str], folder: Path) -> float:
    """Run a command to its end; return its wall time in seconds."""
    began = time.monotonic()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.monotonic() - began


def loop(folder: Path, given: Path, *more: str) -> tuple[float, dict[int, float]]:
    """Run the script for each rank; return seconds and the held-out losses it reports."""
    took, losses = 0.0, {}
    for rank in RANKS:
        out = folder / f"trl{''.join(more)}{rank}"
        took += timed(
            [sys.executable, str(SCRIPT), str(embedded.folder()), str(given), str(rank), str(out), *more], folder
        )
        losses[rank] = json.loads((out / "result.json").read_text())["loss"]
    return took, losses


def sweep(folder: Path) -> tuple[float, dict[int, float]]:
    """Run the ranks as one sweep."""
    ranks = ",".join(map(str, RANKS))
    took = timed([sys.executable, "-m", "ftexp.run", f"lora.r={ranks}", "track=none", "name=bench", "-m"], folder)
    kept = [json.loads(p.read_text()) for p in (folder / "outputs/sweeps/bench").glob("*/trial.json")]
    return took, {t["config"]["lora.r"]: t["scores"]["valid/loss"] for t in kept}


def main() -> None:
    """Measure, print and keep."""
    config.register()
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    given = rows(folder)
    ways = {"loop": lambda: loop(folder, given), "tuned loop": lambda: loop(folder, given, "tuned"),
            "ftexp": lambda: sweep(folder)}  # fmt: skip
    told = {name: dict(zip(("seconds", "losses"), way(), strict=True)) for name, way in ways.items()}
    ours = told["ftexp"]["seconds"]
    print(f"{len(RANKS)} trials of 20 steps, {os.cpu_count()} cores, torch {versions()['torch']}")
    for name, found in told.items():
        losses = " ".join(f"r={r} {loss:.4f}" for r, loss in sorted(found["losses"].items()))
        print(f"{name:10} {found['seconds']:6.0f} s  {found['seconds'] / ours:4.2f} x   held-out loss {losses}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(told, indent=1) + "\n")
    print(f"kept in {RESULT}")


if __name__ == "__main__":
    main()
