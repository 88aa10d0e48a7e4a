"""Probes of the stack at hand: versions, disk, locks, store, and whether training and scoring compute what they say.

Each measures one thing and returns a `Finding` with the figure and, where it is bad, a remedy. `quick` is the part that
every sweep starts with; `ftexp doctor` runs all of them. What libraries do is asked of the tiny model, through the code
that trains and scores every run; what a model does (padding, packs) is asked of that model in `ftexp doctor`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftexp import config, data, estimate, evaluate, experiment, facts, files, metrics, model, track
from ftexp.config import (
    Attention,
    Dtype,
    Eval,
    Format,
    Kind,
    Method,
    Model,
    Packing,
    Quant,
    Run,
    Scheduler,
    Tracker,
    Trainer,
)
from ftexp.data import prompts
from ftexp.data.prompts import Example
from ftexp.data.shapes import Row
from ftexp.errors import MachineError
from ftexp.model import Base, compute
from ftexp.train import answers, checkpoints, lengths, sft
from ftexp.train.control import Control, Rung

if TYPE_CHECKING:
    from peft import PeftModel

GIB = 2**30
FLOORS = {
    "hydra-core": ("1.3.8", "CVE-2026-68508, CVE-2026-106439"),
    "transformers": ("5.3.0", "CVE-2026-4372, CVE-2026-5241, CVE-2026-1839"),
    "torch": ("2.10.0", "CVE-2025-32434, CVE-2026-24747"),
    "datasets": ("5.2.0", "CVE-2026-57845"),
    "accelerate": ("1.15.0", "CVE-2026-69112"),
    "mlflow": ("3.16.0", "CVE-2026-0545, CVE-2026-2614, CVE-2026-4137, CVE-2026-64849"),
}
"""First version of a library in which the attacks behind it no longer work."""
LEAST = GIB // 4
"""Bytes of free disk below which nothing is started."""
LOW = 2 * GIB
"""Bytes of free disk below which the fast part warns; `ftexp doctor` counts what the trials write."""
SAMPLE = 1000
"""Rows whose tokens are looked at."""
EXACT = 1e-6
"""Most that a weight may differ after one step, at once or accumulated: float32 sums in another order."""
CLOSE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""Most that the loss of a row may depend on the rows beside it, in nats a token, by the format of the weights."""
HEADS = {
    Method.classify: ("classifier", "labels of whole texts"),
    Method.reward: ("reward model", "pairs of whole answers"),
}
"""Methods whose model writes nothing: what it is, and what it learns from."""
ENDS = 0.95
"""Least share of rows whose end-of-sequence token is supervised."""
PINNED = "use the pinned versions (requirements.lock)"


class State(Enum):
    """What a probe found."""

    ok = "ok"
    """As it should be."""
    warn = "warn"
    """Runs, with the consequence that is told."""
    fail = "FAIL"
    """Results would be wrong, or nothing can run."""


@dataclass(frozen=True)
class Finding:
    """Result of one probe."""

    name: str
    state: State
    told: str
    """The figure."""
    remedy: str = ""
    """What to do, where there is something to do."""


def _judged(name: str, good: bool, told: str, remedy: str, bad: State = State.fail) -> Finding:
    return Finding(name, State.ok if good else bad, told, "" if good else remedy)


def versions() -> Finding:
    """Compare libraries with the first versions in which known attacks no longer work."""
    from importlib.metadata import version

    from packaging.version import Version

    have = {name: version(name) for name in FLOORS}
    old = [name for name, (floor, _) in FLOORS.items() if Version(have[name]) < Version(floor)]
    told = ", ".join(f"{name} {have[name]} is below {FLOORS[name][0]} ({FLOORS[name][1]})" for name in old)
    wanted = " ".join(f"'{name}>={FLOORS[name][0]}'" for name in old)
    good = f"{len(FLOORS)} libraries at or above the versions that known attacks need fixed"
    return _judged("versions", not old, told or good, f"pip install {wanted}")


def disk(folder: Path, needed: int = 0) -> Finding:
    """Compare free disk, where the trials and the cache are written, with what is needed there in bytes."""
    free = {str(place): shutil.disk_usage(_there(place)).free for place in (folder, files.cache())}
    least = min(free.values())
    told = f"{least / GIB:.2f} GiB free" + (f", the trials write {needed / GIB:.2f} GiB" if needed else "")
    remedy = f"free space at {min(free, key=lambda place: free[place])}, or set FTEXP_CACHE to another disk"
    if least < max(LEAST, needed):
        return Finding("disk", State.fail, told, remedy)
    return _judged("disk", least >= max(LOW, 2 * needed), told, remedy, State.warn)


def _there(path: Path) -> Path:
    """Return the first folder of a path that exists, from its end."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def folders(folder: Path) -> Finding:
    """Write, flush, lock, rename and remove a file where trials, their record and the cache are written.

    A file that another process holds must not be lockable: on some network disks a lock holds nobody back, and two
    workers would take one trial.
    """
    began = time.perf_counter()
    for place in {_there(folder), _there(files.cache())}:
        try:
            reason = _unfit(place)
        except OSError as error:
            reason = f"cannot be written: {error.strerror or error}"
        if reason:
            return Finding("folders", State.fail, f"{place} {reason}", "choose another working folder or FTEXP_CACHE")
    return Finding("folders", State.ok, f"written, locked and renamed in {1000 * (time.perf_counter() - began):.0f} ms")


def _unfit(place: Path) -> str:
    """Tell why a folder cannot hold a record; an empty text where it can."""
    with tempfile.TemporaryDirectory(prefix=".ftexp-", dir=place) as scratch:
        path = Path(scratch) / "a"
        with path.open("w") as one, path.open("w") as other:
            one.write("x")
            one.flush()
            os.fsync(one.fileno())
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                path.rename(path.with_name("b"))
                return "" if path.with_name("b").read_text() == "x" else "does not keep what is written"
        return "does not lock: two processes hold one lock"


def tracking(run: Run) -> Finding:
    """Open the tracking store, or see that a local one can be made."""
    how = run.track
    if how.kind is Tracker.none:
        return Finding("tracking", State.ok, "off")
    if how.uri.startswith(track.SQLITE) and not Path(how.uri.removeprefix(track.SQLITE)).exists():
        place = _there(Path(how.uri.removeprefix(track.SQLITE)).parent)
        good = os.access(place, os.W_OK)
        return _judged("tracking", good, f"{how.uri} will be made", f"make {place} writable, or set track.uri")
    began = time.perf_counter()
    try:
        track.store(how)
    except track.Unreachable as error:
        return Finding(
            "tracking", State.warn, str(error), "start it; until then runs keep their files, then ftexp sync"
        )
    except MachineError as error:
        return Finding("tracking", State.fail, str(error), "move the store away, or set track.uri to another one")
    return Finding("tracking", State.ok, f"{how.uri} answers in {1000 * (time.perf_counter() - began):.0f} ms")


def device(run: Run, needed: int = 0, longest: int = 0) -> Finding:
    """Tell how the run computes on rows of `longest` tokens, and compare free memory with the bytes training needs."""
    import psutil
    import torch

    chosen = compute.policy(run.model, longest)
    on_gpu = chosen.device == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    told = f"{chosen.chip}: {chosen.dtype}, {chosen.attention} attention, "
    told += "" if on_gpu else f"{chosen.kernel} kernel, {chosen.threads} threads, "
    told += f"{free / GIB:.1f} GiB of memory free" + (f", training takes {needed / GIB:.1f}" if needed else "")
    if not on_gpu and chosen.dtype == "float16":
        return Finding("device", State.fail, told, "model.dtype=float16 needs a GPU: model.dtype=auto")
    if not on_gpu and chosen.attention == Attention.flash_attention_2.value:
        return Finding("device", State.fail, told, "flash attention needs a GPU: model.attention=auto")
    if not on_gpu and chosen.dtype == "bfloat16" and not compute.has_bfloat16():
        return Finding("device", State.warn, told, "this CPU has no bfloat16 units and is very slow: model.dtype=auto")
    if run.quant.kind is not Format.none and not on_gpu:
        return Finding("device", State.warn, told, "quantized weights are unpacked at every step of a CPU: quant=none")
    return _judged("device", free > needed, told, "trainer.batch smaller with trainer.accumulation larger", State.warn)


def supervision(run: Run) -> Finding:
    """Count what the composed recipe supervises: tokens, ends of sequence; and rows that begin twice."""
    if run.trainer.kind in HEADS:
        return Finding("supervision", State.ok, f"{HEADS[run.trainer.kind][1]}; no token is supervised")
    splits, tokenizer = data.load(run.data), model.tokenizer(run.model)
    if run.trainer.kind is Method.dpo:
        what, rows = "answers", answers.sides(experiment.paired(run, splits)[0][: SAMPLE // 2])
    else:
        what, rows = "rows", list(islice(experiment.tokenised(run, splits)[0], SAMPLE))
    return supervised(rows, prompts.end(tokenizer), tokenizer.bos_token_id, what)


def supervised(rows: Sequence[Example], end: int, bos: Any, what: str = "rows") -> Finding:
    """Judge tokenised rows.

    Args:
        rows: as they are trained on.
        end: id of the end-of-sequence token.
        bos: id of the begin-of-sequence token, or None.
        what: the rows are called.
    """
    ended = sum(e.completion[-1:] == (end,) and e.labels[-1] == end for e in rows) / len(rows)
    doubled = sum(bos is not None and e.ids[:2] == [bos, bos] for e in rows)
    mute = sum(not any(label != -100 for label in e.labels) for e in rows)
    wrong = sum(label not in (-100, token) for e in rows for label, token in zip(e.labels, e.ids, strict=True))
    share = sum(e.supervised for e in rows) / sum(len(e.ids) for e in rows)
    told = (
        f"{len(rows)} {what}: {share:.1%} of tokens supervised, {ended:.1%} of {what} show their end, "
        f"{doubled} begin twice, {mute} teach nothing, {wrong} labels are not their token"
    )
    good = ended >= ENDS and not doubled and not mute and not wrong
    return _judged("supervision", good, told, "look at the rows: ftexp show data with the same overrides")


def toy() -> tuple[Base, list[Example]]:
    """Load the tiny model in float32 beside whatever is in memory, and eight rows of unequal length for it."""
    base = model.fresh(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant())
    rows = tuple(Row(f"say{' ab' * n}", "cd cd", f"probe:{n}") for n in range(1, 9))
    return base, [cast(Example, e) for e in prompts.examples(rows, base.tokenizer, config.Data())]


def _steps(
    base: Base, rows: Sequence[Example], run: Run, look: Callable[[Any, float], None] | None = None
) -> dict[str, Any]:
    """Train the tiny model as a run is trained, and return the adapter's weights.

    Args:
        base: the tiny model.
        rows: trained on, and scored at the rungs.
        run: how.
        look: called at each rung, while the model is in training, with the model and its held-out loss.
    """
    with tempfile.TemporaryDirectory() as work, model.adapted(base, config.Lora(r=4, alpha=8), 0) as tuned:

        def judge(rung: Rung, step: int) -> str | None:
            return look(tuned, rung.loss) if look is not None else None

        kept = checkpoints.store(Path(work) / "probe", {})
        sft.train(run, base, tuned, rows, rows, kept, lambda *_: None, Control(judge))
        return {name: weight.detach().clone() for name, weight in tuned.named_parameters() if weight.requires_grad}


def _recipe(**given: Any) -> Run:
    """Describe a few steps of plain SGD that nothing bounds or warms up."""
    plain: dict[str, Any] = {
        "lr": 0.5, "steps": 1, "optimizer": "sgd", "max_grad_norm": 0.0, "scheduler": Scheduler.constant, "warmup": 0.0,
        "report_steps": 0, "checkpoint_minutes": None,
    }  # fmt: skip
    return Run(trainer=config.Trainer(**{**plain, **given}))


def accumulation(base: Base, rows: Sequence[Example], how: Trainer | None = None) -> Finding:
    """Take one step on 8 rows at once and on 2 rows four times: the weights must be the same.

    Args:
        base: the tiny model.
        rows: eight of unequal length.
        how: its loss and `extra` are taken.
    """
    how = how or Trainer()
    more = how.extra
    loss = {"loss": how.loss, "loss_strength": how.loss_strength, "loss_sha256": how.loss_sha256}
    whole, pieces, still = (
        _steps(base, rows, _recipe(extra=more, **loss, **shape))
        for shape in ({"batch": 8}, {"batch": 2, "accumulation": 4}, {"batch": 8, "lr": 1e-12})
    )
    apart, moved = (max(float((whole[k] - other[k]).abs().max()) for k in whole) for other in (pieces, still))
    told = f"8 rows at once or 2 four times: weights differ by {apart:.1e}, a step is {moved:.1e}"
    remedy = PINNED + (f", or leave out trainer.extra={more}" if more else "")
    return _judged("accumulation", apart < EXACT < moved, told, remedy)


def neftune(base: Base, rows: Sequence[Example]) -> Finding:
    """Train two steps with noise on the embeddings: it is there in training, not in scoring, and gone afterwards."""
    import torch

    run, seen = _recipe(steps=2, batch=8, neftune=5.0, report_steps=1), []
    embedding: Any = base.model.get_input_embeddings()
    before = len(embedding._forward_hooks)

    def look(tuned: PeftModel, loss: float) -> None:
        ids = torch.tensor([rows[0].ids], device=base.model.device)
        with torch.no_grad():
            loud = float((embedding(ids) - embedding(ids)).abs().max())
        table = evaluate.held_out(tuned, base.tokenizer, rows, run.eval, "probe")
        again = metrics.loss([e["nats"] for e in table], [e["tokens"] for e in table])
        seen.append((loud, abs(again - loss)))

    _steps(base, rows, run, look)
    (loud, heard), left = seen[0], len(embedding._forward_hooks) - before
    told = f"noise {loud:.1e} in training, {heard:.1e} nats a token in scoring, {left} hooks left"
    return _judged("neftune", loud > 0 and heard == 0 and left == 0, told, PINNED)


def padding(base: Base, scored: Any, rows: Sequence[Example], generates: bool) -> Finding:
    """Score rows alone and beside others: neither a loss nor, in float32, a completion may depend on the others."""
    alone, beside = (Eval(batch=n, generate=False, max_new_tokens=8) for n in (1, len(rows)))
    one, all_ = (evaluate.held_out(scored, base.tokenizer, rows, how, "probe") for how in (alone, beside))
    apart = max(abs(a["nats"] - b["nats"]) / a["tokens"] for a, b in zip(one, all_, strict=True))
    told, good = (
        f"{len(rows)} rows alone and together: {apart:.1e} nats a token apart",
        apart < CLOSE[base.compute.dtype],
    )
    if generates and base.compute.dtype == Dtype.float32.value:
        texts = [evaluate.generate(scored, base.tokenizer, rows, how, "probe") for how in (alone, beside)]
        other = sum(a != b for a, b in zip(*texts, strict=True))
        told, good = f"{told}, {other} completions differ", good and not other
    return _judged("padding", good, told, "this model sees padding: eval.batch=1, and tell us which model it is")


def packing(run: Run, scored: Any, rows: Sequence[Example]) -> Finding:
    """Ask a model whether rows in a pack see each other, where rows are packed."""
    how = run.data.packing
    if how is Packing.none or run.trainer.kind is Method.classify:
        return Finding("packing", State.ok, "off")
    if how is Packing.wrapped:
        return Finding("packing", State.warn, "rows are torn and see each other", "data.packing=bfd keeps them apart")
    first, second = rows[0].ids, rows[1].ids
    apart, seeing = lengths.contamination(scored, [*first, *second], [len(first), len(second)])
    told = f"logits of a row change by {apart:.1e} in a pack, by {seeing:.1e} where it sees the row before it"
    return _judged("packing", apart <= lengths.APART * seeing, told, "data.packing=none")


@cache
def stack() -> tuple[Finding, ...]:
    """Probe the libraries with the tiny model; once in a process.

    That all is well is kept in the cache, under the code, the versions of libraries and the way the machine computes.
    What is not is measured again by every launch, and `ftexp doctor` measures all each time.
    """
    decides = f"{facts.code()} {sorted(facts.versions().items())} {compute.policy(Model(kind=Kind.tiny))}"
    path = files.cache() / "stack" / f"{sha256(decides.encode()).hexdigest()[:32]}.json"
    with suppress(MachineError, OSError, AttributeError):  # damaged or closed to us: as if there were none
        if (kept := files.read_json(path)) is not None:
            return tuple(Finding(name, State.ok, told) for name, told in kept.items())
    base, rows = toy()
    packed = replace(_recipe(), data=config.Data(packing=Packing.bfd))
    found = (
        accumulation(base, rows), neftune(base, rows), padding(base, base.model, rows, generates=True),
        packing(packed, base.model, rows),
    )  # fmt: skip
    if all(one.state is State.ok for one in found):
        with suppress(MachineError, OSError):
            files.write_json(path, {one.name: one.told for one in found})
    return found


def quick(run: Run, folder: Path) -> list[Finding]:
    """Probe what a sweep of such runs stands on, in about a second beyond what it loads anyway."""
    return [versions(), disk(folder), folders(folder), supervision(run), *stack()]


def refuse(found: Sequence[Finding]) -> None:
    """End a launch whose probes found something that would make its results wrong.

    Raises:
        MachineError: names the probe, the figure and the remedy.
    """
    for one in found:
        if one.state is State.fail:
            raise MachineError(f"{one.name}: {one.told}; {one.remedy} (ftexp doctor shows all probes)")


def every(run: Run, folder: Path, trials: int = 1, workers: int = 1) -> list[Finding]:
    """Run all probes, with the run's own model where a model is asked.

    Args:
        run: the checked config.
        folder: where its trials are written.
        trials: adapters that are kept.
        workers: trainings at a time; each holds two checkpoints while it writes one.
    """
    found = [versions(), folders(folder), tracking(run), supervision(run)]
    task = experiment.TASKS[run.trainer.kind](run, data.load(run.data), ())
    given = estimate.rows(task.train, run)
    chosen = compute.policy(run.model, given.longest)
    plan = estimate.trial(run, given, chosen, task.outputs)
    copies = 1 if run.track.kind is Tracker.none else 2  # the tracking store holds the adapter too
    needed = trials * copies * plan.adapter_file + 2 * workers * plan.checkpoint
    found += [disk(folder, needed), device(run, plan.memory, given.longest)]
    base, rows = toy()
    how = config.Trainer() if run.trainer.kind is Method.rloo else run.trainer  # its keywords are another trainer's
    found += [accumulation(base, rows, how), neftune(base, rows)]
    if any(one.state is State.fail for one in found if one.name in ("device", "supervision")):
        return found  # the model cannot be asked
    return found + _of_model(run, task)


def _of_model(run: Run, task: experiment.Task) -> list[Finding]:
    """Ask the run's own model, with its adapter on, about padding and packs."""
    if run.trainer.kind in HEADS:
        return [Finding("padding", State.ok, f"not asked of a {HEADS[run.trainer.kind][0]}")]
    base = model.load(run.model, run.quant, task.outputs, estimate.rows(task.train, run).longest)
    held = list(islice(task.valid, 64))
    written = answers.sides(held) if run.trainer.kind is Method.dpo else held
    few = sorted(written, key=lambda e: -len(e.ids))[:8]
    with model.adapted(base, run.lora, run.seed) as tuned:
        tuned.eval()
        return [padding(base, tuned, few, run.eval.generate), packing(run, tuned, [*few, *few][:2])]
