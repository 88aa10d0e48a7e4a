"""`python tests/chaos/kills.py FOLDER COUNT`: SIGKILLs one training at random moments; prints what was found as JSON.

A checkpoint is written after each step, so that many kills fall into the writing of one. After each kill the newest
sealed checkpoint must be whole, and the next attempt must go on from it; a training that ends begins anew elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from nursery import launch

from ftexp.files import read_json
from ftexp.train import checkpoints

STEPS = 40
WORDS = ["model=tiny", "model.dtype=float32", "data.rows=120", "data.valid=12", "data.max_length=256", "trainer.lr=1e-2",
         f"trainer.steps={STEPS}", "trainer.report_steps=0", "trainer.checkpoint_minutes=0", "trainer.neftune=5",
         "lora.dropout=0.1", "track=none", "eval=loss", "name=k"]  # fmt: skip


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint with a seal; 0 where there is none."""
    return max((int(p.parent.name.split("-")[1]) for p in run.glob("checkpoints/*/manifest.json")), default=0)


def good(run: Path) -> int:
    """Return the step that an attempt would go on from: of the newest checkpoint whose files are those of its seal."""
    seals = [kept for p in run.glob("checkpoints/*/manifest.json") if (kept := read_json(p))]
    return max(
        (s.step for k in seals if (s := checkpoints.store(run / "checkpoints", k["fingerprint"]).resume)), default=0
    )


def adapter(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> int:
    place, count = Path(sys.argv[1]).absolute(), int(sys.argv[2])
    dice = random.Random(20261125)
    (place / "calm").mkdir(parents=True)
    assert launch(WORDS, place / "calm", place / "calm.txt", place / "no clock").wait(300) == 0, (
        place / "calm.txt"
    ).read_text()
    bits, told = adapter(place / "calm/outputs/runs/k"), {"kills": 0, "resumable": 0, "went_on": 0, "torn": 0, "redone": [],
                                                        "trainings": 0, "bit_equal": 0}  # fmt: skip
    out = place / "out.txt"
    while told["kills"] < count:
        folder = place / f"wild{told['trainings']}"
        folder.mkdir()
        run, left = folder / "outputs/runs/k", 0
        while True:
            process = launch(WORDS, folder, out, place / "no clock")
            at = left + dice.randint(1, STEPS // 4)  # the step around which the blow falls
            until = time.monotonic() + 120
            while process.poll() is None and newest(run) < at and time.monotonic() < until:
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.08))
            if told["kills"] >= count and process.poll() is None:
                process.wait(300)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            ended = process.wait(60) == 0
            went_on = (read_json(run / "trial.json") or {}).get("resumed_at", [])
            if left:  # what the attempt before this one left behind
                told["went_on"] += went_on[-1:] == [left]
            if ended:
                break
            assert process.returncode == -9, out.read_text()[-2000:]
            told["kills"] += 1
            sealed, left = newest(run), good(run)
            told["torn"] += any(not (p / "manifest.json").exists() for p in run.glob("checkpoints/checkpoint-*"))
            told["resumable"] += left == sealed and left > 0
            told["redone"].append(max(0, steps(run) - left))
        told["trainings"] += 1
        told["bit_equal"] += adapter(run) == bits
    told["redone"] = {"most": max(told["redone"]), "mean": sum(told["redone"]) / len(told["redone"])}
    print(json.dumps(told))
    return 0


def steps(run: Path) -> int:
    """Return the last step whose metrics are in the file: what training had done before the blow."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    done = 0
    for line in lines:
        try:
            done = max(done, json.loads(line)["step"])
        except ValueError:
            continue
    return done


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
