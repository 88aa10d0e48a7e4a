"""`python tests/chaos/stores.py FOLDER [ROUNDS]`: what tracking costs and loses; prints JSON.

A server that takes calls and answers none, ten thousand steps of three metrics, and eight processes that open an empty
store at the same moment.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
from nursery import Child

from ftexp import config, sync, track
from ftexp.config import Run, Track
from ftexp.files import write_json

STEPS, PROCESSES = 10_000, 8


def report(folder: Path, how: Track, steps: int) -> tuple[float, float, list[float]]:
    """Report three metrics a step; return the seconds of the loop, those of the end, and those of each step."""
    config.register()
    run = Run(name="x", track=how)
    each = []
    with track.start(run, folder, "x", None) as log:
        trial = {
            "label": "x",
            "state": "running",
            "config": {},
            "track": {"uri": how.uri, "experiment": "x", "parent": None},
        }
        write_json(folder / "trial.json", trial | {"mlflow_run": log.run_id})
        began = time.perf_counter()
        for step in range(1, steps + 1):
            at = time.perf_counter()
            log.metrics({"train/loss": 1 / step, "train/lr": 1e-3, "train/grad_norm": float(step)}, step)
            each.append(time.perf_counter() - at)
        loop = time.perf_counter() - began
        ends = time.perf_counter()
    write_json(folder / "trial.json", trial | {"mlflow_run": log.run_id, "state": "complete"})
    return loop, time.perf_counter() - ends, each


def missing(folder: Path, uri: str) -> int:
    """Bring what is missing, and count the points that are still not there."""
    from mlflow import MlflowClient

    sync.sync([folder], uri)
    client = MlflowClient(tracking_uri=uri)
    run_id = json.loads((folder / "trial.json").read_text())["mlflow_run"]
    there = {
        name: {m.step for m in client.get_metric_history(run_id, name)} for name in client.get_run(run_id).data.metrics
    }
    return sum(len(set(range(1, STEPS + 1)) - there.get(f"train/{n}", set())) for n in ("loss", "lr", "grad_norm"))


def outage(place: Path) -> dict[str, float]:
    """Report to a server that dies in mid-run: from then on it takes calls and answers none."""
    calm, _, _ = report(place / "calm", Track(kind=config.Tracker.none), STEPS)
    uri = f"sqlite:///{place}/ml.db"
    deaf = socket.socket()
    deaf.bind(("127.0.0.1", 0))
    deaf.listen(64)
    began = time.perf_counter()
    loop, end, _ = report(place / "deaf", Track(uri=f"http://127.0.0.1:{deaf.getsockname()[1]}", experiment="x"), STEPS)
    whole = time.perf_counter() - began
    return {
        "added_in_loop": loop - calm,
        "waited_in_all": whole - calm,
        "at_the_end": end,
        "lost": missing(place / "deaf", uri),
    }


def many(place: Path) -> dict[str, float]:
    """Report to SQLite, as the default does; that MLflow makes the tables of a new store is told beside it."""
    how = Track(uri=f"sqlite:///{place}/many.db", experiment="x")
    began = time.perf_counter()
    track.open_parent(how, "x", place, {})  # as a launch does before its trials
    opened = time.perf_counter() - began
    _, _, each = report(place / "many", how, STEPS)
    whole = time.perf_counter() - began - opened
    return {
        "seconds": whole,
        "new_store": opened,
        "p99_ms": 1000 * float(np.percentile(each, 99)),
        "lost": missing(place / "many", f"sqlite:///{place}/many.db"),
    }


def openers(place: Path, rounds: int) -> dict[str, int]:
    """Open an empty store in eight processes at once, and count those that fail."""
    dead = 0
    for turn in range(rounds):
        how = Track(uri=f"sqlite:///{place}/round{turn}/ml.db")
        at = time.time() + 0.3

        def work(how: Track = how, at: float = at) -> int:
            time.sleep(max(0.0, at - time.time()))
            parent = track.open_parent(how, "x", place, {})
            track.end(how, parent, {}, {"a": 1.0}, "FINISHED")
            return 0

        children = [Child(work, place / "openers.txt") for _ in range(PROCESSES)]
        dead += sum(child.wait(300) != 0 for child in children)
        again = Child(work, place / "openers.txt")  # and the store is sound for whoever comes later
        dead += again.wait(300) != 0
    return {"rounds": rounds, "openers": rounds * PROCESSES, "dead": dead}


def main() -> int:
    place, rounds = Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 20
    place.mkdir(parents=True)
    told = {"openers": openers(place, rounds)}  # first, while this process has opened no store: it forks
    track._dead.clear()
    told |= {"outage": outage(place), "many": many(place)}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
