"""Passes over held-out rows: which rows go together, and fewer of them where memory runs out.

Rows are scored one by one, whoever is beside them, so how many share a pass changes time and memory alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ftexp.errors import out_of_memory
from ftexp.model import compute
from ftexp.progress import say


def batches(lengths: list[int], size: int, spread: float) -> Iterator[list[int]]:
    """Yield row numbers, longest rows first, so that memory peaks at once.

    A batch ends after `size` rows, or where a row is shorter than `spread` times the batch's longest: in a forward
    pass padding costs as much as text. Generation pads once and then steps through all rows together, so there 0.
    """
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    batch: list[int] = []
    for n in order:
        if batch and (len(batch) == size or lengths[n] < spread * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def take(given: Iterable[list[int]], work: Callable[[list[int]], None], most: int | None = None) -> int | None:
    """Work on batches of rows; where memory runs out, on half of them, and on no more from then on.

    Args:
        given: row numbers of each batch.
        work: takes some of a batch. It is called again with fewer after it ran out of memory, so all that it leaves
            behind must be results by row.
        most: rows that are known to fit; None where all of a batch may.

    Returns:
        `most` as it is now.

    Raises:
        Exception: what work raised, unless memory ran out for more than one row.
    """
    for batch in given:
        left = batch
        while left:
            part = left[:most]
            if _fits(work, part):
                left = left[len(part) :]
                continue
            free_memory()
            most = len(part) // 2
            say(f"out of memory: at most {most} rows are scored at a time from now on", always=True)
    return most


def _fits(work: Callable[[list[int]], None], rows: list[int]) -> bool:
    try:
        work(rows)
    except Exception as error:
        if len(rows) == 1 or not out_of_memory(error):
            raise
        return False  # the error, and with it what its frames hold, is gone when the caller goes on
    return True


def free_memory() -> None:
    """Give back what a failed attempt held."""
    import gc

    import torch

    gc.collect()
    compute.give_back_pages()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
