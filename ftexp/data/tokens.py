"""Many rows as token ids: made once by all cores, kept on disk by what they are made from, read back through a map.

Below `MANY` rows everything stays in memory, as `prompts.render` makes it. Above, rows go in pieces to processes that
run the same code, and what comes back is written as it comes, in the order of the rows; no more than a few pieces of
token ids are in memory at once. The file is named after the content of the rows, the template, the tokenizer, the code
and the keys that decide, never after a time; a manifest with its hash is written last, so what is torn or of another
origin is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import queue
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock

from ftexp import machine
from ftexp.config import Data, Gate, Packing
from ftexp.data import gates, prompts
from ftexp.data.prompts import Example
from ftexp.data.shapes import Row
from ftexp.errors import MachineError
from ftexp.files import cache, read_json, sha256, write_json
from ftexp.progress import progress, say

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MANY = 50_000
"""Rows from which on the disk is worth it: ten seconds of one core."""
PIECE = 2_000
"""Rows that a process takes at a time, and that lie together in the file."""
MOST = 8 << 30
"""Bytes that all files together may have; those not used for longest go first."""
QUIET = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of a process: one core each."""


class Tokens(Sequence[Example]):
    """Rows as token ids in a file; each is made when it is asked for."""

    def __init__(self, table: Any, rows: tuple[Row, ...], kept: list[int], key: str) -> None:
        self.table, self.all_rows, self.kept, self.key = table, rows, kept, key

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, n: Any) -> Any:
        if isinstance(n, slice):
            return [self[m] for m in range(*n.indices(len(self)))]
        number = self.kept[n]
        entry = self.table.slice(number, 1).to_pylist()[0]
        ids, end, flat = entry["input_ids"], entry["prompt"], entry["earlier"]
        earlier = tuple(zip(flat[::2], flat[1::2], strict=True))
        return Example(
            self.all_rows[number], tuple(ids[:end]), tuple(ids[end:]), earlier, entry["unseen"], entry["cut"]
        )

    def dataset(self) -> Dataset:
        """Return ids and labels as TRL takes them, still on disk."""
        from datasets import Dataset

        whole = Dataset(self.table.select(["input_ids", "labels"]), fingerprint=self.key[:16])
        return whole if len(self) == len(self.all_rows) else whole.select(self.kept)

    def longest(self) -> Example:
        """Return the first of the longest rows."""
        import numpy as np

        lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in self.table["input_ids"].chunks])
        return self[int(np.argmax(lengths[self.kept]))]


def longest(examples: Sequence[Example]) -> Example:
    """Return the first of the longest rows."""
    return examples.longest() if isinstance(examples, Tokens) else max(examples, key=lambda e: len(e.ids))


def rows_of(examples: Sequence[Example]) -> list[Row]:
    """Return the rows that examples are made from, without making the examples."""
    if isinstance(examples, Tokens):
        return [examples.all_rows[number] for number in examples.kept]
    return [example.row for example in examples]


def render(
    rows: tuple[Row, ...], tokenizer: PreTrainedTokenizerBase, data: Data, content: str
) -> list[Example] | Tokens:
    """Tokenise rows in memory, or many of them through the cache; ids, errors and messages are the same.

    Args:
        rows: of one split.
        tokenizer: of the model.
        data: the config.
        content: names the content of the rows: equal rows, equal text.

    Raises:
        DataError: as of `prompts.render`.
        MachineError: a process died, or the cache cannot be written.
    """
    if len(rows) < MANY or not tokenizer.is_fast:  # what a slow tokenizer does cannot be hashed
        return prompts.render(rows, tokenizer, data)
    key = digest(tokenizer, data, content)
    folder = cache() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            table = _open(folder / key, len(rows))
            if table is None:
                _write(folder / key, rows, tokenizer, data)
                prune(folder, key)
                table = _open(folder / key, len(rows))
    except OSError as error:
        raise MachineError(f"{folder}: the cache of token ids cannot be written: {error}") from error
    if table is None:
        raise MachineError(f"{folder}: the cache of token ids does not read back what was written")
    lost, supervised, ended = (table[name].to_pylist() for name in ("lost", "supervised", "ended"))
    return Tokens(table, rows, gates.usable(rows, lost, supervised, ended, data), key)


def digest(tokenizer: PreTrainedTokenizerBase, data: Data, content: str) -> str:
    """Hash all that decides the token ids of rows."""
    backend = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    backend |= {"padding": None, "truncation": None}  # of the last call
    deciding = [
        content, backend, type(tokenizer).__name__, prompts.template_digest(tokenizer, data), data.template.value,
        tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids),
        data.max_length, data.long.value, Gate.double_bos in data.allow, data.packing is Packing.wrapped,
        [version(name) for name in ("transformers", "tokenizers", "jinja2")],
        [sha256(Path(module)) for module in (__file__, prompts.__file__)],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _open(path: Path, rows: int) -> Any | None:
    """Map a file into memory; None where there is none that is whole and has as many rows."""
    import pyarrow

    file, manifest = path.with_suffix(".arrow"), path.with_suffix(".json")
    try:
        told = read_json(manifest)
        if told is None or told["rows"] != rows or told["sha256"] != sha256(file):
            raise ValueError
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    except (OSError, ValueError, KeyError, TypeError, MachineError, pyarrow.ArrowException):
        if file.exists():
            say(f"{file.name}: a damaged cache of token ids, made anew")
        return None
    os.utime(manifest)  # tells `prune` that it was used
    return table


def _write(path: Path, rows: tuple[Row, ...], tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
    """Tokenise rows into a file, then write its manifest."""
    import pyarrow

    fresh = path.with_suffix(".part")  # of the one process that holds the lock
    try:
        with fresh.open("wb") as out, pyarrow.ipc.new_stream(out, _schema()) as writer:
            with progress("tokenising", len(rows)) as advance:
                for batch in _batches(rows, tokenizer, data):
                    writer.write_batch(batch)
                    advance(len(batch))
            writer.close()
            out.flush()
            os.fsync(out.fileno())
        whole = sha256(fresh)
        fresh.replace(path.with_suffix(".arrow"))
        write_json(path.with_suffix(".json"), {"rows": len(rows), "sha256": whole})
    finally:
        fresh.unlink(missing_ok=True)


def prune(folder: Path, spared: str) -> None:
    """Remove the files that were not used for longest until `MOST` bytes are left, and what a kill left behind.

    A process that reads a file which is removed here keeps what it has mapped.
    """
    used = {file: _used(file) for file in folder.glob("*.arrow")}
    total = 0
    for file in sorted(used, key=lambda file: (file.stem != spared, -used[file])):
        total += file.stat().st_size
        if total > MOST and file.stem != spared:
            for suffix in (".json", ".arrow"):
                file.with_suffix(suffix).unlink(missing_ok=True)
    for file in folder.glob("*.part"):
        if file.stat().st_mtime < time.time() - 86400:
            file.unlink(missing_ok=True)


def _used(file: Path) -> float:
    manifest = file.with_suffix(".json")
    return manifest.stat().st_mtime if manifest.exists() else 0.0


def _schema() -> Any:
    import pyarrow as pa

    lists = {name: pa.list_(pa.int32()) for name in ("input_ids", "labels", "earlier")}
    numbers = {"prompt": pa.int32(), "unseen": pa.int64(), "cut": pa.int32(), "supervised": pa.int32()}
    return pa.schema(lists | numbers | {"lost": pa.bool_(), "ended": pa.bool_()})


def batch_of(made: list[Example | None], end: int) -> Any:
    """Write examples as columns; one that was dropped for its length is a row without ids."""
    import pyarrow as pa

    entries = [
        {"input_ids": [], "labels": [], "prompt": 0, "earlier": [], "unseen": 0, "cut": 0, "lost": True,
         "supervised": 0, "ended": False}
        if e is None else
        {"input_ids": e.ids, "labels": e.labels, "prompt": len(e.prompt),
         "earlier": [place for answer in e.earlier for place in answer], "unseen": e.unseen, "cut": e.cut,
         "lost": False, "supervised": e.supervised, "ended": e.completion[-1:] == (end,)}
        for e in made
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(entries, schema=_schema())


def _batches(rows: tuple[Row, ...], tokenizer: PreTrainedTokenizerBase, data: Data) -> Iterator[Any]:
    """Yield columns for piece after piece, in the order of the rows."""
    pieces = (rows[start : start + PIECE] for start in range(0, len(rows), PIECE))
    count = workers()
    if count == 1:
        for piece in pieces:
            yield batch_of(prompts.examples(piece, tokenizer, data), prompts.end(tokenizer))
        return
    with _processes(count, tokenizer, data) as free, ThreadPoolExecutor(count) as threads:
        waiting: deque[Future[Any]] = deque()
        for piece in pieces:
            waiting.append(threads.submit(_ask, free, piece))
            if len(waiting) >= 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def workers() -> int:
    """Count the processes to use: one for each core of `machine.cores`, at most `OMP_NUM_THREADS`."""
    cores = machine.cores()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(asked))) if asked.isdigit() else cores


@contextmanager
def _processes(count: int, tokenizer: PreTrainedTokenizerBase, data: Data) -> Iterator[queue.SimpleQueue[Any]]:
    """Start processes; they are plain commands, so that no script of a person is imported a second time in them."""
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    made = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | QUIET
            )
            made.append(process)
            pickle.dump((tokenizer, data), cast(Any, process.stdin))
            free.put(process)
        yield free
    finally:
        for process in made:
            process.kill()
            process.wait()


def _ask(free: queue.SimpleQueue[Any], piece: tuple[Row, ...]) -> Any:
    """Send a piece to a process that is free, and return its columns; an error there is raised here."""
    process = free.get()
    try:
        pickle.dump(piece, process.stdin)
        process.stdin.flush()
        told = pickle.load(process.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        raise MachineError("a process that tokenises rows died; is memory short?") from error
    finally:
        free.put(process)
    if isinstance(told, BaseException):
        raise told
    return told


def main() -> None:
    """Tokenise the pieces that come in, until there are no more."""
    given, told = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between the answers
    tokenizer, data = pickle.load(given)
    while True:
        try:
            piece = pickle.load(given)
        except EOFError:
            return
        try:
            made: Any = batch_of(prompts.examples(piece, tokenizer, data), prompts.end(tokenizer))
        except Exception as error:  # the process that asked raises it
            made = error
        pickle.dump(made, told)
        told.flush()


if __name__ == "__main__":
    main()
