"""Folders of sweeps as a run leaves them, made in milliseconds, for tests of what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from ftexp.files import read_json, write_json

ROWS = 24
LABELS = ("drama", "comedy", "war")
HOSTILE = """</script><script>alert(1)</script><img src=x onerror=alert(2)>"'`&lt; \u202e \ud800 [bold]{x}|\\"""


def sweep(folder: Path, count: int = 3, kind: str = "text", hostile: str = "", pruned: int = 0, failed: int = 0,
          replicates: int = 1, **keys) -> Path:  # fmt: skip
    """Write a sweep of rank and learning rate: `kind` is text, labels or loss; the last trials failed or were pruned."""
    rng = np.random.default_rng(0)
    ranks, rates = [2 ** rng.integers(1, 7) for _ in range(count)], 10 ** rng.uniform(-4, -2, count)
    tokens, hard = rng.integers(5, 20, ROWS), rng.gamma(2, 0.2, ROWS)
    options = {"replicates": replicates, "at_most": {}}
    axes = [{"key": "lora.r"}, {"key": "trainer.lr"}]
    write_json(
        folder / "sweep.json",
        {"name": folder.name, "objectives": ["valid/loss"], "options": options, "axes": axes} | keys,
    )
    for n in range(count):
        point = n // replicates
        rank, lr = int(ranks[point]), float(rates[point])
        loss = 0.1 + 0.3 * abs(math.log10(lr) + 3) + 0.5 / rank
        state = "pruned" if n >= count - pruned else "failed" if n >= count - pruned - failed else "complete"
        one(
            folder / str(n),
            n,
            rank,
            lr,
            state,
            kind,
            hostile,
            tokens,
            hard,
            hard * loss + rng.normal(0, 0.01, ROWS),
            replicates,
        )
    return folder


def one(folder, n, rank, lr, state, kind, hostile, tokens, hard, nats, replicates):
    """Write the folder of a trial."""
    over = "decisions" if kind == "labels" else "tokens"
    rows = {"where": [f"rows.jsonl:{i + 1}{hostile}" for i in range(ROWS)], "prompt": [f"say {i} {hostile}" for i in range(ROWS)],
            "reference": [f"{i} it is" for i in range(ROWS)], "nats": nats * tokens, over: tokens}  # fmt: skip
    rival = "tfidf" if kind == "labels" else "base"
    rows[f"{rival}_nats"] = (hard + 1) * tokens
    if kind == "labels":
        rows["reference"] = [f"{LABELS[i % 3]}, war" for i in range(ROWS)]
        rows["prediction"] = [f"{LABELS[i % 3]}, war" if i % 4 else "comedy" for i in range(ROWS)]
        rows["tfidf_prediction"] = ["war" if i % 5 else f"{LABELS[i % 3]}, war" for i in range(ROWS)]
    if kind == "text":
        rows["prediction"] = [f"{i} it is" if i % 3 else f"it is {i} {hostile}" for i in range(ROWS)]
        rows["base_prediction"] = ["it is" if i % 6 else f"{i} it is" for i in range(ROWS)]
        rows["exact_match"] = [float(p == r) for p, r in zip(rows["prediction"], rows["reference"], strict=True)]
    loss = float((nats * tokens).sum() / tokens.sum())
    before = float(((hard + 1) * tokens).sum() / tokens.sum())
    scores = {"valid/loss": loss, f"{rival}/loss": before, "cost/trainable": rank * 1e5, "cost/seconds": 40.0 + rank,
              "cost/memory_gib": 2.0}  # fmt: skip
    if kind != "labels":
        scores |= {"valid/perplexity": math.exp(loss), "base/perplexity": math.exp(before)}
    if kind == "text":
        scores |= {"valid/exact_match": sum(rows["exact_match"]) / ROWS, "base/exact_match": 4 / ROWS}
    seed = n % replicates
    told = {"label": f"lora.r={rank} trainer.lr={lr:.3g}{hostile}" + (f" seed+{seed}" if replicates > 1 else ""),
            "state": state, "config": {"lora.r": rank, "trainer.lr": lr, "seed": seed, "objectives": ["valid/loss"]},
            "facts": {"rows": {"read": 130, "train": 100, "valid": ROWS, "test": 0, "dropped": {"copies" + hostile: 6}, "sha256": "c0ffee"},
                      "parameters": {"trainable": rank * 10**5, "total": 10**7}, "versions": {"torch": "2.13.0" + hostile}}}  # fmt: skip
    if state == "complete":
        told["scores"] = scores
        told["plan"] = planned(rank)
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.table({k: _written(v) for k, v in rows.items()}), folder / "examples.parquet"
        )
    else:
        told["error"] = f"{state} at step 4: {hostile or 'valid/loss 9.0'}"
    write_json(folder / "trial.json", told)
    if kind == "labels" and state == "complete":
        write_json(folder / "labels.json", by_label(hostile))
    last = {"complete": 10, "pruned": 4, "failed": 6}[state]
    steps = [{"step": s, "valid/loss": loss * (1 + 4 / s)} for s in range(2, last + 1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    write_json(
        folder / ".hydra" / "overrides.yaml",
        [f"lora.r={rank}", f"trainer.lr={lr}", "name=x", f"data.prompt={hostile}{{q}}"],
    )


def planned(rank):
    """Return what a trial planned and what it took."""
    counts = {"trainable": rank * 10**5, "total": 10**7, "steps": 10, "flops": rank * 10**12}
    return {k: {"planned": v, "real": v} for k, v in counts.items()} | {
        "memory_gib": {"planned": 1.5, "real": 2.0, "error": -0.25}
    }


def by_label(hostile="", f1=0.5):
    """Return what a trial says of each label; one was never true."""
    return [
        {"label": name + hostile, "true": 9 * (name != "war"), "predicted": 4, "precision": 0.5, "recall": f1,
         "f1": f1 if name != "war" else None, "roc_auc": 0.75, "threshold": 0.25, "tfidf_f1": 0.4}
        for name in LABELS
    ]  # fmt: skip


def confirmed(folder: Path, trials=(0,), hostile: str = "", finished: bool = True, labels: bool = False):
    """Put a confirmation of a point on record, over two fresh seeds and 24 sealed rows."""
    label = read_json(folder / str(trials[0]) / "trial.json")["label"]
    score, off = {"value": 0.4321, "low": 0.4, "high": 0.46}, {"value": 0.0123, "low": -0.01, "high": 0.04}
    member = {"role": "winner", "label": label, "trials": list(trials), "seeds": [7, 8], "failed": 0, "valid": 0.4198,
              "valid_again": 0.4242, "by_seed": [0.43, 0.4342], "optimism": off,
              "test": {"loss": score, "memorised": {"value": 0.0, "low": None, "high": None}}}  # fmt: skip
    result = {"objective": "valid/loss", "unit": "", "rows": 24, "groups": None, "expected_optimism": 0.0099, "points": 3,
              "replicates": 1, "members": [member], "pair": None, "alone": "no point is cheaper" + hostile, "seed_sd": 0.003}  # fmt: skip
    entry = {"opened": 1, "date": "2026-01-02T03:04:05+00:00", "who": "a on b", "test": {"sha256": "c", "rows": 24},
             "plan": [{"role": "winner", "label": label, "trials": list(trials)}], "seeds": [7, 8], "elsewhere": [],
             "runs": [{"number": n, "member": 0, "seed": 7 + n} for n in range(2)]}  # fmt: skip
    write_json(folder / "confirm.json", {"line": "", "openings": [entry | ({"result": result} if finished else {})]})
    for n in range(2 * labels):
        write_json(folder / "confirm" / str(n) / "test_labels.json", by_label(hostile, (0.5, 0.7)[n]))
    return folder


def _written(values):
    return [v.replace("\ud800", "?") for v in values] if isinstance(values[0], str) else values  # Arrow holds no half


if __name__ == "__main__":
    import sys

    place = Path(sys.argv[1])
    sweep(place / "two-hundred", 200, pruned=90, failed=6)
    confirmed(sweep(place / "labels", 3, "labels"), labels=True)
    sweep(place / "loss", 3, "loss", failed=1)
    sweep(place / "hostile", 5, hostile=HOSTILE, pruned=1, failed=1)
    sweep(place / "seeds", 6, replicates=2)
