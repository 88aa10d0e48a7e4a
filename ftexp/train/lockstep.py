"""Supervised fine-tuning of several adapters of one base in lockstep, by `ftexp.model.packed`.

Each member keeps what is its own: first weights, rows and their order, learning rate and schedule, clipping, AdamW,
generator of dropout and noise, loss, rungs, checkpoints, and its end. Members share forward and backward passes and
nothing else, so on a CPU a member ends with the same bytes alone, in any pack, and whoever leaves before it. A pack of
one is how a single trial is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file

from ftexp import metrics, passes
from ftexp.config import Run, Trainer
from ftexp.data import splits
from ftexp.data.prompts import Example
from ftexp.errors import Diverged, HandedOver, OutOfTime, Pruned, out_of_memory
from ftexp.model import Base
from ftexp.model.attention import Row
from ftexp.model.packed import Adapter, Layout, Pack, Weights, check_alike, lay_out, learned, nats
from ftexp.progress import progress, say
from ftexp.train import sft
from ftexp.train.checkpoints import Store
from ftexp.train.control import Control, Recorded, Report, Rung, Share, at_work, left
from ftexp.train.turns import Turns

FILE = "member.safetensors"
"""What a checkpoint holds."""
WORTH_SECONDS = 10.0
"""Training that is left of a pack from which on members are handed over: another process goes on with one in two to
four seconds, where it has the base."""


@dataclass(frozen=True, eq=False)
class Member:
    """A trial that is ready to train."""

    run: Run
    base: Base
    rows: Sequence[Example]
    """Training rows."""
    valid: Sequence[Example]
    """Held-out rows of the curve."""
    start: Weights
    """First weights of its adapter."""
    scales: dict[str, float]
    """Name of a layer -> scale of its update."""
    kept: Store
    """Its checkpoints, and the one to go on from."""
    report: Report
    """Called with `train/loss`, `train/lr`, `train/grad_norm` every step and `valid/loss` at the rungs."""
    control: Control
    """What may end its training early."""


@dataclass(frozen=True, eq=False)
class Learned:
    """What came of a member."""

    weights: Weights
    """Of its adapter when it ended, float32."""
    steps: int
    """Optimizer steps it took."""
    loss: float
    """Training loss of the last one."""
    tokens: int
    """Tokens of its rows that went through the model."""
    pack: int
    """Most members that shared a pass with it, itself included."""
    ended: BaseException | None
    """Why it ended before its last step."""


@dataclass(eq=False)
class _Trial:
    """A member while it trains."""

    member: Member
    weights: Weights
    """Trained, float32."""
    adapter: Adapter
    """The weights in the format of the base; the same tensors where that is theirs."""
    optimizer: torch.optim.AdamW
    rate: Any
    """Step -> share of the peak learning rate."""
    steps: int
    batches: Iterator[list[list[Example]]]
    """Rows of each forward pass of each optimizer step."""
    step: int = 0
    tokens: int = 0
    loss: float = math.nan
    pack: int = 1
    dead: int = 0
    """Steps in a row without any gradient."""
    fit: int | None = None
    """Held-out rows that fit into a pass; None where all of a batch do."""
    saved: float = field(default_factory=time.monotonic)
    now: list[list[Example]] = field(default_factory=list)
    """Forward passes of the step under way."""
    gradients: list[torch.Tensor] | None = None
    """Sum over the passes of the step so far, float32."""
    nats: float = 0.0
    """Sum over the supervised tokens of those passes."""
    held_out: Rung = field(default_factory=lambda: Rung(math.nan))
    ended: BaseException | None = None

    @property
    def over(self) -> bool:
        """Whether it takes no further step."""
        return self.ended is not None or self.step == self.steps

    def told(self) -> Learned:
        """Return what came of it."""
        weights = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in self.weights.items()}
        return Learned(weights, self.step, self.loss, self.tokens, self.pack, self.ended)


def train(
    members: Sequence[Member], turns: Turns | None = None, share: Share | None = None
) -> Iterator[tuple[int, Learned]]:
    """Train members in lockstep, and hand each out as it ends, while the others wait.

    The base is free of adapters while one is handed out. Where memory runs out, fewer members share a pass, which
    changes no bit; a member that does not fit alone ends with that error.

    Args:
        members: at least one; all of one base.
        turns: says which steps are taken in one pass, and which one by one. Without it all are in one.
        share: asks for half of the members while they train; those end with `HandedOver` and a checkpoint.

    Yields:
        The number of a member and what came of it.

    Raises:
        ConfigError: the base computes something that the pass does not, or draws dropout of its own.
    """
    base = members[0].base
    _check(base, members[0].rows, len(members))  # before any adapter is there
    trials = {n: _begun(member) for n, member in enumerate(members)}
    together = len(trials)
    while trials:
        running, wished = [t for t in trials.values() if not t.over], False
        if running:
            began, before = time.monotonic(), [t.step for t in running]
            together = _until_one_ends(base, running, together, turns, share)
            if wished := share is not None and share.wished:
                took = max(t.step - step for t, step in zip(running, before, strict=True))
                pace = (time.monotonic() - began) / max(1, took)
                _hand_over([t for t in running if not t.over], pace)
        for number in [n for n, trial in trials.items() if trial.over]:
            ended = trials.pop(number)
            waiting = time.monotonic()
            yield number, ended.told()
            for trial in trials.values():
                trial.member.kept.began += time.monotonic() - waiting
        if wished and share is not None:
            share.dealt.set()


def _hand_over(trials: list[_Trial], pace: float) -> None:
    """End every second member that has enough to do at `pace` seconds a step, the longest stays, at a checkpoint."""
    worth = [t for t in trials if (t.steps - t.step) * pace >= WORTH_SECONDS]
    for trial in sorted(worth, key=lambda t: t.step - t.steps)[1::2]:
        try:
            _save(trial)
        except Exception as error:  # it goes on here
            say(f"a trial is not handed over, its checkpoint cannot be written: {error}", always=True)
        else:
            trial.ended = HandedOver(f"handed over at step {trial.step} of {trial.steps}")


_alike: set[tuple[str, bool]] = set()


def _check(base: Base, rows: Sequence[Example], count: int) -> None:
    """Compare the pass with the model's own, once for a base alone and once for packs."""
    if (key := (base.weights, count > 1)) not in _alike:
        few = sorted((rows[n].ids for n in range(min(3, len(rows)))), key=len)
        check_alike(base.model, few, cast(int, base.tokenizer.pad_token_id), count)
        _alike.add(key)


def _begun(member: Member) -> _Trial:
    """Set a member up at its first step, or where its checkpoint left it."""
    run, device = member.run, member.base.model.device
    member.kept.began = time.monotonic()
    weights = {name: tuple(w.to(device).clone().requires_grad_() for w in pair) for name, pair in member.start.items()}
    draw = torch.Generator(device).manual_seed(run.seed)
    dtype = member.base.model.dtype
    copies = {name: tuple(_copy(w, dtype) for w in pair) for name, pair in weights.items()}
    optimizer = torch.optim.AdamW(
        [w for pair in weights.values() for w in pair],
        lr=run.trainer.lr, weight_decay=run.trainer.weight_decay, fused=True,
    )  # fmt: skip
    steps = sft.planned_steps(run.trainer, len(member.rows))
    trial = _Trial(
        member, cast(Weights, weights),
        Adapter(cast(Weights, copies), member.scales, run.lora.dropout, draw, bool(run.trainer.neftune)),
        optimizer, schedule(run.trainer, steps), steps, batches(member.rows, run.trainer, run.seed),
    )  # fmt: skip
    if member.kept.resume is not None:
        _restore(trial, member.kept.resume.step, load_file(member.kept.resume.folder / FILE, device=str(device)))
    return trial


def _copy(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight if weight.dtype == dtype else weight.detach().to(dtype).requires_grad_()


def schedule(trainer: Trainer, steps: int) -> Any:
    """Return transformers' function from the number of a step, from 0, to the share of the peak learning rate."""
    from transformers import get_scheduler

    dummy = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = math.ceil(steps * trainer.warmup)
    made: Any = get_scheduler(trainer.scheduler.value, dummy, num_warmup_steps=warmup, num_training_steps=steps)
    return made.lr_lambdas[0]


def batches(rows: Sequence[Example], trainer: Trainer, seed: int) -> Iterator[list[list[Example]]]:
    """Yield, for each optimizer step, the rows of its forward passes, as the Trainer draws them.

    The last step of an epoch may hold fewer passes, and its last pass fewer rows.
    """
    for order in sft.orders(len(rows), trainer, seed):
        passes = [order[begin : begin + trainer.batch] for begin in range(0, len(order), trainer.batch)]
        for begin in range(0, len(passes), trainer.accumulation):
            yield [[rows[n] for n in numbers] for numbers in passes[begin : begin + trainer.accumulation]]


def _until_one_ends(base: Base, trials: list[_Trial], together: int, turns: Turns | None, share: Share | None) -> int:
    """Take steps until a member has none left, ends early or is wished for; return how many members fit into a pass."""
    pack = Pack(base.model, len(trials))
    left = max(t.steps - t.step for t in trials)
    label = f"training {left} steps" + (f" of {len(trials)} trials" if len(trials) > 1 else "")
    with pack.on({name for t in trials for name in t.weights}), at_work(), progress(label, left) as advance:
        while not any(t.over for t in trials):
            began = time.monotonic()
            together = _stepped(base, pack, trials, together, turns)
            together = _rungs(base, pack, [t for t in trials if t.ended is None], together)
            for trial in trials:
                trial.member.kept.began += (time.monotonic() - began) * (1 - 1 / len(trials))
                _look(trial)
            advance(1, f"loss {min(t.loss for t in trials):.3f}")
            if share is not None and share.wished:
                break
    return together


def _stepped(base: Base, pack: Pack, trials: list[_Trial], together: int, turns: Turns | None) -> int:
    """Take one optimizer step of each member, as many in a pass as it is the turn of; return how many fit into one."""
    if turns is None or len(trials) == 1:
        return _step(base, pack, trials, together)
    left, before, began = max(t.steps - t.step for t in trials), sum(t.tokens for t in trials), time.perf_counter()
    most = turns.most(together, left)
    fit = _step(base, pack, trials, most)
    fit = together if most < together else fit
    tokens = sum(t.tokens for t in trials) - before
    turns.took(time.perf_counter() - began, tokens, left, fit if fit < len(trials) else None)
    return fit


def _step(base: Base, pack: Pack, trials: list[_Trial], together: int) -> int:
    """Take one optimizer step of each member, and report it."""
    for trial in trials:
        trial.now, trial.gradients, trial.nats = next(trial.batches), None, 0.0
    for number in range(max(len(t.now) for t in trials)):
        taking = [t for t in trials if number < len(t.now)]
        together = _in_turn(taking, together, partial(_pass, base, pack, number))
    for trial in trials:
        if trial.ended is None:
            _update(trial)
    return together


def _in_turn(trials: list[_Trial], together: int, work: Callable[[list[_Trial]], None]) -> int:
    """Do work with as many members at a time as fit into memory, and return how many that are.

    A member that does not fit alone has ended.
    """
    left = [t for t in trials if t.ended is None]
    while left:
        some = left[:together]
        drawn = [t.adapter.draw.get_state() for t in some]
        try:
            work(some)
        except Exception as error:
            if not out_of_memory(error):
                raise
            for trial, state in zip(some, drawn, strict=True):
                trial.adapter.draw.set_state(state)
                _drop_gradients(trial)
            if len(some) > 1:
                together = len(some) // 2
                say(f"out of memory: at most {together} trials share a pass from now on", always=True)
                continue
            some[0].ended = error
        left = left[len(some) :]
    return together


def _drop_gradients(trial: _Trial) -> None:
    for weight in _flat(trial.adapter.weights):
        weight.grad = None


def _pass(base: Base, pack: Pack, number: int, trials: list[_Trial]) -> None:
    """Add the gradients of one forward pass of each member to those before it in the step."""
    rows = [t.now[number] for t in trials]
    given = [(t.adapter, [_read(e) for e in mine]) for t, mine in zip(trials, rows, strict=True)]
    layout = lay_out(given, _pad(base), base.model.device, True)
    hidden = pack.hidden(layout, _noise(base, trials, layout, number))
    gradient, found = torch.zeros_like(hidden), []
    for trial, mine, places in zip(trials, rows, layout.own, strict=True):
        where, targets = _supervised(mine, places, hidden.device)
        nats, slopes = learned(base.model, hidden[0, where].detach(), targets, _tokens(trial))
        each = [e.supervised for e in mine]
        for here, slope in zip(where.split(each), slopes.split(each), strict=True):
            gradient[0, here] += slope  # a token of a prefix may be supervised in several rows
        found.append(nats.sum().item())
    hidden.backward(gradient)
    sums = [_summed(trial) for trial in trials]  # of all before any is kept: memory may still run out
    for trial, mine, nats, gradients in zip(trials, rows, found, sums, strict=True):
        _drop_gradients(trial)
        trial.gradients = gradients
        trial.nats += nats
        trial.tokens += sum(len(e.ids) for e in mine)
        trial.pack = max(trial.pack, len(trials))


def _summed(trial: _Trial) -> list[torch.Tensor]:
    """Add the gradients of the pass that was just made to those of the passes before it."""
    found = [cast(torch.Tensor, w.grad) for w in _flat(trial.adapter.weights)]
    fresh = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in found]
    return fresh if trial.gradients is None else [a + b for a, b in zip(trial.gradients, fresh, strict=True)]


def _flat(weights: Weights) -> list[torch.Tensor]:
    return [w for pair in weights.values() for w in pair]


def _pad(base: Base) -> int:
    return cast(int, base.tokenizer.pad_token_id)


def _tokens(trial: _Trial) -> int:
    """Count the supervised tokens of the step under way, over all its passes: what its loss is a mean over."""
    return max(1, sum(e.supervised for rows in trial.now for e in rows))


def _read(row: Example) -> list[int]:
    """Return the tokens that a pass reads: the last one of a row is predicted, and nothing after it."""
    return row.ids[:-1] or row.ids


def _supervised(rows: Sequence[Example], places: Sequence[Row], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions that predict a supervised token, and those tokens."""
    where, targets = [], []
    for row, lies in zip(rows, places, strict=True):
        labels = row.labels[1:]
        mine = [n for n, label in enumerate(labels) if label != -100]
        where += [lies.place(n) for n in mine]
        targets += [labels[n] for n in mine]
    return torch.tensor(where, dtype=torch.long, device=device), torch.tensor(targets, dtype=torch.long, device=device)


def _noise(base: Base, trials: list[_Trial], layout: Layout, number: int) -> dict[int, torch.Tensor]:
    """Draw NEFTune's noise of each member on the embeddings of its rows.

    Uniform within alpha / sqrt(longest row * width), arXiv:2310.05914, drawn for a padded batch as transformers does.
    """
    made: dict[int, torch.Tensor] = {}
    width = cast(Any, base.model.get_input_embeddings()).weight.shape[1]
    for trial, places in zip(trials, layout.own, strict=True):
        alpha, rows = trial.member.run.trainer.neftune, trial.now[number]
        if not alpha:
            continue
        longest = max(len(e.ids) for e in rows)
        most = alpha / math.sqrt(longest * width)
        drawn = torch.empty(len(rows), longest, width, device=layout.ids.device)
        drawn.uniform_(-most, most, generator=trial.adapter.draw)
        for row, lies, mine in zip(rows, places, drawn, strict=True):
            made[lies.begin] = mine[: len(_read(row))].to(base.model.dtype)
    return made


def _update(trial: _Trial) -> None:
    """Clip the gradients of a member, move its weights, and report the step."""
    trainer, weights = trial.member.run.trainer, _flat(trial.weights)
    for weight, gradient in zip(weights, cast(list, trial.gradients), strict=True):
        weight.grad = gradient.to(weight.dtype)
    norm = torch.nn.utils.clip_grad_norm_(weights, trainer.max_grad_norm or math.inf).item()
    rate = trainer.lr * trial.rate(trial.step)
    for group in trial.optimizer.param_groups:
        group["lr"] = rate
    trial.optimizer.step()
    trial.optimizer.zero_grad()
    _refresh(trial)
    trial.step += 1
    trial.loss = trial.nats / _tokens(trial)
    told = {"train/loss": trial.loss, "train/grad_norm": norm, "train/lr": rate}
    trial.dead = trial.dead + 1 if norm == 0.0 else 0
    for name, value in told.items():
        if not math.isfinite(value):
            trial.ended = Diverged(f"diverged at step {trial.step}: {name} is {value}")
            return
    if trial.dead == sft.DEAD_STEPS:
        trial.ended = Diverged(f"diverged at step {trial.step}: no gradient for {sft.DEAD_STEPS} steps")
        return
    with _own(trial):
        trial.member.report(told, trial.step)


@contextmanager
def _own(trial: _Trial) -> Iterator[None]:
    """Take an error in what a member alone does, its reports, its judge or its checkpoint, for its end alone."""
    try:
        yield
    except Exception as error:
        trial.ended = error


def _refresh(trial: _Trial) -> None:
    """Bring the weights into the format of the base, where that is another."""
    weights, copies = _flat(trial.weights), _flat(trial.adapter.weights)
    if weights[0] is not copies[0]:
        with torch.no_grad():
            torch._foreach_copy_(copies, weights)


def _rungs(base: Base, pack: Pack, trials: list[_Trial], together: int) -> int:
    """Score the held-out rows of the members that stand at a rung, and ask their judges."""
    due = []
    for trial in trials:
        every = trial.member.run.trainer.report_steps
        due += [trial] if trial.member.control.due(trial.step, every, trial.steps) else []
    together = _curve(base, pack, due, together)
    for trial in (t for t in due if t.ended is None):
        if not math.isfinite(trial.held_out.loss):
            trial.ended = Diverged(f"diverged at step {trial.step}: valid/loss is {trial.held_out.loss}")
            continue
        with _own(trial):
            trial.member.report({"valid/loss": trial.held_out.loss}, trial.step)
            if isinstance(judge := trial.member.control.judge, Recorded):
                judge.tell(trial.held_out, trial.step)
    for trial in (t for t in due if t.ended is None):
        judge = trial.member.control.judge
        with _own(trial):
            if judge is not None and (reason := judge(trial.held_out, trial.step)) is not None:
                trial.ended = Pruned(reason)
    return together


def _curve(base: Base, pack: Pack, trials: list[_Trial], together: int) -> int:
    """Take the held-out loss of each member."""
    told = {t: [0.0] * len(t.member.valid) for t in trials}
    parts = {t: list(passes.batches([len(e.ids) for e in t.member.valid], t.member.run.eval.batch, 0.75))
             for t in trials}  # fmt: skip

    def batch(number: int, some: list[_Trial]) -> None:
        if len(some) == 1:
            trial = some[0]
            trial.fit = passes.take([parts[trial][number]], lambda numbers: score(some, [numbers]), trial.fit)
        else:
            score(some, [parts[t][number] for t in some])

    def score(some: list[_Trial], numbers: list[list[int]]) -> None:
        rows = [[t.member.valid[n] for n in mine] for t, mine in zip(some, numbers, strict=True)]
        given = [(t.adapter, [_read(e) for e in mine]) for t, mine in zip(some, rows, strict=True)]
        layout = lay_out(given, _pad(base), base.model.device, False)
        with torch.no_grad():
            hidden = pack.hidden(layout, {})
            for trial, their, mine, places in zip(some, numbers, rows, layout.own, strict=True):
                where, targets = _supervised(mine, places, hidden.device)
                each = nats(base.model, hidden[0, where], targets).split([e.supervised for e in mine])
                for n, part in zip(their, each, strict=True):
                    told[trial][n] = part.sum().item()

    for number in range(max(map(len, parts.values()), default=0)):
        together = _in_turn([t for t in trials if number < len(parts[t])], together, partial(batch, number))
    for trial in trials:
        tokens = [e.supervised for e in trial.member.valid]
        units = splits.units(e.row for e in trial.member.valid)
        trial.held_out = Rung(metrics.loss(told[trial], tokens), told[trial], tokens, units)
    return together


def _look(trial: _Trial) -> None:
    """End a member that is out of time or asked to leave, and write its checkpoint where one is due."""
    asked, minutes = trial.member.control, trial.member.run.trainer.checkpoint_minutes
    if trial.over:
        return
    if asked.deadline is not None and time.monotonic() > asked.deadline:
        trial.ended = OutOfTime(f"ran out of time at step {trial.step} of {trial.steps}")
        return
    if asked.leave.is_set():
        trial.ended = left(f"asked to leave at step {trial.step} of {trial.steps}")
    due = minutes is not None and time.monotonic() - trial.saved >= 60 * minutes
    if due or trial.ended is not None:
        with _own(trial):
            _save(trial)


def _save(trial: _Trial) -> None:
    kept = trial.member.kept
    folder = kept.folder / f"checkpoint-{trial.step}"
    folder.mkdir(parents=True, exist_ok=True)
    state = {"draw": trial.adapter.draw.get_state(), "tokens": torch.tensor(trial.tokens)}
    for name, weight in _named(trial):
        state[name] = weight.detach()
        state |= {f"{name} {key}": value for key, value in trial.optimizer.state[weight].items()}
    save_file(state, folder / FILE)
    kept.seal(trial.step)
    trial.saved = time.monotonic()


def _restore(trial: _Trial, step: int, state: dict[str, torch.Tensor]) -> None:
    """Take a member to where its checkpoint left it."""
    trial.step, trial.tokens = step, int(state["tokens"])
    trial.adapter.draw.set_state(state["draw"].cpu())
    for name, weight in _named(trial):
        weight.data.copy_(state[name])
        trial.optimizer.state[weight] = {
            key: state[f"{name} {key}"] for key in ("step", "exp_avg", "exp_avg_sq")
        }  # fmt: skip
    _refresh(trial)
    trial.batches = islice(trial.batches, step, None)


def _named(trial: _Trial) -> Iterator[tuple[str, torch.Tensor]]:
    for name, (a, b) in trial.weights.items():
        yield f"{name}.A", a
        yield f"{name}.B", b
