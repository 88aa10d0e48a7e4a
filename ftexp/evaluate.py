"""Scoring of held-out rows, outside any Trainer: token-exact loss, and completions written greedily.

Batch size, padding and order change speed and memory, never a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ftexp import labels, metrics, passes, ranks
from ftexp.config import Eval
from ftexp.data import splits, tokens
from ftexp.data.prompts import Example
from ftexp.data.splits import normalise
from ftexp.progress import progress, warn

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    AnyModel = PreTrainedModel | PeftModel

LOGITS_BYTES = 1 << 30
"""Most memory one forward pass may spend on float32 logits; larger batches are split."""

UNPARSABLE = 0.2
"""Share of completions without content above which a warning is printed."""


@dataclass(frozen=True)
class Scored:
    """Scores of one model on one split."""

    scores: dict[str, float]
    """Metric name without the split -> value."""
    table: list[dict[str, Any]]
    """One entry a row, in the order of the rows: text, nats, tokens, and what was written."""
    labels: list[dict[str, Any]] = field(default_factory=list)
    """One entry a label, where completions are lists of labels."""


@dataclass(frozen=True)
class Seen:
    """What the rows of a run answer; completions are compared with it."""

    completions: frozenset[str] = frozenset()
    """Training completions, normalised: an output that is one of them is a copy."""
    labels: frozenset[str] = frozenset()
    """Labels of training and held-out rows: an output that names none of them is unparsable."""


def seen(train: Sequence[Example], valid: Sequence[Example], how: Eval) -> Seen:
    """Collect what rows answer."""
    learned = [row.completion for row in tokens.rows_of(train)]
    both = [*learned, *(e.row.completion for e in valid)]
    known = [labels.parse(text, how.labels) for text in both] if how.labels else []
    return Seen(frozenset(map(normalise, learned)), frozenset().union(*known))


def score(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], how: Eval, label: str,
    known: Seen = Seen(),
) -> Scored:  # fmt: skip
    """Score a model on rows; its mode is set to evaluation and put back.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        examples: held-out rows.
        how: what to score.
        label: name of the work on the screen.
        known: what the rows of the run answer, for `memorised` and for labels.
    """
    was_training = model.training
    model.eval()
    try:
        table = held_out(model, tokenizer, examples, how, label)
        if how.generate:
            written = generate(model, tokenizer, examples, how, label)
            for entry, text in zip(table, written, strict=True):
                entry |= {"prediction": text} | compare(text, entry["reference"], known, how)
    finally:
        model.train(was_training)
    scores, by_label = summary(table), []
    if how.generate and how.labels is not None:
        truth, named = ([labels.parse(e[side], how.labels) for e in table] for side in ("reference", "prediction"))
        scores |= labels.scores(truth, named, known.labels)
        by_label = labels.table(truth, named, sorted(known.labels))
    if (share := scores.get("unparsable", 0)) > UNPARSABLE:
        warn(f"{share:.0%} of the completions of {label} say nothing that can be scored; they count as wrong")
    return Scored(scores, table, by_label)


def compare(prediction: str, reference: str, known: Seen, how: Eval) -> dict[str, float]:
    """Score one completion. A run reports the mean of each over all rows."""
    told = {
        "exact_match": metrics.exact_match(prediction, reference),
        "jaccard": metrics.jaccard(prediction, reference),
        "f1": metrics.f1(prediction, reference),
        "chrf": metrics.chrf(prediction, reference),
        "rouge_l": metrics.rouge_l(prediction, reference),
        "memorised": metrics.memorised(prediction, known.completions),
        "unparsable": metrics.unparsable(prediction),
    }
    if how.labels is not None:
        truth, named = labels.parse(reference, how.labels), labels.parse(prediction, how.labels)
        told |= {"unparsable": float(not named & known.labels), "subset_accuracy": float(named == truth)}
        told |= {"f1_samples": labels.row(labels.f1, truth, named)}
        told |= {"jaccard_samples": labels.row(labels.jaccard, truth, named)}
    return told


def summary(table: list[dict[str, Any]]) -> dict[str, float]:
    """Compute a split's scores and counts from its per-row table: sums over tokens, means over all rows."""
    nats, tokens = [e["nats"] for e in table], [e["tokens"] for e in table]
    scores = {
        "loss": metrics.loss(nats, tokens),
        "perplexity": metrics.perplexity(nats, tokens),
        "bits_per_byte": metrics.bits_per_byte(nats, [e["bytes"] for e in table]),
    }
    scores |= {name: sum(e[name] for e in table) / len(table) for name in metrics.SCORES if name in table[0]}
    if "prediction" in table[0]:
        written = [e["prediction"] for e in table]
        scores |= {f"distinct_{n}": metrics.distinct(written, n) for n in (1, 2)}
    cut = sum(e["cut"] for e in table)
    return scores | {"rows": float(len(table)), "tokens": float(sum(tokens)), "tokens_cut": float(cut)}


def held_out(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], how: Eval, label: str
) -> list[dict[str, Any]]:
    """Measure each row's negative log-likelihood in nats, summed in float64 over its supervised tokens.

    Several processes share the batches out and all return the whole table.
    """
    import torch

    told: dict[int, float] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), progress(f"{label} loss", len(examples)) as advance:

            def work(part: list[int]) -> None:
                told.update(zip(part, _nats(model, [examples[n] for n in part], _pad(tokenizer)), strict=True))
                advance(len(part))

            passes.take(ranks.mine(list(_batches(examples, how, model))), work)
    finally:
        model.train(was_training)
    whole, units = ranks.gathered(told), splits.units(e.row for e in examples)
    return [
        {"where": e.row.where, "unit": units[n], "prompt": e.row.prompt, "reference": e.row.completion,
         "nats": whole[n], "tokens": e.supervised, "cut": e.cut, "bytes": e.bytes}
        for n, e in enumerate(examples)
    ]  # fmt: skip


def divergence(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], how: Eval, label: str,
    reference: Callable[[], AbstractContextManager[Any]],
) -> list[float]:  # fmt: skip
    """Sum Kullback and Leibler's divergence from a reference over the tokens of each completion, in nats.

    At each token the whole vocabulary is summed, sum of p * (ln p - ln q) with p the model's and q the reference's
    shares: exact, where estimators from the one token that was drawn (k1, k3; Schulman 2020) are not.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        examples: prompts with what the model wrote as their completions.
        how: `batch` of it.
        label: name of the work on the screen.
        reference: makes the model answer as the reference while its block runs.
    """
    import torch

    told = [0.0] * len(examples)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), progress(f"{label} divergence", len(examples)) as advance:

            def work(part: list[int]) -> None:
                rows = [examples[n] for n in part]
                ours = _logits(model, rows, _pad(tokenizer))[0].float().log_softmax(-1)
                with reference():
                    theirs = _logits(model, rows, _pad(tokenizer))[0].float().log_softmax(-1)
                nats = (ours.exp() * (ours - theirs)).double().sum(-1)
                for n, each in zip(part, nats.split([e.supervised for e in rows]), strict=True):
                    told[n] = each.sum().item()
                advance(len(part))

            passes.take(_batches(examples, how, model, 3), work)
    finally:
        model.train(was_training)
    return told


def _batches(examples: Sequence[Example], how: Eval, model: AnyModel, copies: int = 1) -> Iterator[list[int]]:
    """Batch rows, and split a batch whose logits, of which so many copies are held, are above `LOGITS_BYTES`."""
    room = LOGITS_BYTES // (4 * copies * cast(int, model.config.get_text_config().vocab_size))
    for numbers in passes.batches([len(e.ids) for e in examples], how.batch, spread=0.75):
        part: list[int] = []
        for n in numbers:
            if part and sum(examples[m].supervised for m in (*part, n)) > room:
                yield part
                part = []
            part.append(n)
        yield part


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return cast(int, tokenizer.pad_token_id)


def _nats(model: AnyModel, rows: list[Example], pad: int) -> list[float]:
    """Sum of nats over the supervised tokens of each row, in float64."""
    import torch

    logits, targets = _logits(model, rows, pad)
    nats = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double()
    return [part.sum().item() for part in nats.split([e.supervised for e in rows])]


def _logits(model: AnyModel, rows: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run rows through a model, padded on the right; logits and tokens as of `supervised_logits`.

    The prefix that they share is read once.
    """
    import torch

    from ftexp.model import prefix

    width = max(len(e.ids) for e in rows)
    ids = torch.full((len(rows), width), pad)  # (row, position)
    labels = torch.full((len(rows), width), -100)
    for n, e in enumerate(rows):
        ids[n, : len(e.ids)] = torch.tensor(e.ids)
        labels[n, : len(e.ids)] = torch.tensor(e.labels)
    mask = torch.arange(width)[None, :] < torch.tensor([len(e.ids) for e in rows])[:, None]
    first = [next((n for n, label in enumerate(e.labels) if label != -100), len(e.ids)) for e in rows]
    shared = prefix.shared(model, [e.ids for e in rows], min(first) - 1, width)
    ids, mask, labels = (t.to(model.device) for t in (ids, mask.long(), labels))
    past = prefix.before_all(prefix.read(model, ids[0, :shared])) if shared else None
    return supervised_logits(model, ids[:, shared:], mask, labels[:, shared:], past=past)


def supervised_logits(
    model: AnyModel, ids: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor,
    positions: torch.Tensor | None = None, past: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Run a forward pass that projects onto the vocabulary only the positions that predict a supervised token.

    Returns:
        Logits (supervised, vocabulary) and the tokens they should predict (supervised,), row after row.
    """
    told, targets = supervised(model, ids, mask, labels, positions, past)
    return told.logits[0], targets


def supervised(
    model: AnyModel, ids: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor,
    positions: torch.Tensor | None = None, past: Any = None, routed: bool = False,
) -> tuple[Any, torch.Tensor]:  # fmt: skip
    """Run a forward pass as `supervised_logits`, and tell all that the model returns.

    A hook picks those positions in front of the output layer, so whatever a model does behind it (scaling, soft
    caps) is still its own doing.

    Args:
        model: a causal language model, with or without an adapter.
        ids: token ids, (row, position).
        mask: 1 for tokens and 0 for padding, (row, position), with those of `past`; None with `positions`.
        labels: token ids, -100 where not supervised, (row, position); the first position cannot be predicted.
        positions: of packed rows: 0 where a row begins, (row, position). A mask beside it would hide where rows end.
        past: keys and values of what stands in front of every row.
        routed: whether a mixture of experts is to tell the loss of its routers, as `aux_loss`.

    Returns:
        What the model returned, with logits (1, supervised, vocabulary), and the tokens that they should predict
        (supervised,), row after row.
    """
    targets = labels[:, 1:]
    picked = targets != -100
    head: Any = getattr(model, "module", model).get_output_embeddings()  # type: ignore  # DDP wraps it in `module`
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][:, :-1][picked][None], *hidden[1:]))
    try:
        more = {} if positions is None else {"position_ids": positions}
        more |= {} if past is None else {"past_key_values": past}
        more |= {"output_router_logits": True} if routed else {}
        told = model(input_ids=ids, attention_mask=mask, use_cache=False, **more)
    finally:
        hook.remove()
    return told, targets[picked]


def generate(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], how: Eval, label: str
) -> list[str]:
    """Write a completion for each prompt: greedily, until end-of-sequence or the planned length.

    Prompts are padded on the left, so that each continues at its own last token; in float32 a row is then written the
    same alone and in any batch. Models that cannot be told of padding get prompts of one length at a time.
    """
    asked, settings = [e.prompt for e in examples], greedy(model, tokenizer, examples, how)
    return [
        answer(text, opening(tokenizer, e))
        for text, e in zip(write(model, tokenizer, asked, settings, how.batch, label), examples, strict=True)
    ]


def opening(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """Return what the chat template writes before the answer itself, such as the empty thoughts of Qwen3; mostly "".

    It is supervised, as TRL has it, so a trained model writes it too.
    """
    whole = cast(str, tokenizer.decode(list(example.completion), skip_special_tokens=True)).strip()
    told = example.row.completion.strip()
    return whole.removesuffix(told).strip() if told and whole.endswith(told) else ""


def answer(text: str, opening: str) -> str:
    """Take what the template writes before an answer off a completion.

    >>> answer("<think> </think> Ready.", "<think> </think>"), answer(" Ready.", "")
    ('Ready.', ' Ready.')
    """
    return text.strip().removeprefix(opening).lstrip() if opening and text.strip().startswith(opening) else text


def greedy(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], how: Eval
) -> GenerationConfig:
    """Return the settings that completions of held-out rows are written with."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=planned_tokens(examples, how),
        do_sample=False,
        pad_token_id=_pad(tokenizer),
        eos_token_id=ends(model, tokenizer),
    )


def ends(model: AnyModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end a completion: the tokenizer's, and those of the model's own settings."""
    return stops(model.generation_config, tokenizer)  # type: ignore


def stops(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the same tokens of a model that is not in memory, from the settings beside its weights."""
    own = settings.eos_token_id
    return sorted({cast(int, tokenizer.eos_token_id), *(own if isinstance(own, list) else [own])} - {None})


def write(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[int, ...]], settings: GenerationConfig,
    batch: int, label: str, streamer: BaseStreamer | None = None,
) -> list[str]:  # fmt: skip
    """Let a model go on from prompts, as the settings say.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        asked: token ids of each prompt.
        settings: how to choose tokens, and when to stop.
        batch: prompts that are written together.
        label: name of the work on the screen.
        streamer: is told each token as it is written, in place of a bar; with one prompt only.

    Returns:
        What was written, special tokens left out, in the order of the prompts.
    """
    written = continued(model, tokenizer, asked, settings, batch, label, streamer)
    return tokenizer.batch_decode([list(ids) for ids in written], skip_special_tokens=True)


def continued(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[int, ...]], settings: GenerationConfig,
    batch: int, label: str, streamer: BaseStreamer | None = None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Let a model go on from prompts as `write` does, and return token ids, up to the first that ends a completion."""
    import torch

    from ftexp.model import prefix

    written: dict[int, tuple[int, ...]] = {}
    was_training = model.training
    model.eval()
    shown = progress(f"{label} completions", len(asked)) if streamer is None else nullcontext(lambda _: None)
    try:
        with torch.no_grad(), shown as advance:

            def work(part: list[int]) -> None:
                prompts = [asked[n] for n in part]
                shared = prefix.shared(model, prompts, min(map(len, prompts)) - 1, max(map(len, prompts)))
                ids, mask = (x.to(model.device) for x in _left_padded(prompts, _pad(tokenizer), shared))
                written.update(zip(part, _continued(model, ids, mask, shared, settings, streamer), strict=True))
                advance(len(part))

            beside = passes.batches([len(ids) for ids in asked], batch, spread=0 if _sees_positions(model) else 1)
            passes.take(ranks.mine(list(beside)), work)
    finally:
        model.train(was_training)
    whole = ranks.gathered(written)
    return [whole[n] for n in range(len(asked))]


def _continued(
    model: AnyModel, ids: torch.Tensor, mask: torch.Tensor, shared: int, settings: GenerationConfig,
    streamer: BaseStreamer | None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Write rows together, and let those that have ended leave: the passes of the others get smaller.

    Args:
        model: in evaluation mode.
        ids: token ids of prompts, padded on the left, or behind the prefix that they share, (row, position).
        mask: 1 for tokens and 0 for padding, (row, position).
        shared: tokens of each row in front of its padding, which are read once.
        settings: how to choose tokens, and when to stop.
        streamer: of a single prompt.

    Returns:
        What was written after each prompt, up to the first token that ends a completion.
    """
    import torch

    from ftexp.model import prefix

    given: Any = settings.eos_token_id
    ended = {given} if isinstance(given, int) else set(given or ())
    ends = torch.tensor(sorted(ended), dtype=torch.long, device=ids.device)
    width, rows, cache = ids.shape[1], torch.arange(len(ids), device=ids.device), prefix.cache(model)
    written: dict[int, tuple[int, ...]] = {}

    def enough(told: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        done = torch.isin(told[:, width:], ends).any(1)
        return torch.full_like(done, bool(2 * done.sum() >= len(done)))

    if shared:
        cache = prefix.read(model, ids[0, :shared])
        cache.batch_repeat_interleave(len(rows))
    while len(rows):
        left = copy(settings)
        left.max_new_tokens = width + cast(int, settings.max_new_tokens) - ids.shape[1]
        left.return_dict_in_generate = True
        more = {} if cache is None else {"past_key_values": cache, "stopping_criteria": [enough]}
        told = cast(Any, model).generate(
            input_ids=ids, attention_mask=mask, generation_config=left, streamer=streamer, **more
        )
        ids = told.sequences
        over = torch.isin(ids[:, width:], ends).any(1)
        if cache is None or ids.shape[1] - width == settings.max_new_tokens:
            over[:] = True
        for row, text in zip(rows[over].tolist(), ids[over][:, width:].tolist(), strict=True):
            last = next((at for at, token in enumerate(text) if token in ended), len(text) - 1)
            written[row] = tuple(text[: last + 1])
        stay = (~over).nonzero()[:, 0]
        if told.past_key_values is not cache:
            cache = None  # the model took another one in its place: those that stay are read anew
        elif cache is not None and len(stay):
            cache.batch_select_indices(stay)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)[stay]
        rows, ids = rows[stay], ids[stay]
    return [written[n] for n in range(len(written))]


def _sees_positions(model: AnyModel) -> bool:
    """Tell whether a model is told where in its row a token stands, so that padding in front of it does no harm.

    Others (MBart and its kin, MPT, Mamba) take padding for text, or may: their prompts share a batch only with those of
    their own length.
    """
    from inspect import signature

    from ftexp.model import prefix

    return "position_ids" in signature(prefix.bare(model).forward).parameters


def planned_tokens(examples: Sequence[Example], how: Eval) -> int:
    """Return the longest completion to write: as asked, or a quarter beyond the longest reference and 8 tokens."""
    longest = max(len(e.completion) for e in examples)
    return how.max_new_tokens or longest + longest // 4 + 8


def _left_padded(prompts: list[tuple[int, ...]], pad: int, shared: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask (row, position), padded behind the first `shared` tokens of each row."""
    import torch

    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for n, prompt in enumerate(prompts):
        own = width - len(prompt) + shared
        for places, text in ((slice(shared), prompt[:shared]), (slice(own, None), prompt[shared:])):
            ids[n, places], mask[n, places] = torch.tensor(text, dtype=torch.long), 1
    return ids, mask
