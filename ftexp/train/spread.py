"""The rows of a training over several processes, so that each optimizer step holds those it holds with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from ftexp import ranks
from ftexp.config import Trainer
from ftexp.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


def shape(trainer: Trainer, processes: int) -> tuple[int, int]:
    """Return rows of a forward pass and passes of a step for each process.

    Raises:
        ConfigError: the rows of a step cannot be shared out.
    """
    made = ranks.per_process(trainer.batch, trainer.accumulation, processes)
    if made is None:
        raise ConfigError(
            f"sweep.gpus_per_trial={processes} must divide the rows of a step, trainer.batch={trainer.batch} times "
            f"trainer.accumulation={trainer.accumulation}"
        )
    return made


def blank(rows: Dataset, pad: int) -> Dataset:
    """Append a row without a supervised token: what a process is given where a step has no more rows for it.

    accelerate would give it rows of the epoch's start once more.
    """
    from datasets import Dataset, concatenate_datasets

    values = {"input_ids": [pad, pad], "labels": [-100, -100], "seq_lengths": [2]}
    one = {name: [values[name]] for name in rows.column_names}
    return concatenate_datasets([rows, Dataset.from_dict(one, features=rows.features)])


def sampler(rows: int, size: int, order: Callable[[int], list[int]], begun: int = 0) -> Any:
    """Make a sampler of all processes' rows; accelerate hands out their forward passes in turn.

    In the epoch that a training goes on in, the Trainer wraps it twice, and `set_epoch` does not reach it.

    Args:
        rows: training rows, the blank one aside, which stands behind them.
        size: rows that all processes together take in a forward pass.
        order: takes an epoch, counted from 0, and returns the rows in order.
        begun: the epoch that training begins or goes on in.
    """
    from torch.utils.data import Sampler

    class Spread(Sampler):
        epoch = begun

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return rows + -rows % size

        def __iter__(self):
            return iter([*order(self.epoch), *[rows] * (-rows % size)])

    return Spread()


def own_draws(seed: int) -> None:
    """Have each process draw its own dropout: all were seeded alike, and would drop the same places."""
    if ranks.rank():
        import torch

        torch.manual_seed(seed + ranks.rank())


def is_blank(labels: Any) -> bool:
    """Tell whether a forward pass has nothing to learn from; libraries' own losses divide by zero then."""
    return ranks.count() > 1 and not cast(bool, (labels != -100).any().item())
