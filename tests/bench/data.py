"""What tokenising a million short rows costs: from nothing, from the cache, and by TRL's own maps over the same rows.

Run by `make bench`; `python tests/bench/data.py ROWS` takes fewer. Every part is a process of its own, so that peaks of
memory are its own; the tokenizer is the embedded model's. Times are wall time and count no import; nothing here is a
test.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

RESULT = Path("outputs/bench/data.json")
PARTS = ("cold", "warm", "trl cold", "trl warm")


def pairs(count: int):
    """Yield different short prompts and completions."""
    from ftexp.data import yoda

    for n, (english, answer) in enumerate(islice(cycle(islice(yoda.pairs(0), 20_000)), count)):
        yield f"{english} {n}", answer


def ours(count: int, tokenizer) -> tuple[float, int]:
    """Tokenise through the cache; return seconds and rows."""
    import datasets  # noqa: F401  # what TRL is spared too

    from ftexp.config import Data
    from ftexp.data import tokens
    from ftexp.data.shapes import Row

    rows = tuple(Row(prompt, completion, f"bench:{n}") for n, (prompt, completion) in enumerate(pairs(count)))
    told("rows", peak())
    began = time.monotonic()
    made = tokens.render(rows, tokenizer, Data(), "bench").dataset()  # type: ignore
    return time.monotonic() - began, len(made)


def trl(count: int, tokenizer, folder: Path) -> tuple[float, int]:
    """Let SFTTrainer tokenise a table on disk, with as many processes and its cache in `folder`."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    from ftexp.data import tokens
    from ftexp.model import tiny

    file = folder / "rows.jsonl"
    if not file.exists():
        with file.open("w") as out:
            for prompt, completion in pairs(count):
                turns = [[{"role": r, "content": t}] for r, t in (("user", prompt), ("assistant", completion))]
                out.write(json.dumps({"prompt": turns[0], "completion": turns[1]}) + "\n")
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "datasets"))
    told("rows", peak())
    began = time.monotonic()
    settings = SFTConfig(str(folder / "out"), use_cpu=True, bf16=False, report_to="none", max_length=1024,
                         dataset_num_proc=tokens.workers())  # fmt: skip
    trainer = SFTTrainer(tiny.model("eager"), settings, train_dataset=rows, processing_class=tokenizer)  # type: ignore
    return time.monotonic() - began, len(trainer.train_dataset)  # type: ignore


def peak() -> float:
    """Return the peak of resident memory of this process, in GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def told(name: str, value: float) -> None:
    print(f"{name} {value}", flush=True)


def part(name: str, count: int, folder: Path) -> None:
    """Measure one part and print it."""
    from ftexp import model
    from ftexp.config import Model

    tokenizer = model.tokenizer(Model())
    os.environ["FTEXP_CACHE"] = str(folder / "ftexp")
    seconds, rows = trl(count, tokenizer, folder) if name.startswith("trl") else ours(count, tokenizer)
    assert rows == count, rows
    told("seconds", seconds)
    told("peak", peak())


def main() -> None:
    """Measure every part, and print and keep the figures."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in PARTS:
            ran = subprocess.run(
                [sys.executable, __file__, str(count), name, folder], stdout=subprocess.PIPE, text=True
            )
            if ran.returncode:
                print(f"{name}: failed")
                continue
            lines = (line.split() for line in ran.stdout.splitlines())
            found[name] = {words[0]: float(words[1]) for words in lines if words[0] in ("rows", "seconds", "peak")}
            figures = found[name]
            print(f"{name:9} {figures['seconds']:8.1f} s   peak {figures['peak']:.2f} GiB, {figures['rows']:.2f} before",
                  flush=True)  # fmt: skip
        size = sum(p.stat().st_size for p in Path(folder, "ftexp", "tokens").glob("*.arrow"))
    if {"cold", "trl cold"} <= set(found):
        print(f"TRL's maps take {found['trl cold']['seconds'] / found['cold']['seconds']:.1f} times as long")
    if {"cold", "warm"} <= set(found):
        print(f"a second start takes {found['cold']['seconds'] / found['warm']['seconds']:.0f} times less")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    whole = {"rows": count, "bytes": size, "python": platform.python_version(), "parts": found}
    RESULT.write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 3:
        part(sys.argv[2], int(sys.argv[1]), Path(sys.argv[3]))
    else:
        main()
