"""Whether several adapters train faster in one pass or one by one: seen by the first steps they take."""

from __future__ import annotations

from collections.abc import Callable

Seen = Callable[[list[float], list[float], int | None], bool]
"""Hears of the seconds a token took together and alone, step by step, and of how many fit into a pass where that is not
all; says whether to go on together."""
WARM, COMPARED = 3, 3
"""Steps that warm up, two together and one alone: optimizers make their states, and memory is asked for anew. And steps
of each way that are compared."""
NEEDED = WARM + 2 * COMPARED


class Turns:
    """Takes the first steps of a pack together and one by one in turn, to go on the faster way."""

    def __init__(self, seen: Seen | None, one_by_one: bool = False) -> None:
        """Take what hears of the steps; None where the way to go is known."""
        self._seen = seen
        self._one_by_one = one_by_one
        self._took: list[float] = []

    def _trying(self, left: int) -> bool:
        """Whether ways are compared; not where a pack begins that ends before."""
        return self._seen is not None and (bool(self._took) or left >= NEEDED)

    def most(self, fit: int, left: int) -> int:
        """Say how many members share a pass in the next step, of so many that fit into it, with so many steps left."""
        count = len(self._took)
        alone = count >= WARM - 1 and count % 2 == 0 if self._trying(left) else self._one_by_one
        return 1 if alone else fit

    def took(self, seconds: float, tokens: int, left: int, fit: int | None) -> None:
        """Hear how long that step took, and how many fit into a pass where those are not all."""
        if not self._trying(left):
            return
        self._took.append(seconds / max(1, tokens))
        if len(self._took) == NEEDED or fit == 1:
            seen, self._seen = self._seen, None
            compared = ([], []) if fit == 1 else (self._took[WARM::2], self._took[WARM + 1 :: 2])
            self._one_by_one = seen is not None and not seen(*compared, fit)
