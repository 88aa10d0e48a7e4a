"""One run from start to end. With `run.py` this is the whole path from the command to the optimizer step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftexp import config, data, estimate, evaluate, facts, handed, labels, metrics, model, passes, ranks, track
from ftexp.config import Engine, Format, Kind, Long, Loss, Method, Packing, Run, Template, Tracker, Variant
from ftexp.data import gates, general, prompts, shapes, tokens
from ftexp.errors import (
    ConfigError,
    DataError,
    Diverged,
    FtexpError,
    HandedOver,
    MachineError,
    Preempted,
    Pruned,
    out_of_memory,
)
from ftexp.files import cache, naming, no_room, read_json, read_trial, write_json
from ftexp.model import Base, compute, sizes
from ftexp.model.compute import Compute
from ftexp.overrides import ROOT
from ftexp.progress import say, warn
from ftexp.train import (
    TRAINERS,
    answers,
    checkpoints,
    classify,
    dpo,
    lengths,
    losses,
    reward,
    rewarder,
    rloo,
    sft,
    spread,
)
from ftexp.train.answers import Pair
from ftexp.train.control import Control, Rung, Share

if TYPE_CHECKING:
    from ftexp.train.lockstep import Learned, Member
    from ftexp.train.turns import Turns

    Steps = Generator[Member, Learned, dict[str, float]]
    """A trial on its way: yields what `train.lockstep` is to train, is sent what came of it, returns the scores."""

Tokenised = tuple[Sequence[prompts.Example], Sequence[prompts.Example]]


def check(run: Run, folder: Path | None) -> None:
    """Refuse what can be seen to be wrong before anything heavy is imported and before any file is written.

    Raises:
        ConfigError: an objective is unknown, keys are at odds, or the folder holds another run.
        DataError: a row cannot be used.
        MachineError: a model folder is not there.
    """
    if folder is not None and (folder / "sweep.json").exists():
        raise ConfigError(f"{folder}: must be the folder of one run, this is a sweep's; choose another")
    for name in run.objectives:
        metrics.check_objective(name, switched_on(run))
    stored = run.model.kind is not Kind.tiny and (run.model.kind is not Kind.run or model.origin(run.model)[1] is None)
    if not stored and run.quant.kind is not Format.none:
        kind = run.model.kind.value
        raise ConfigError(
            f"quant.kind={run.quant.kind.value} needs stored weights: model=embedded or hub, got {kind}"
            + (f"; ftexp export {run.model.path} --form merged stores them" if kind == "run" else "")
        )
    kept = None if folder is None else read_trial(folder)
    if kept is not None and (was := config.filled(kept["config"], identity(run))) != identity(run):
        raise ConfigError(f"name={run.name} is taken by another run in {folder}: {_difference(was, identity(run))}")
    check_columns(run)
    check_lengths(run)
    splits = data.load(run.data)
    check_shape(run, splits)
    _check_labels(run, splits)
    if run.eval.forgetting is not None and run.trainer.kind in (Method.classify, Method.reward):
        kind = run.trainer.kind.value
        raise ConfigError(f"eval.forgetting must be null with trainer.kind={kind}: such a model predicts no text")
    if run.eval.forgetting is not None:
        general.passages(run.eval.forgetting)
    rows = splits.digest()
    if kept is not None and kept.get("facts", {}).get("rows", {}).get("sha256", rows) != rows:
        raise ConfigError(f"name={run.name}: the rows changed since the run in {folder}; choose another name")
    if run.model.kind in (Kind.hub, Kind.run) and model.rooted(run.model).path:
        model.source(run.model)
    for name, now in _handed(run).items():
        if kept is not None and kept.get("facts", {}).get(name, now) != now:
            where = run.trainer.reward if name == "reward" else run.model.path
            raise ConfigError(
                f"name={run.name}: {where} was trained again since the run in {folder}; choose another name"
            )


def _handed(run: Run) -> dict[str, dict[str, Any]]:
    """Tell what a run takes from others: the one it starts from, and its reward model.

    Raises:
        ConfigError: one is of another method.
        MachineError: one is not there or not complete.
    """
    start = handed.stage("model.path", run.model.path, model.WRITERS) if run.model.kind is Kind.run else None
    judge = rewarder.found(run) if run.trainer.kind is Method.rloo else None
    return {name: handed.identity(kept) for name, kept in (("start", start), ("reward", judge)) if kept is not None}


def check_gpu(key: str, names: Iterable[str]) -> None:
    """Refuse a metric of the GPU where there is none.

    Raises:
        ConfigError: names the key.
    """
    if metrics.GPU_MEMORY in names and not compute.has_gpu():
        raise ConfigError(f"{key}: {metrics.GPU_MEMORY} needs a GPU, there is none here; use cost/memory_gib")


def switched_on(run: Run) -> set[str]:
    """Keys of this run that metrics need and that are on."""
    if run.trainer.kind in (Method.classify, Method.reward):
        return {f"trainer.kind={run.trainer.kind.value}"}
    given = {
        f"trainer.kind={run.trainer.kind.value}": True,
        "eval.generate": run.eval.generate,
        "eval.labels": run.eval.labels is not None,
        "eval.forgetting": run.eval.forgetting is not None,
    }
    return {key for key, on in given.items() if on}


def check_columns(run: Run) -> None:
    """Refuse format strings with a method that learns from pairs: of what they make, there is one answer a row.

    Raises:
        ConfigError: names the key.
    """
    if run.trainer.kind not in answers.KINDS:
        return
    for name, usual in (("prompt", "{prompt}"), ("completion", "{completion}")):
        if (value := getattr(run.data, name)) != usual:
            raise ConfigError(
                f"data.{name} must be left out with trainer.kind={run.trainer.kind.value}, got {value!r}: pairs of "
                "answers have columns prompt, chosen and rejected, or data.columns says which columns are these"
            )


def check_lengths(run: Run) -> None:
    """Refuse ways to share a forward pass, or to shorten rows, that do not go together.

    Raises:
        ConfigError: names the key.
    """
    how, kind = run.data.packing, run.trainer.kind
    if how is not Packing.none and kind is not Method.sft:
        raise ConfigError(
            f"data.packing must be none with trainer.kind={kind.value}, got {how.value}: it scores whole rows"
        )
    if run.data.long is Long.cut and kind in answers.KINDS:
        raise ConfigError(
            f"data.long must be refuse or drop with trainer.kind={kind.value}, got cut: answers differ at their ends"
        )
    if how is not Packing.none and run.trainer.group_by_length:
        raise ConfigError(
            f"trainer.group_by_length must be false with data.packing={how.value}: packs are of one length"
        )


def check_shape(run: Run, splits: data.Splits) -> None:
    """Refuse rows that the method or the scoring cannot use.

    Raises:
        ConfigError: names the first such row.
    """
    everything = (*splits.train, *splits.valid, *splits.test)
    pair = next((row for row in everything if row.rejected), None)
    if pair is not None and run.trainer.kind is Method.sft:
        raise ConfigError(
            f"trainer.kind=sft cannot learn from pairs of answers, as in {pair.where}; "
            "data.completion='{chosen}' learns the chosen ones"
        )
    lone = next((row for row in everything if not row.rejected), None)
    if lone is not None and run.trainer.kind in answers.KINDS:
        raise ConfigError(
            f"trainer.kind={run.trainer.kind.value} learns from pairs of answers, {lone.where} has one; "
            "rows need prompt, chosen and rejected"
        )
    if run.eval.labels is not None and run.trainer.kind in (*answers.KINDS, Method.rloo):
        raise ConfigError(
            f"eval.labels must be null with trainer.kind={run.trainer.kind.value}, got {run.eval.labels!r}"
        )
    text = next((row for row in (*splits.valid, *splits.test) if not row.prompt), None)
    if text is not None and run.eval.generate:
        raise ConfigError(f"eval.generate must be false, {text.where} has no prompt to complete; use eval=loss")


def prepare(run: Run, elsewhere: bool = False) -> None:
    """Refuse what only the libraries and the tokenizer can see to be wrong; imports them, loads no weights.

    Args:
        run: what is to run.
        elsewhere: whether on other machines, of whose devices nothing is known here.

    Raises:
        ConfigError: peft or TRL refuses a keyword, a target is no layer, a template or token is missing, or a GPU.
        DataError: a row is longer than `data.max_length` or the model, or a held-out row nearly one of another split.
    """
    model.adapter(run.lora)
    sizes.check_adapter(run.model, run.lora, {Method.classify: 2, Method.reward: 1}.get(run.trainer.kind, 0))
    if not elsewhere:
        check_gpu("objectives", run.objectives)
    int8 = run.quant.kind is Format.int8 and run.lora.variant is Variant.dora
    if int8 and not elsewhere and not compute.has_gpu():
        raise ConfigError("lora.variant must not be dora with quant=int8 on a CPU: bitsandbytes keeps no scales there")
    if run.trainer.extra.get("activation_offloading") and not elsewhere and not compute.has_gpu():
        raise ConfigError("trainer.extra.activation_offloading must not be true on a CPU: all is in its memory")
    sft.arguments(run.trainer, "cpu", run.seed, "", 1)
    losses.chosen(run.trainer)
    if run.trainer.kind is Method.classify:
        _prepare_classifier(run)
    elif run.trainer.kind in answers.KINDS:
        _prepare_pairs(run)
    else:
        _prepare_texts(run)


def _prepare_texts(run: Run) -> None:
    train, valid = tokenised(run, data.load(run.data))
    _check_general(run)
    _check_length(run, [tokens.longest(train), tokens.longest(valid)])
    if run.trainer.kind is Method.rloo:
        _check_steps(run, train)
    limit = model.positions(run.model)
    if limit is not None and run.data.packing is Packing.wrapped and run.data.max_length > limit:
        raise ConfigError(
            f"data.max_length must be at most the {limit} tokens the model takes with data.packing=wrapped, "
            f"got {run.data.max_length}"
        )
    _check_room(run, valid)


def check_sealed(run: Run) -> None:
    """Refuse sealed rows that could not be scored, before their opening is put on record; nothing is made of them.

    Raises:
        DataError: one is too long, or has a label that no other row has.
        ConfigError: one leaves no room for its completion.
    """
    splits = data.load(run.data)
    if splits.test:
        TASKS[run.trainer.kind](run, splits, splits.test)


def _check_general(run: Run) -> None:
    """Refuse general text that cannot be read; a sweep asks for each of its adapters, so no tokenizer without need."""
    if run.eval.forgetting is not None:
        general_text(run, model.tokenizer(run.model))


def _prepare_classifier(run: Run) -> None:
    train, valid, _ = classified(run, data.load(run.data))
    _check_length(run, (*train, *valid))
    _tell_labels(run, [*train, *valid])


_labelled: set[str] = set()


def _tell_labels(run: Run, rows: list[classify.Example]) -> None:
    """Say once what labels look like where a person most likely means something else; a sweep asks for each adapter."""
    source, counts = run.data.path or run.data.kind.value, Counter(name for row in rows for name in row.labels)
    once, line = sum(count == 1 for count in counts.values()), ""
    if once > RARE * len(rows):
        line = (f"{source}: {once} of {len(counts)} labels are of one row alone, of {len(rows)} rows; trainer.kind="
                "classify takes completions for lists of labels, trainer.kind=sft learns to write them")  # fmt: skip
    elif run.trainer.multi_label and all(len(row.labels) == 1 for row in rows):
        line = (f"{source}: each row has one label, and trainer.multi_label=true decides each label by itself; "
                "trainer.multi_label=false makes them exclude each other")  # fmt: skip
    if line and line not in _labelled:
        _labelled.add(line)
        (warn if once > RARE * len(rows) else say)(line)


def _prepare_pairs(run: Run) -> None:
    train, valid = paired(run, data.load(run.data))
    _check_length(run, answers.sides([*train, *valid]))
    if run.trainer.kind is Method.dpo:
        _check_general(run)
        _check_room(run, [p.chosen for p in valid])


def _check_length(run: Run, rows: Sequence[prompts.Example | classify.Example]) -> None:
    """Refuse a row that is longer than the model."""
    limit = model.positions(run.model)
    longest = max(rows, key=lambda e: len(e.ids))
    if limit is not None and len(longest.ids) > limit:
        raise DataError(f"{longest.row.where}: the model takes at most {limit} tokens, this row has {len(longest.ids)}")


def _check_room(run: Run, rows: Sequence[prompts.Example]) -> None:
    """Refuse held-out rows whose prompt and planned completion are together longer than the model."""
    limit = model.positions(run.model)
    if limit is None or not run.eval.generate:
        return
    asked, room = max(rows, key=lambda e: len(e.prompt)), evaluate.planned_tokens(rows, run.eval)
    if len(asked.prompt) + room > limit:
        raise ConfigError(
            f"eval.max_new_tokens must leave room for the prompt of {asked.row.where}: the model takes at most "
            f"{limit} tokens, the prompt has {len(asked.prompt)} and {room} may be written"
        )


def _check_steps(run: Run, train: Sequence[prompts.Example]) -> None:
    """Refuse fewer prompts than a step of reinforcement learning takes, and completions longer than the models."""
    wanted = run.trainer.batch * run.trainer.accumulation // run.trainer.generations
    if len(train) < wanted:
        raise ConfigError(
            f"trainer.batch * trainer.accumulation / trainer.generations = {wanted} prompts are a step, there are "
            f"{len(train)}"
        )
    limits = [model.positions(run.model), model.positions(rewarder.found(run).config().model)]
    limit = min((n for n in limits if n is not None), default=None)
    asked, most = max(train, key=lambda e: len(e.prompt)), rloo.room(run, train)
    if limit is not None and len(asked.prompt) + most > limit:
        raise ConfigError(
            f"trainer.max_new_tokens must leave room for the prompt of {asked.row.where}: model and reward model take "
            f"at most {limit} tokens, the prompt has {len(asked.prompt)} and {most} may be written"
        )


def _check_labels(run: Run, splits: data.Splits) -> None:
    """Refuse a row without a label, where completions are lists of labels."""
    for row in (*splits.train, *splits.valid, *splits.test) if run.eval.labels is not None else ():
        shapes.check_separator(row, run.eval.labels)
        if not labels.parse(row.completion, run.eval.labels or ""):
            raise DataError(f"{row.where}: with eval.labels the completion must name a label, got {row.completion!r}")


def identity(run: Run) -> dict[str, Any]:
    """Return what decides the result of a run, flat: the config without tracking, name and checkpoints."""
    return {k: v for k, v in track.flat(run).items() if k not in ("name", "trainer.checkpoint_minutes")}


RARE = 0.5
"""Labels of one row alone, as a share of the rows, above which they are told to be text."""
HANDED = ("start", "reward")
"""Facts about the runs that a run takes something from."""


def fingerprint(run: Run, told: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the bits of a training, flat: config, rows, template, base weights, code and versions.

    Args:
        run: the checked config.
        told: facts of the run, as in `trial.json`.
    """
    free = ("eval.", "objectives")
    config_part = {k: v for k, v in identity(run).items() if not k.startswith(free)}
    deciding = (
        "rows", "template_sha256", "tokenizer_sha256", "weights_sha256", "compute", "versions", "code_sha256",
    )  # fmt: skip
    return config_part | config.flat({k: told[k] for k in deciding} | {k: told[k] for k in HANDED if k in told})


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in sorted(old | new) if old.get(k) != new.get(k)]
    return f"{', '.join(changed[:5])}; choose another name"


def complete(run: Run, folder: Path) -> dict[str, float] | None:
    """Return the scores of a run that is already in its folder and ended well."""
    kept = read_trial(folder)
    if not kept or kept["state"] != "complete" or not has_results(folder):
        return None
    return kept["scores"] if config.filled(kept["config"], identity(run)) == identity(run) else None


def has_results(folder: Path) -> bool:
    """Tell whether all that a complete run leaves is there: its record, what was trained, the table of its rows."""
    trained = next(folder.glob("adapter/adapter_model.*"), None) or next(folder.glob("model/model*"), None)
    return trained is not None and all((folder / name).exists() for name in ("trial.json", "examples.parquet"))


def stale(folder: Path) -> str:
    """Name what has changed since a run was made, of what it has on record beside config and rows."""
    told = (read_trial(folder) or {}).get("facts", {})
    old = {**told.get("versions", {}), "code": told.get("code_sha256", "")[:12]}
    new = {**facts.versions(), "code": facts.code()[:12]}
    return ", ".join(f"{key} ({old[key]} -> {new[key]})" for key in new if key in old and old[key] != new[key])


@dataclass(frozen=True)
class Asked:
    """A trial to run."""

    run: Run
    """The checked config."""
    folder: Path
    """Its own; a complete run found there is not run again."""
    label: str
    """Its name in the tracking store."""
    parent: str | None = None
    """Id of the sweep's run in the tracking store."""
    control: Control = field(default_factory=Control)
    """What may end the training early."""
    opened: int = 0
    """How often the sealed rows have been opened, this time included: `confirm` alone says so and has them scored,
    after it has put the opening on record. 0 leaves them sealed."""


def execute(
    run: Run, folder: Path, label: str, parent: str | None = None, control: Control | None = None, opened: int = 0
) -> dict[str, float]:
    """Train one adapter and score it beside its base; everything about it is in `folder` afterwards.

    A run that was killed goes on from its last checkpoint, under the id it had in the tracking store. Where memory
    runs out, the forward pass is cut and accumulation raised, so that the effective batch stays. The arguments are
    those of `Asked`.

    Returns:
        Metrics by name: `valid/*` of the adapter and `base/*` of the base model on the same rows, `test/*` of the
        adapter where the sealed rows are opened, and what it cost.

    Raises:
        FtexpError: the run was refused, pruned or ended badly; the reason is in `folder/trial.json` too.
        NoRoom: a disk was full; the newest whole checkpoint stays, and the same call goes on.
        Preempted: the process was asked to leave; the same call goes on.
    """
    ends: list[dict[str, float] | BaseException] = []
    together([Asked(run, folder, label, parent, control or Control(), opened)], lambda _, end: ends.append(end))
    if isinstance(ends[0], BaseException):
        raise ends[0]
    return ends[0]


def together(
    asked: Sequence[Asked],
    ended: Callable[[int, dict[str, float] | BaseException], None],
    turns: Turns | None = None,
    share: Share | None = None,
) -> None:
    """Run trials; those of the packed engine share forward and backward passes, others run one after the other.

    Each is what it would be alone, folder, tracking and end included, and is told the moment it is over.

    Args:
        asked: trials of one base where they are of the packed engine.
        ended: takes the number of a trial and its scores, or the error it ended with.
        turns: says which steps are taken in one pass; all are without it.
        share: asks for half of the trials in training, which end with `HandedOver` while the others go on.
    """
    trials = [_trial(one) for one in asked]
    ready: dict[int, Member] = {}
    left: list[BaseException] = []

    def go_on(number: int, move: Callable[[Any], Member], given: Any) -> None:
        try:
            ready[number] = move(given)
            return
        except StopIteration as done:
            end = done.value
        except BaseException as error:  # its end alone, which the caller tells from others by its kind
            end = error
            leaving = isinstance(error, KeyboardInterrupt) and not isinstance(error, HandedOver)
            left.extend([error] if leaving else [])
        ended(number, end)

    for number, trial in enumerate(trials):
        go_on(number, *((trial.throw, left[0]) if left else (trial.send, None)))
    while ready:
        from ftexp.train import lockstep

        waiting, members = dict(enumerate(ready)), list(ready.values())  # place in the pack -> number of the trial
        ready.clear()
        training, failed = lockstep.train(members, turns, share), None
        while waiting and failed is None:
            try:
                place, learned = next(training)
            except BaseException as error:
                failed = error
            else:
                number = waiting.pop(place)
                go_on(number, trials[number].send, learned)
                asked_again = left and not isinstance(learned.ended, Preempted)  # while a trial was scored
                failed = left[0] if asked_again else None
        for number in waiting.values():
            go_on(number, trials[number].throw, failed)


def _trial(asked: Asked) -> Steps:
    run, folder, label = asked.run, asked.folder, asked.label
    if (kept := complete(run, folder)) is not None:
        checkpoints.clear(folder / "checkpoints")
        say(f"{label}: complete already, kept as it is in {folder}")
        if made_with := stale(folder):
            say(f"{label}: stale, it was made with other {made_with}; without that folder it is trained again")
        return kept
    before = read_trial(folder) or {}
    trial: dict[str, Any] = {"label": label, "state": "running", "config": identity(run), "folder": str(folder)}
    of_checkpoint = ("out_of_memory",) if checkpoints.newest(folder / "checkpoints") else ()
    trial |= {key: before[key] for key in ("mlflow_run", "resumed_at", *of_checkpoint) if key in before}
    trial |= {"opened": asked.opened} if asked.opened else {}
    if run.track.kind is Tracker.mlflow:
        trial["track"] = {"uri": run.track.uri, "experiment": run.track.experiment, "parent": asked.parent}
    if run.trainer.loss is Loss.own:
        trial["loss_source"] = losses.given(run.trainer)
    write_json(folder / "trial.json", trial)
    try:
        scores = yield from _fitting(asked, trial)
        write_json(folder / "trial.json", trial | {"state": "complete", "scores": scores})
    except BaseException as error:
        if (full := no_room(error, folder)) is not None:
            checkpoints.clear_torn(folder / "checkpoints")
            with suppress(OSError):  # it stays "running", as after a kill
                write_json(folder / "trial.json", trial | {"state": "preempted", "error": str(full)})
            raise full from error
        told = isinstance(error, FtexpError | Preempted)
        reason = str(error) if told else f"{type(error).__name__}: {error}"
        ends = ((Pruned, "pruned"), (KeyboardInterrupt, "preempted"))
        state = next((name for kind, name in ends if isinstance(error, kind)), "failed")
        write_json(folder / "trial.json", trial | {"state": state, "error": reason.splitlines()[0]})
        if isinstance(error, Pruned | Diverged):  # nothing goes on with it
            checkpoints.clear(folder / "checkpoints")
        raise
    checkpoints.clear(folder / "checkpoints")
    return scores


def _fitting(asked: Asked, trial: dict[str, Any]) -> Steps:
    """Run with smaller and smaller forward passes until one fits in memory; go on with that of a checkpoint."""
    run = asked.run
    if passed := trial.get("out_of_memory"):
        run = replace(run, trainer=replace(run.trainer, **passed[-1]))
    while True:
        try:
            return (yield from _execute(run, asked.folder, asked.label, asked.parent, trial, asked.control,
                                        asked.opened))  # fmt: skip
        except Exception as error:
            # Of several processes one may run out of memory alone, and then the others wait inside a training step.
            smaller = halved(run) if out_of_memory(error) and ranks.count() == 1 else None
            if smaller is None:
                raise
            run = smaller
        passes.free_memory()
        shape = {"batch": run.trainer.batch, "accumulation": run.trainer.accumulation}
        trial.setdefault("out_of_memory", []).append(shape)
        say(f"{asked.label}: out of memory; again with trainer.batch={shape['batch']} "
            f"accumulation={shape['accumulation']}", always=True)  # fmt: skip


def halved(run: Run) -> Run | None:
    """Cut the forward pass by the smallest factor that divides its rows, and accumulate as much more.

    None where a forward pass is one row already.
    """
    batch = run.trainer.batch
    factor = next((f for f in range(2, batch + 1) if batch % f == 0), None)
    if factor is None:
        return None
    trainer = replace(run.trainer, batch=batch // factor, accumulation=run.trainer.accumulation * factor)
    return replace(run, trainer=trainer)


def _execute(
    run: Run, folder: Path, label: str, parent: str | None, trial: dict[str, Any], control: Control, opened: int
) -> Steps:
    splits = data.load(run.data)
    task = TASKS[run.trainer.kind](run, splits, splits.test if opened else ())
    given = estimate.rows(task.train, run)
    base = model.load(run.model, run.quant, task.outputs, given.longest)
    trial["facts"] = _facts(task.run, base, splits, (task.train, task.valid))
    if control.known is not None:
        control.known(trial["facts"])
    kept = checkpoints.store(folder / "checkpoints", fingerprint(run, trial["facts"]))
    done = kept.resume.step if kept.resume else 0
    with track.start(run, folder, label, parent, trial.get("mlflow_run"), done) as log:
        trial["inputs"] = _inputs(run, splits, {"train": len(task.train), "valid": len(task.valid)})
        trial |= {"mlflow_run": log.run_id, "steps": sft.planned_steps(run.trainer, task.units)}
        write_json(folder / "trial.json", trial)  # so that a restart after a kill finds its run in the store
        log.params(track.params(run))
        log.inputs(trial["inputs"])
        task.ready(base)
        with _answering(run, base, base.model):
            before = task.before(base)
        plan = planned(run, task, given, base.compute, ranks.count())
        check_share(plan, facts.shared_gpu_gib())
        resident = facts.resident_gib()
        facts.reset_peak_memory()
        kept.began = time.monotonic()
        if done:
            say(f"{label}: goes on from step {done}")
            trial.setdefault("resumed_at", []).append(done)
            write_json(folder / "trial.json", trial)
            _judge_again(log, control)
        learned = None
        if run.trainer.engine is Engine.packed:
            learned = yield _member(run, base, task, kept, log, control)
        with model.adapted(base, run.lora, run.seed) as tuned:
            trial["facts"]["parameters"] = asdict(model.count(tuned))
            log.tags({f"ftexp.{k}": v for k, v in config.flat(trial["facts"]).items()})
            log.tags({"ftexp.test_opened": opened} if opened else {})
            train_adapter = TRAINERS[run.trainer.kind]
            try:
                if learned is not None:
                    trained = _learned(tuned, learned, trial)
                else:
                    trained = train_adapter(
                        run, base, tuned, task.train, task.valid, kept, log.metrics, control, **task.more
                    )
            except Pruned:
                model.save(base, tuned, folder)
                raise
            trial["plan"] = _against(plan, trial, trained, resident, log)
            with _answering(run, base, tuned) as scored:
                after = task.after(base, scored)
                tested = task.final(base, scored, after) if task.test else None
            model.save(base, tuned, folder)
        trial |= after.kept
        scores = {f"valid/{k}": v for k, v in after.scored.scores.items()}
        if tested is not None:
            scores |= {f"test/{k}": v for k, v in tested.scores.items()}
            _write_table(folder / "test.parquet", tested.table)
            if tested.labels:
                write_json(folder / "test_labels.json", tested.labels)
        scores |= {f"{task.rival}/{k}": v for k, v in before.scores.items() if k not in metrics.COUNTS} | after.more
        scores["train/loss"] = trained["train/loss"]
        scores |= {"cost/trainable": float(trial["facts"]["parameters"]["trainable"])}
        scores |= {f"cost/{k}": v for k, v in facts.peak_memory_gib().items()}
        scores["cost/seconds"] = kept.seconds()
        _store(run, folder, log, scores, before, after.scored, int(trained["train/steps"]), task.rival)
    return scores


def planned(run: Run, task: Task, given: estimate.Rows, compute: Compute, processes: int) -> estimate.Plan:
    """Plan a trial as it will run: of several processes the memory of one, and the operations of all but blank rows."""
    if processes == 1:
        return estimate.trial(run, given, compute, task.outputs)
    batch, passes = spread.shape(run.trainer, processes)
    shared = replace(run, trainer=replace(run.trainer, batch=batch, accumulation=passes * processes))
    made = estimate.trial(shared, given, compute, task.outputs)
    return replace(made, notes=(*made.notes, f"operations are those of {processes} processes without padding rows"))


def check_share(planned: estimate.Plan, share: float | None) -> None:
    """Refuse a trial whose plan passes its share of a GPU; the worker beside it would be the one to run out of memory.

    Args:
        planned: of the trial.
        share: GiB; None where nobody shares the GPU.

    Raises:
        ConfigError: tells both figures.
    """
    needed = planned.memory / estimate.GIB
    if share is not None and needed > share:
        raise ConfigError(
            f"sweep.slots_per_gpu leaves a trial {share:.1f} GiB of the GPU, its plan needs {needed:.1f}; lower it, or "
            "trainer.batch with as much more trainer.accumulation"
        )


def follow(run: Run, folder: Path) -> None:
    """Be one of the other processes of a trial: load, train and score in step with the first one, which alone writes.

    Raises:
        FtexpError: as in the first process.
        Preempted: the first process was asked to leave.
    """
    splits = data.load(run.data)
    task = TASKS[run.trainer.kind](run, splits)
    base = model.load(run.model, run.quant, task.outputs, estimate.rows(task.train, run).longest)
    told = _facts(task.run, base, splits, (task.train, task.valid))
    kept = checkpoints.store(folder / "checkpoints", fingerprint(run, told))
    task.ready(base)
    task.before(base)
    with model.adapted(base, run.lora, run.seed) as tuned:
        TRAINERS[run.trainer.kind](run, base, tuned, task.train, task.valid, kept, lambda *_: None, Control())
        task.after(base, tuned)


def _member(
    run: Run, base: Base, task: Task, kept: checkpoints.Store, log: track.Log, control: Control
) -> Member:  # fmt: skip
    """Hand a trial to the packed engine, with the first weights that peft draws for it."""
    from ftexp.model import packed
    from ftexp.train.lockstep import Member

    with model.adapted(base, run.lora, run.seed) as fresh:
        start, scales = packed.taken(fresh)
    return Member(run, base, task.train, task.valid, start, scales, kept, log.metrics, control)


@contextmanager
def _answering(run: Run, base: Base, tuned: Any) -> Iterator[Any]:
    """Lend out a model that scores as the packed engine trains, where there is one; else the given one."""
    if not _how(run, base):
        yield tuned
        return
    from ftexp.model import answer

    theirs = answer.NOTHING if tuned is base.model else answer.adapter(tuned, base.model.dtype)
    with answer.answering(base.model, theirs):
        yield base.model


def _how(run: Run, base: Base) -> str:
    """Name how a model answers, where that is not transformers' own way: it rounds otherwise."""
    from ftexp.model import answer

    return " as trained" if run.trainer.engine is Engine.packed and answer.fits(base.model) else ""


def _learned(tuned: Any, learned: Learned, trial: dict[str, Any]) -> dict[str, float]:
    """Put what the packed engine learned into the adapter, or raise what ended it; tells what `sft.train` tells."""
    from ftexp.model import packed

    packed.put(tuned, learned.weights)
    trial["pack"] = learned.pack
    if learned.ended is not None:
        raise learned.ended
    sft.check_weights(tuned, learned.steps)
    flops = 6 * learned.tokens * tuned.num_parameters(exclude_embeddings=True)  # as transformers counts them
    return {"train/steps": learned.steps, "train/loss": learned.loss, "train/flops": flops}


def _against(
    planned: estimate.Plan, trial: dict[str, Any], trained: dict[str, float], resident: float, log: track.Log
) -> dict[str, Any]:
    """Set the plan of a trial beside what training took, and say where a count that is exact was missed."""
    peak = facts.peak_memory_gib()
    on_gpu = "gpu_memory_gib" in peak
    real = peak["gpu_memory_gib"] if on_gpu else max(0.0, peak["memory_gib"] - resident)
    told = estimate.against(planned, trial["facts"]["parameters"], trained, real, on_gpu)
    if trial.get("pack", 1) > 1:
        told["memory_gib"]["error"] = None  # the peak is that of all who shared the pass
    for miss in estimate.missed(told):
        warn(f"the plan is wrong: {miss}")
    memory = {key: value for key, value in told["memory_gib"].items() if value is not None}
    log.metrics({f"plan/memory_gib_{key}": value for key, value in memory.items()}, 0)
    log.metrics({f"plan/{key}": float(told[key]["planned"]) for key in ("trainable", "total", "steps", "flops")}, 0)
    return told


def _judge_again(log: track.Log, control: Control) -> None:
    """Tell a pruner the rungs that were passed before the kill; it let the trial pass them, so its answer is known."""
    if control.judge is not None:
        for value, step in log.curve("valid/loss"):
            control.judge(Rung(value), step)


@dataclass(frozen=True)
class After:
    """What a trained model is worth."""

    scored: evaluate.Scored
    """On the held-out rows."""
    more: dict[str, float] = field(default_factory=dict)
    """Further metrics, by their full names."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What else goes into `trial.json`."""


@dataclass(frozen=True)
class Task:
    """What a training method makes of the rows, and what its model is compared with."""

    run: Run
    """The config whose template the rows are in."""
    train: Sequence[Any]
    """Training rows as the method takes them."""
    valid: Sequence[Any]
    """Held-out rows."""
    test: list[Any]
    """Sealed rows that were opened; empty where they stay sealed."""
    units: int
    """What `trainer.batch` counts: rows, or packs of rows."""
    outputs: int
    """Labels of a classifier's head; 0 where the model writes text."""
    rival: str
    """Name of what the trained model is compared with: `base` or `tfidf`."""
    before: Callable[[Base], evaluate.Scored]
    """Scores the rival; once for all trials that share it."""
    after: Callable[[Base, Any], After]
    """Scores the trained model."""
    final: Callable[[Base, Any, After], evaluate.Scored]
    """Scores the trained model on `test`; what was fitted on the held-out rows stays as it is."""
    ready: Callable[[Base], None] = lambda base: None
    """Asks the untouched base what training needs of it."""
    more: dict[str, Any] = field(default_factory=dict)
    """What the training takes beside what all take."""


def generation(run: Run, splits: data.Splits, opened: tuple[data.Row, ...] = ()) -> Task:
    """Rows are prompts and completions; the rival is the base model."""
    train, valid = tokenised(run, splits)
    test = prompts.render(opened, model.tokenizer(run.model), run.data) if opened else []
    if test:
        _check_length(run, test)
        _check_room(run, test)
    known = evaluate.seen(train, valid, run.eval)

    def before(base: Base) -> evaluate.Scored:
        general_before(run, base)
        return base_scores(run, base, valid, splits.digest(), known)

    def after(base: Base, tuned: Any) -> After:
        scored = evaluate.score(tuned, base.tokenizer, valid, run.eval, "valid", known)
        return After(scored, forgotten(run, base, tuned))

    def final(base: Base, tuned: Any, _: After) -> evaluate.Scored:
        return evaluate.score(tuned, base.tokenizer, test, run.eval, "test", known)

    return Task(run, train, valid, test, lengths.units(train, run.data), 0, "base", before, after, final)


def classification(run: Run, splits: data.Splits, opened: tuple[data.Row, ...] = ()) -> Task:
    """Rows are texts and labels; a base model has no head, so the rival is TF-IDF with logistic regression."""
    train, valid, known = classified(run, splits)
    test = classify.render(opened, model.tokenizer(run.model), run) if opened else []
    many = run.trainer.multi_label
    if test:
        _check_length(run, test)
        _check_known(test, known, many)

    def before(base: Base) -> evaluate.Scored:
        return tfidf_scores(run, train, valid, known, splits.digest())

    def after(base: Base, tuned: Any) -> After:
        told = classify.logits(tuned, base.tokenizer, valid, run.eval, "valid")
        scored, thresholds = classify.score(told, valid, known, many)
        return After(scored, {}, {"thresholds": thresholds, "labels": known})

    def final(base: Base, tuned: Any, after: After) -> evaluate.Scored:
        told = classify.logits(tuned, base.tokenizer, test, run.eval, "test")
        return classify.score(told, test, known, many, after.kept["thresholds"])[0]

    bare = replace(run, data=replace(run.data, template=Template.plain))  # texts are in no template
    return Task(bare, train, valid, test, len(train), len(known), "tfidf", before, after, final)


def _check_known(rows: list[classify.Example], known: list[str], many: bool) -> None:
    """Refuse a sealed row whose one label the head has no output for; of many labels such a one is a miss."""
    stray = next((e for e in rows if not many and not e.labels <= {*known}), None)
    if stray is not None:
        raise DataError(f"{stray.row.where}: no training or held-out row has the label {', '.join(stray.labels)!r}")


def rewarding(run: Run, splits: data.Splits, opened: tuple[data.Row, ...] = ()) -> Task:
    """Rows are pairs of answers; a base model has no head, so the rival is TF-IDF with logistic regression."""
    train, valid = paired(run, splits)
    test = answers.render(opened, model.tokenizer(run.model), run.data) if opened else []
    if test:
        _check_length(run, answers.sides(test))

    def before(base: Base) -> evaluate.Scored:
        key = f"{splits.digest()} {_left(train, valid)} {config.digest(run.data)}"
        if key not in _tfidf:
            _tfidf[key] = reward.baseline(train, valid)
        return _tfidf[key]

    def after(base: Base, tuned: Any) -> After:
        return After(reward.score(tuned, base.tokenizer, valid, run.eval, "valid"))

    def final(base: Base, tuned: Any, _: After) -> evaluate.Scored:
        return reward.score(tuned, base.tokenizer, test, run.eval, "test")

    return Task(run, train, valid, test, len(train), 1, "tfidf", before, after, final)


def preference(run: Run, splits: data.Splits, opened: tuple[data.Row, ...] = ()) -> Task:
    """Rows are pairs of answers; the rival is the base model, which is the reference too."""
    train, valid = paired(run, splits)
    test = answers.render(opened, model.tokenizer(run.model), run.data) if opened else []
    if test:
        _check_length(run, answers.sides(test))
        _check_room(run, [p.chosen for p in test])
    known = evaluate.seen([p.chosen for p in train], [p.chosen for p in valid], run.eval)

    def ready(base: Base) -> None:
        used = [train[n] for n in dpo.passed(len(train), run.trainer, run.seed)]
        for pair in train:
            pair.reference = None
        for part, label in ((used, "train"), (valid, "valid"), (test, "test")):
            refer(run, base, part, label)

    def before(base: Base) -> evaluate.Scored:
        general_before(run, base)
        key = f"dpo {base.weights} {base.key} {splits.digest()} {config.digest(run.data, run.eval)}"
        if key not in _base_scores:
            told = [cast("tuple[float, float]", p.reference) for p in valid]
            _base_scores[key] = dpo.score(base.model, base.tokenizer, valid, told, run, "base", known)
        return _base_scores[key]

    def after(base: Base, tuned: Any) -> After:
        told = dpo.asked(tuned, base, valid, run.eval, "valid")
        scored = dpo.score(tuned, base.tokenizer, valid, told, run, "valid", known)
        return After(scored, forgotten(run, base, tuned))

    def final(base: Base, tuned: Any, _: After) -> evaluate.Scored:
        told = dpo.asked(tuned, base, test, run.eval, "test")
        return dpo.score(tuned, base.tokenizer, test, told, run, "test", known)

    return Task(run, train, valid, test, len(train), 0, "base", before, after, final, ready)


def reinforcement(run: Run, splits: data.Splits, opened: tuple[data.Row, ...] = ()) -> Task:
    """Rows are prompts, their completions are there to be compared with; the rival is the base, the reference too."""
    train, valid = tokenised(run, splits)
    test = prompts.render(opened, model.tokenizer(run.model), run.data) if opened else []
    if test:
        _check_length(run, test)
        _check_room(run, test)
    known = evaluate.seen(train, valid, run.eval)
    judge = str(sorted(handed.identity(rewarder.found(run)).items()))
    more: dict[str, Any] = {}

    def ready(base: Base) -> None:
        more["rewarder"] = rewarder.load(run)

    def scored(base: Base, rows: Sequence[prompts.Example], label: str) -> evaluate.Scored:
        asked = f"{splits.digest()} {judge} {run.trainer.beta} {config.digest(run.data, run.eval)}"
        key = f"rloo {label} {base.weights} {base.key} {asked}"
        if key not in _base_scores:
            found = rloo.score(base.model, base, rows, run, more["rewarder"], label, known)
            given = [e.row for e in rows]
            told = [row.completion for row in given]
            worth = more["rewarder"].rewards(given, told, run.eval.batch, f"{label} references")
            for entry, value in zip(found.table, worth, strict=True):
                entry |= {"reference_reward": value, "win_rate": 0.5}
            _base_scores[key] = evaluate.Scored(found.scores | {"win_rate": 0.5}, found.table)
        return _base_scores[key]

    def before(base: Base) -> evaluate.Scored:
        general_before(run, base)
        return scored(base, valid, "base")

    def after(base: Base, tuned: Any) -> After:
        ahead = [e["reward"] for e in before(base).table]
        found = rloo.score(tuned, base, valid, run, more["rewarder"], "valid", known, ahead)
        return After(found, forgotten(run, base, tuned))

    def final(base: Base, tuned: Any, _: After) -> evaluate.Scored:
        with model.untrained(base, tuned):
            ahead = [e["reward"] for e in scored(base, test, "base, test").table]
        return rloo.score(tuned, base, test, run, more["rewarder"], "test", known, ahead)

    return Task(run, train, valid, test, len(train), 0, "base", before, after, final, ready, more)


TASKS = {
    Method.sft: generation,
    Method.classify: classification,
    Method.reward: rewarding,
    Method.dpo: preference,
    Method.rloo: reinforcement,
}


_pairs: tuple[str, tuple[list[Pair], list[Pair]]] | None = None


def paired(run: Run, splits: data.Splits) -> tuple[list[Pair], list[Pair]]:
    """Return train and valid rows as pairs of answers; kept in memory while trials ask for the same."""
    global _pairs
    key = f"{splits.digest()} {config.digest(run.model, run.data)}{model.version(run.model)}"
    if _pairs is None or _pairs[0] != key:
        gates.near_leaks(splits, run.data)
        tokenizer = model.tokenizer(run.model)
        train, valid = (answers.render(part, tokenizer, run.data) for part in (splits.train, splits.valid))
        _pairs = key, (train, valid)
    return _pairs[1]


_references: dict[str, list[tuple[float, float]]] = {}


def refer(run: Run, base: Base, rows: list[Pair], label: str) -> None:
    """Give pairs the nats of both answers by the reference: asked once for a model and pairs, not once a trial."""
    content = f"{data.load(run.data).digest()} {' '.join(p.row.where for p in rows)}"
    key = f"{base.weights} {base.key} {config.digest(run.data)} {sha256(content.encode()).hexdigest()}"
    if rows and key not in _references:
        if label == "train":
            _references.clear()  # of other rows, or another base
        _references[key] = dpo.refer(base, rows, f"reference, {label}")
    for pair, told in zip(rows, _references.get(key, ()), strict=True):
        pair.reference = told


def classified(run: Run, splits: data.Splits) -> tuple[list[classify.Example], list[classify.Example], list[str]]:
    """Return train and valid rows of a classifier, and the labels they name."""
    gates.near_leaks(splits, run.data)
    tokenizer = model.tokenizer(run.model)
    train, valid = (classify.render(part, tokenizer, run) for part in (splits.train, splits.valid))
    known = classify.names(train, valid)
    if len(known) < 2 and not run.trainer.multi_label:
        raise DataError(f"trainer.multi_label=false needs two labels to tell apart, the rows have {known}")
    return train, valid, known


def _left(*parts: Sequence[Any]) -> str:
    """Hash which rows a tokenizer and `data.long` have left: those of one model are not another's."""
    return sha256("\n\n".join("\n".join(e.row.where for e in part) for part in parts).encode()).hexdigest()


_tfidf: dict[str, evaluate.Scored] = {}


def tfidf_scores(
    run: Run, train: list[classify.Example], valid: list[classify.Example], known: list[str], rows: str
) -> evaluate.Scored:
    """Score TF-IDF and logistic regression on whole texts: once for the rows, not once a trial.

    The rows are those of a digest that `data.long` has left.
    """
    key = f"{rows} {_left(train, valid)} {run.eval.labels} {run.trainer.multi_label}"
    if key not in _tfidf:
        told = classify.baseline(train, valid, known, run.trainer.multi_label)
        _tfidf[key] = classify.score(told, valid, known, run.trainer.multi_label)[0]
    return _tfidf[key]


_tokens: tuple[str, Tokenised] | None = None


def tokenised(run: Run, splits: data.Splits) -> Tokenised:
    """Return train and valid rows as token ids; kept in memory while trials ask for the same."""
    global _tokens
    key = f"{splits.digest()} {config.digest(run.model, run.data)}{model.version(run.model)}"
    if _tokens is None or _tokens[0] != key:
        gates.near_leaks(splits, run.data)
        tokenizer = model.tokenizer(run.model)
        train = tokens.render(splits.train, tokenizer, run.data, f"train {splits.digest()}")
        _tokens = key, (train, tokens.render(splits.valid, tokenizer, run.data, f"valid {splits.digest()}"))
    return _tokens[1]


_base_scores: dict[str, evaluate.Scored] = {}


def base_scores(
    run: Run, base: Base, valid: Sequence[prompts.Example], rows: str, known: evaluate.Seen
) -> evaluate.Scored:
    """Score the model before training: once for a model, its rows and the way of scoring, not once a trial.

    What took some seconds is kept in the cache for other processes and later runs, under all that decides it: bytes of
    the weights, the model's config, tokenizer, template and end tokens, rows, scoring, how the machine computes, our
    code and the versions of libraries.
    """
    key = f"{base.weights} {base.key} {rows} {config.digest(run.data, run.eval)}{_how(run, base)}"
    if key not in _base_scores:
        own = {k: v for k, v in base.model.config.to_dict().items() if k != "use_cache"}  # a Trainer switches it off
        texts = (prompts.template_digest(base.tokenizer, run.data), prompts.tokenizer_digest(base.tokenizer),
                 evaluate.ends(base.model, base.tokenizer), sorted(own.items()))  # fmt: skip
        machine = (sorted(asdict(base.compute).items()), facts.code(), sorted(facts.versions().items()))
        decides = f"{key} {texts} {machine}"
        path = cache() / "base" / f"{sha256(decides.encode()).hexdigest()[:32]}.json"
        kept = ranks.agreed(_read(path))
        began = time.monotonic()
        if kept is not None:
            say(f"scores of the base: kept from an earlier run, {path}")
            _base_scores[key] = evaluate.Scored(**kept)
            return _base_scores[key]
        _base_scores[key] = evaluate.score(base.model, base.tokenizer, valid, run.eval, "base", known)
        if time.monotonic() - began >= KEPT_SECONDS and ranks.rank() == 0:
            with suppress(OSError, MachineError):  # nothing is lost where the cache cannot be written
                write_json(path, asdict(_base_scores[key]))
    return _base_scores[key]


KEPT_SECONDS = 3.0
"""Scores of a base that took less are not worth a file."""


def _read(path: Path) -> Any:
    """Read what is kept; a file that is damaged or closed to us is as none."""
    try:
        return read_json(path)
    except (MachineError, OSError):
        return None


def general_text(run: Run, tokenizer: Any) -> list[prompts.Example]:
    """Return the passages of `eval.forgetting` as token ids; none where it is off."""
    if run.eval.forgetting is None:
        return []
    return general.render(general.passages(run.eval.forgetting), tokenizer, model.positions(run.model))


def general_loss(run: Run, base: Base, scored: Any, text: list[prompts.Example], label: str) -> float:
    """Score a model, tuned or not, on general text: nats a token."""
    few = replace(run.eval, batch=min(8, run.eval.batch))  # passages are long: this must not be the peak of memory
    table = evaluate.held_out(scored, base.tokenizer, text, few, label)
    return metrics.loss([e["nats"] for e in table], [e["tokens"] for e in table])


_general: dict[str, float] = {}


def general_before(run: Run, base: Base) -> float:
    """Score the untouched base on general text: once for a model and text, not once a trial. 0 where it is off."""
    text = general_text(run, base.tokenizer)
    if not text:
        return 0.0
    key = f"{base.weights} {base.key} {general.digest([e.row for e in text])}{_how(run, base)}"
    if key not in _general:
        _general[key] = general_loss(run, base, base.model, text, "base general text")
    return _general[key]


def forgotten(run: Run, base: Base, tuned: Any) -> dict[str, float]:
    """Score a trained model on general text; its base was scored before training. Empty where it is off."""
    text = general_text(run, base.tokenizer)
    if not text:
        return {}
    was, now = general_before(run, base), general_loss(run, base, tuned, text, "general text")
    return {"forgetting/before": was, "forgetting/after": now, "forgetting/loss": now - was}


def _facts(run: Run, base: Base, splits: data.Splits, used: Tokenised) -> dict[str, Any]:
    """What the result depends on beside the config, and sizes that a reader asks for first."""
    return {
        **({"general_sha256": general.digest(general.passages(run.eval.forgetting))} if run.eval.forgetting else {}),
        "rows": _counts(splits, used),
        **({"data_commit": splits.commit} if splits.commit else {}),
        **_handed(run),
        "template_sha256": prompts.template_digest(base.tokenizer, run.data),
        "tokenizer_sha256": prompts.tokenizer_digest(base.tokenizer),
        "weights_sha256": base.weights,
        "compute": asdict(base.compute) | ({"processes": ranks.count()} if ranks.count() > 1 else {}),
        "versions": facts.versions(),
        "code_sha256": facts.code(),
        "git": facts.git(ROOT),
    }  # fmt: skip


def _inputs(run: Run, splits: data.Splits, used: dict[str, int]) -> list[dict[str, Any]]:
    """Tell the rows that are trained and scored on as a tracking store lists data sets; never the sealed ones."""
    what = run.data
    paths = {"train": what.path, "valid": what.valid_path or what.path}
    contexts = {"train": "training", "valid": "validation"}
    told = []
    for split, digest in splits.digests().items():
        source = {"kind": what.kind.value, "path": paths[split], "commit": splits.commit, "seed": what.seed}
        told.append({
            "name": f"{Path(paths[split]).name or what.kind.value}/{split}", "sha256": digest, "rows": used[split],
            "kind": what.kind.value, "context": contexts[split], "source": {k: v for k, v in source.items() if v != ""},
        })  # fmt: skip
    return told


def _counts(splits: data.Splits, used: Tokenised) -> dict[str, Any]:
    """Count rows; read = train + valid + test + dropped, by reason. The sealed rows were not tokenised."""
    kept = {"train": len(used[0]), "valid": len(used[1]), "test": len(splits.test)}
    lost = len(splits.train) + len(splits.valid) - kept["train"] - kept["valid"]
    dropped = splits.dropped() | ({"length": lost} if lost else {})
    return {"read": splits.read, **kept, "duplicates": splits.duplicates, "dropped": dropped, "sha256": splits.digest()}


def _store(
    run: Run, folder: Path, log: track.Log, scores: dict[str, float],
    before: evaluate.Scored, after: evaluate.Scored, step: int, rival: str,
) -> None:  # fmt: skip
    """Write the tables of rows and labels, and show scores, examples and adapter in the tracking store."""
    beside = ("nats", "prediction", "reward")
    rows = [{**b, **{f"{rival}_{k}": a[k] for k in beside if k in a}, **{k: a[k] for k in a if k == "reference_reward"}}
            for a, b in zip(before.table, after.table, strict=True)]  # fmt: skip
    _write_table(folder / "examples.parquet", rows)
    log.metrics({"valid/loss": scores["valid/loss"]}, step)
    curves = ("valid/loss", "train/loss")
    log.metrics({k: v for k, v in scores.items() if k not in curves}, 0)  # single values: the UI draws bars
    log.table(shown(rows, rival, run.eval.examples), "examples")
    log.files(folder / "examples.parquet")
    if (folder / "adapter").exists():  # a whole model stays in the run's folder, it would be kept twice
        log.files(folder / "adapter", "adapter")
    if after.labels:
        lines = [{**new, f"{rival}_f1": old["f1"]} for old, new in zip(before.labels, after.labels, strict=True)]
        write_json(folder / "labels.json", lines)
        log.table(lines, "labels")


def shown(rows: list[dict[str, Any]], rival: str, most: int) -> list[dict[str, Any]]:
    """Cut rows to what a person looks at in the tracking store."""
    names = ("prompt", "reference", f"{rival}_prediction", "prediction", f"{rival}_reward", "reward",
             "reference_reward", "exact_match", "jaccard", "f1", "chrf", "rouge_l")  # fmt: skip
    return [{name: row[name] for name in names if name in row} for row in rows[:most]]


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    with naming(path):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
