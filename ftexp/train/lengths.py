"""What a forward pass holds, rows of unequal length being what they are: padding, groups of like length, or packs.

Packs are TRL's. In a pack of whole rows (`bfd`) positions begin again with each row and there is no attention mask:
from that transformers masks every row from the others. A mask of ones beside it, or a key-value cache, would switch
that off without a word, so the model at hand is asked before training whether rows in a pack stay apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftexp import evaluate
from ftexp.config import Data, Packing
from ftexp.data.prompts import Example
from ftexp.data.tokens import Tokens
from ftexp.errors import ConfigError, DataError
from ftexp.progress import warn

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

APART = 0.02
"""Most that a row's logits may change in a pack, as a share of what they change when it sees the row before it."""


def dataset(rows: Sequence[Example]) -> Dataset:
    """Return rows as TRL takes them: token ids, and labels that are -100 where not supervised."""
    from datasets import Dataset

    if isinstance(rows, Tokens):
        return rows.dataset()
    return Dataset.from_list([{"input_ids": e.ids, "labels": e.labels} for e in rows])


def packed(rows: Dataset, data: Data, quiet: bool = False) -> Dataset:
    """Pack rows as `data.packing` says; `seq_lengths` of a pack are the lengths of its rows.

    `quiet` leaves out the warning of what `wrapped` does to rows.

    Raises:
        DataError: tokens went missing.
    """
    import datasets
    from trl import pack_dataset

    if data.packing is Packing.none:
        return rows
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        how = {"keep_in_memory": True, "load_from_cache_file": False}
        made = pack_dataset(rows, data.max_length, data.packing.value, how)
        before, after = _count(rows), _count(made)
        if data.packing is Packing.wrapped:
            made = made.map(_beheaded, load_from_cache_file=False, keep_in_memory=True)
    finally:
        if not shown:
            datasets.enable_progress_bars()
    if data.packing is Packing.wrapped and not quiet:
        _warn(rows, made, data)
    if before != after:
        raise DataError(f"data.packing={data.packing.value} lost tokens: {before} (all, supervised) became {after}")
    return made


def units(rows: Sequence[Example], data: Data) -> int:
    """Count what `trainer.batch` counts: rows, or packs of rows."""
    return len(rows) if data.packing is Packing.none else len(packed(dataset(rows), data, quiet=True))


def _count(rows: Dataset) -> tuple[int, int]:
    """Count tokens and supervised tokens."""
    import numpy as np

    chunks: list[Any] = rows.with_format("arrow")[:]["labels"].chunks  # type: ignore
    flat = [chunk.flatten().to_numpy() for chunk in chunks]
    return sum(map(len, flat)), sum(int(np.count_nonzero(part != -100)) for part in flat)


def _beheaded(pack: dict[str, Any]) -> dict[str, Any]:
    """Take the first label of a pack away: nothing comes before it, so it cannot be predicted, nor counted."""
    return {"labels": [-100, *pack["labels"][1:]]}


def _warn(rows: Dataset, packs: Dataset, data: Data) -> None:
    import numpy as np

    ends = np.cumsum([len(ids) for ids in rows["input_ids"]])
    borders = np.cumsum([len(ids) for ids in packs["input_ids"]])[:-1]
    torn = len(np.unique(np.searchsorted(ends, np.setdiff1d(borders, ends))))
    lost = _count(rows)[1] - _count(packs)[1]
    warn(
        f"data.packing=wrapped tears {torn} of {len(rows)} rows at every {data.max_length} tokens, lets rows "
        f"see those before them, and {lost} supervised tokens begin a pack and are not learned; data.packing=bfd does "
        "none of this"
    )


def collate(packs: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Make a batch of packs, (pack, position) each: ids, labels, and positions that begin again with every row.

    Padding stands at position 0 throughout, so every piece of it is a row of its own that nothing sees. TRL's own
    collator lays all packs of a batch behind each other, which without flash attention costs the square of the batch.
    """
    import torch

    width = max(len(pack["input_ids"]) for pack in packs)
    made = {name: torch.full((len(packs), width), fill)
            for name, fill in (("input_ids", pad), ("labels", -100), ("position_ids", 0))}  # fmt: skip
    for n, pack in enumerate(packs):
        length = len(pack["input_ids"])
        made["input_ids"][n, :length] = torch.tensor(pack["input_ids"])
        made["labels"][n, :length] = torch.tensor(pack["labels"])
        made["position_ids"][n, :length] = torch.cat([torch.arange(rows) for rows in pack["seq_lengths"]])
    return made


def check_apart(model: Any, packs: Dataset) -> None:
    """Refuse a model in which the rows of a pack see each other, by its answers to a pack of the run.

    Raises:
        ConfigError: the logits of a row depend on what stands before it in the pack.
    """
    shared = next((n for n, rows in enumerate(packs["seq_lengths"]) if len(rows) > 1), None)
    if shared is None:
        return
    apart, seeing = contamination(model, packs[shared]["input_ids"], packs[shared]["seq_lengths"])
    if apart > APART * seeing:
        raise ConfigError(
            f"data.packing=bfd needs a model that keeps the rows of a pack apart: here the logits of a row change by "
            f"{apart:.2g} in a pack, and by {seeing:.2g} where it sees the row before it; use data.packing=none"
        )


def contamination(model: Any, ids: list[int], rows: list[int]) -> tuple[float, float]:
    """Compare the logits of the second row of a pack with those of the row alone.

    Returns:
        The greatest difference in the pack as it is trained on, and where positions run on through both rows.
    """
    import torch

    first, both = rows[0], rows[0] + rows[1]
    device, was_training = model.device, model.training
    model.eval()

    def logits(tokens: list[int], places: list[int]) -> torch.Tensor:
        text, where = (torch.tensor([numbers], device=device) for numbers in (tokens, places))
        # Labels that are all supervised ask for every position but the last.
        return evaluate.supervised_logits(model, text, None, text, where)[0][-(rows[1] - 1) :].float()

    try:
        with torch.no_grad():
            alone = logits(ids[first:both], list(range(rows[1])))
            reset = logits(ids[:both], [*range(first), *range(rows[1])])
            running = logits(ids[:both], list(range(both)))
    finally:
        model.train(was_training)
    return tuple((other - alone).abs().max().item() for other in (reset, running))  # type: ignore


def sampler(usual: Any, seed: int) -> Any:
    """Make transformers' sampler of rows of like length draw from the seed and the epoch alone.

    Its own order follows from all that was drawn before, so that a training that goes on from a checkpoint would draw
    another one.
    """
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class Seeded(LengthGroupedSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self):
            return iter(grouped(self.lengths, self.batch_size, seed, self.epoch))

    return Seeded(usual.batch_size, lengths=usual.lengths)


def grouped(lengths: Sequence[int], step: int, seed: int, epoch: int) -> list[int]:
    """Order rows so that those of like length share an optimizer step.

    Args:
        lengths: tokens of each row.
        step: rows of an optimizer step.
        seed: of the trainer.
        epoch: counted from 0.
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    drawn = random.Random(f"{seed} {epoch}").getrandbits(32)  # more bits torch would cut off
    return get_length_grouped_indices(list(lengths), step, generator=torch.Generator().manual_seed(drawn))
