"""`python -m ftexp.plan`: what a run or a sweep will take, before anything is loaded or downloaded.

Takes the overrides of `ftexp.run`. Models are put together on the meta device from the sizes of their layers, so that
parameters, steps and operations are those of the real run, exactly; `ftexp/estimate.py` says what each number is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from rich.console import Console

from ftexp import config, data, estimate, experiment, labels, model, overrides, show, verb
from ftexp import run as command
from ftexp.config import Method, Run, Variant
from ftexp.errors import ConfigError
from ftexp.estimate import GIB, Plan, Rows
from ftexp.model import architecture, compute
from ftexp.progress import Sheet, quiet_libraries
from ftexp.sweep import frozen, limits, plugin
from ftexp.sweep.options import Options, Sampler
from ftexp.sweep.space import Space
from ftexp.train import answers, sft

if TYPE_CHECKING:
    from ftexp.data import Splits

PROBE = 10
"""Optimizer steps of a probe; the first one warms up and is not counted."""
TEMPLATE = 64
"""Tokens granted to the chat template where a row's bytes stand for its tokens."""
WIDTH = 160
"""Letters in a line where there is no terminal."""
OVER = 1
"""Exit code where a limit is passed."""


@dataclass(frozen=True)
class Wanted:
    """What was asked beside the overrides."""

    rows: int | None = None
    tokens: int | None = None
    labels: int | None = None
    probe: bool = False
    rate: float | None = None
    usd_per_hour: float | None = None
    budget_usd: float | None = None
    memory_gib: float | None = None


@dataclass(frozen=True)
class Trial:
    """A planned trial."""

    label: str
    """Its overrides."""
    run: Run
    plan: Plan
    rate: float | None = None
    """Tokens a second in training, padding included."""

    @property
    def seconds(self) -> float | None:
        """Seconds of training; scoring comes on top."""
        return None if self.rate is None else self.plan.padded / self.rate


@dataclass(frozen=True)
class Whole:
    """A run, or a sweep."""

    trials: list[Trial]
    options: Options | None
    """Of a sweep."""
    count: int
    """Trials that will run; more than `trials` where a search draws them, then each counts as the dearest planned."""

    def total(self, of: Callable[[Trial], float]) -> float:
        """Sum over the trials that will run."""
        values = [of(trial) for trial in self.trials]
        return sum(values) if self.count == len(values) else self.count * max(values)


def rows(run: Run, wanted: Wanted) -> Rows:
    """Count the tokens of training rows: as given, by the tokenizer, or from above by bytes where it is not here.

    Raises:
        FtexpError: the data of the run would be refused.
    """
    paired = run.trainer.kind in answers.KINDS
    if wanted.rows is not None and wanted.tokens is not None:
        learned = 0 if run.trainer.kind is Method.classify else wanted.tokens * (1 + paired)
        learned = min(learned, run.trainer.max_new_tokens or learned)  # with `kind=rloo`
        sizes = (wanted.tokens,) * wanted.rows
        worse = sizes if paired else ()
        return Rows(sizes, (learned,) * wanted.rows, "as given by --rows and --tokens", worse)
    splits = data.load(run.data)
    if architecture.readable(run.model):
        classified = run.trainer.kind is Method.classify
        made = experiment.classified if classified else experiment.paired if paired else experiment.tokenised
        return estimate.rows(made(run, splits)[0], run)
    most = run.data.max_length
    lengths, worse = (
        tuple(min(most, len(text.encode()) + TEMPLATE) for text in texts)
        for texts in (
            (f"{r.prompt}{r.completion}" for r in splits.train),
            (f"{r.prompt}{r.rejected}" for r in splits.train),
        )
    )
    learned = tuple(a + b * paired for a, b in zip(lengths, worse, strict=True))
    learned = (0,) * len(lengths) if run.trainer.kind is Method.classify else learned
    return Rows(lengths, learned, "at most: by bytes, the tokenizer is not on this machine", worse if paired else ())


def outputs(run: Run, splits: Splits) -> int:
    """Count the labels of a classifier's head from the rows; 0 where the model writes text."""
    if run.trainer.kind is not Method.classify:
        return 0
    told = (labels.parse(row.completion, run.eval.labels or ",") for row in (*splits.train, *splits.valid))
    return len(frozenset().union(*told))


def trial(label: str, run: Run, wanted: Wanted) -> Trial:
    """Plan one trial.

    Raises:
        FtexpError: the run would be refused.
    """
    sft.arguments(run.trainer, "cpu", run.seed, "", 1)  # refuses keywords that TRL does not know
    classified = run.trainer.kind is Method.classify
    if wanted.labels is not None and not classified:
        raise ConfigError(f"--labels={wanted.labels} needs trainer.kind=classify, got {run.trainer.kind.value}")
    told = wanted.labels or (outputs(run, data.load(run.data)) if classified else 0)
    heads = told or int(run.trainer.kind is Method.reward)
    given = rows(run, wanted)
    return Trial(label, run, estimate.trial(run, given, compute.policy(run.model, given.longest), heads), wanted.rate)


def gather(argv: list[str], wanted: Wanted) -> Whole:
    """Check the command line as `ftexp.run` does, and plan what it asks for.

    Raises:
        FtexpError: `ftexp.run` would refuse it.
    """
    if overrides.runs(argv) is None:
        raise ConfigError("plan takes overrides and -m, not --cfg or --info")
    if overrides.runs(argv) == "single":
        run = show.compose(argv)
        if wanted.rows is None:
            experiment.check(run, None)
        return Whole([trial("", run, wanted)], None, 1)
    return _sweep(*launched(argv), wanted)


def launched(argv: list[str]) -> tuple[Space, Options, list[Run]]:
    """Check the command line of a sweep as its launch does, and start nothing.

    Raises:
        FtexpError: the sweep would be refused.
    """
    command.check_composed(argv)
    checked: list[tuple[Space, Options, list[Run]]] = []
    plugin.Sweeper.instead = lambda *given: checked.append(given)
    sys.argv[1:] = argv
    try:
        hydra.main(**overrides.BASE, config_path=str(overrides.CONF), config_name="config")(lambda _: None)()
    finally:
        plugin.Sweeper.instead = None
    return checked[0]


def _sweep(searched: Space, options: Options, runs: list[Run], wanted: Wanted) -> Whole:
    """Plan each point and replicate of a grid, or the ends and values of every axis of a search."""
    searching = options.sampler is not Sampler.grid
    points = frozen.corners(searched) if searching else searched.grid() or [{}]
    named = [(" ".join(f"{k}={v}" for k, v in point.items()), run) for point, run in zip(points, runs, strict=True)]
    if searching:
        trials = [trial(label, run, wanted) for label, run in dict(named).items()]
        return Whole(trials, options, (options.n_trials or 1) * options.replicates)
    seeds = [(f"{label} seed={run.seed + n}".strip() if n else label, replace(run, seed=run.seed + n))
             for label, run in named for n in range(options.replicates)]  # fmt: skip
    return Whole([trial(label, run, wanted) for label, run in seeds], options, len(seeds))


def probed(whole: Whole, wanted: Wanted) -> Whole:
    """Measure how fast tokens pass: once for each model, format, batch and length of rows that the trials have."""
    rates: dict[str, float] = {}
    trials = []
    for one in whole.trials:
        run = one.run
        shape = (run.trainer.batch, run.trainer.gradient_checkpointing, run.trainer.kind.value)
        key = f"{config.digest(run.model, run.quant, run.data)} {shape}"
        if key not in rates:
            rates[key] = probe(run)
        trials.append(replace(one, rate=rates[key]))
    return replace(whole, trials=trials)


def probe(run: Run) -> float:
    """Train for ten steps as the run would and return tokens a second, padding included.

    Raises:
        FtexpError: the run would be refused, or ends badly.
    """
    import tempfile

    from ftexp.train import TRAINERS, checkpoints
    from ftexp.train.control import Control

    short = replace(run, trainer=replace(run.trainer, steps=PROBE, report_steps=0, checkpoint_minutes=None))
    task = experiment.TASKS[run.trainer.kind](short, data.load(run.data))
    base = model.load(run.model, run.quant, task.outputs, estimate.rows(task.train, short).longest)
    task.ready(base)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as work, model.adapted(base, run.lora, run.seed) as tuned:
        TRAINERS[run.trainer.kind](
            task.run, base, tuned, task.train, task.valid, checkpoints.store(Path(work) / "probe", {}),
            lambda *_: ends.append(time.monotonic()), Control(), **task.more,
        )  # fmt: skip
    return speed(estimate.rows(task.train, short), short, ends)


def speed(given: Rows, run: Run, ends: list[float]) -> float:
    """Tokens a second between the ends of the first and the last step."""
    first = replace(run, trainer=replace(run.trainer, steps=1))
    padded = [sum(b.rows * b.longest for b in estimate.batches(given, r.trainer, r.seed)) for r in (run, first)]
    return (padded[0] - padded[1]) / (ends[-1] - ends[0])


def over(whole: Whole, wanted: Wanted) -> list[str]:
    """Name the trials that pass a limit: of memory each by itself, of money in their order."""
    told, spent = [], 0.0
    for number, one in enumerate(whole.trials):
        name = f"trial {number}{f' ({one.label})' if one.label else ''}"
        if wanted.memory_gib is not None and one.plan.memory > wanted.memory_gib * GIB:
            told.append(f"{name} takes {one.plan.memory / GIB:.2f} GiB, --memory-gib={wanted.memory_gib:g}")
        told += [f"{name} {text}" for text in (limits.over(one.plan, whole.options) if whole.options else ())]
        if wanted.budget_usd is not None:
            spent += _dollars(one, wanted) or 0
            if spent > wanted.budget_usd:
                told.append(f"{name} brings the price to {spent:.2f} dollars, --budget-usd={wanted.budget_usd:g}")
    price = whole.total(lambda one: _dollars(one, wanted) or 0)
    if wanted.budget_usd is not None and whole.count > len(whole.trials) and price > wanted.budget_usd:
        told.append(f"{whole.count} trials take up to {price:.2f} dollars, --budget-usd={wanted.budget_usd:g}")
    return told


def _dollars(one: Trial, wanted: Wanted) -> float | None:
    if one.seconds is None or wanted.usd_per_hour is None:
        return None
    return estimate.dollars(one.seconds, wanted.usd_per_hour)


def as_json(whole: Whole, wanted: Wanted, passed: list[str]) -> dict[str, Any]:
    """Tell a plan as plain values."""
    trials = [
        {"trial": n, "overrides": one.label, **asdict(one.plan), "tokens_per_second": one.rate,
         "seconds": one.seconds, "dollars": _dollars(one, wanted)} for n, one in enumerate(whole.trials)
    ]  # fmt: skip
    sums = {key: whole.total(lambda one, k=key: getattr(one.plan, k)) for key in ("steps", "tokens", "padded", "flops")}
    known = wanted.usd_per_hour is not None and all(one.rate for one in whole.trials)
    return {
        "trials": trials, "count": whole.count, **sums,
        "memory": max(one.plan.memory for one in whole.trials),
        "seconds": whole.total(lambda one: one.seconds or 0) if all(one.rate for one in whole.trials) else None,
        "dollars": whole.total(lambda one: _dollars(one, wanted) or 0) if known else None,
        "over": passed,
    }  # fmt: skip


def single(one: Trial, wanted: Wanted) -> list[tuple[str, str]]:
    """List what a trial takes: name and value."""
    plan, run = one.plan, one.run
    halves = f", {plan.packed:,} as packed" if plan.packed != plan.total else ""
    parts = ("weights", "adapter", "copy", "gradients", "optimizer", "activations")
    sizes = {name: getattr(plan, name) for name in parts} | ({"reward model": plan.judge} if plan.judge else {})
    listed = [
        ("parameters", f"{plan.total:,}{halves}"),
        ("trainable", f"{plan.trainable:,}, {plan.share:.4%}"),
        *((name, "not known" if size is None else _bytes(size)) for name, size in sizes.items()),
        ("peak of training", _bytes(plan.memory)),
        ("footprint", f"{plan.footprint / 1e6:.6f} MB, {plan.footprint_adapted / 1e6:.6f} MB with the adapter"),
        ("model file" if run.lora.variant is Variant.none else "adapter file", _bytes(plan.adapter_file)),
        ("checkpoint", _bytes(plan.checkpoint)),
        ("steps", f"{plan.steps:,} of {run.trainer.batch * run.trainer.accumulation} rows"),
        ("tokens", f"{plan.tokens:,}, {plan.padded:,} with padding ({plan.counted})"),
        ("operations", f"{plan.flops:,}"),
        *([("written", f"{plan.written:,} tokens at most")] if plan.written else []),
    ]
    if one.seconds is not None:
        listed.append(("time", f"{one.seconds / 3600:.3f} hours of training at {one.rate:,.0f} tokens a second"))
    if (price := _dollars(one, wanted)) is not None:
        listed.append(("price", f"{price:.2f} dollars at {wanted.usd_per_hour:g} an hour"))
    return listed


def _bytes(size: int) -> str:
    """Spell out bytes.

    >>> _bytes(2206341312)
    '2.055 GiB (2,206,341,312 bytes)'
    """
    return f"{size / GIB:.3f} GiB ({size:,} bytes)"


def table(whole: Whole, wanted: Wanted) -> Sheet:
    """Draw a sweep: a line a trial."""
    made = Sheet()
    for name in ("trial", "overrides", "trainable", "share", "GiB", "adapter MB", "steps", "tokens", "TFLOP"):
        made.column(name, right=name != "overrides")
    timed = all(one.rate for one in whole.trials)
    for name in (("hours",) if timed else ()) + (("dollars",) if timed and wanted.usd_per_hour is not None else ()):
        made.column(name, right=True)
    for number, one in enumerate(whole.trials):
        plan = one.plan
        cells = [str(number), one.label, f"{plan.trainable:,}", f"{plan.share:.3%}", f"{plan.memory / GIB:.2f}",
                 f"{plan.adapter_file / 1e6:.1f}", f"{plan.steps:,}", f"{plan.padded:,}",
                 f"{plan.flops / 1e12:,.1f}"]  # fmt: skip
        price = _dollars(one, wanted)
        cells += [] if one.seconds is None else [f"{one.seconds / 3600:.3f}"]
        made.row(*cells, *([] if price is None else [f"{price:.2f}"]))
    return made


def tell(whole: Whole, wanted: Wanted, console: Console) -> None:
    """Print a plan."""
    first = whole.trials[0]
    if len(whole.trials) == whole.count == 1:
        for name, value in single(first, wanted):
            console.print(f"{name:17} {value}", highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(table(whole, wanted))
        up = "" if whole.count == len(whole.trials) else "up to "
        told = as_json(whole, wanted, [])
        line = (f"{whole.count} trials: {up}{told['padded']:,.0f} tokens ({first.plan.counted}), "
                f"{told['flops'] / 1e12:,.1f} TFLOP, {told['memory'] / GIB:.2f} GiB at most")  # fmt: skip
        line += "" if told["seconds"] is None else f", {up}{told['seconds'] / 3600:.3f} hours"
        line += "" if told["dollars"] is None else f", {up}{told['dollars']:.2f} dollars"
        console.print(line, highlight=False, soft_wrap=True)
    for note in dict.fromkeys(note for one in whole.trials for note in one.plan.notes):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def parse(argv: list[str]) -> tuple[Wanted, bool, list[str]]:
    """Read our own options; what is left is for Hydra.

    Raises:
        ConfigError: an option is out of range, or needs another one.
    """
    parser = argparse.ArgumentParser(prog="ftexp plan", description=__doc__, allow_abbrev=False,
        usage="%(prog)s [overrides of ftexp.run] [--config-dir DIR] [-m] [options]")  # fmt: skip
    parser.add_argument("--rows", type=int, help="plan for so many training rows instead of the data's")
    parser.add_argument("--tokens", type=int, help="tokens of each of them")
    parser.add_argument("--labels", type=int, help="labels of a classifier's head, with --rows")
    parser.add_argument("--probe", action="store_true", help="load the model, train ten steps, tell the time")
    parser.add_argument("--tokens-per-second", dest="rate", type=float, help="instead of --probe: as measured before")
    parser.add_argument("--usd-per-hour", type=float, help="price of the machine, e.g. 0.29")
    parser.add_argument("--budget-usd", type=float, help=f"limit for all trials together; exit code {OVER} beyond it")
    parser.add_argument("--memory-gib", type=float, help=f"limit for each trial; exit code {OVER} beyond it")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args, left = parser.parse_known_args(argv)
    options = vars(args)
    plain = options.pop("json")
    wanted = Wanted(**options)
    for name, value in asdict(wanted).items():
        flag = "--tokens-per-second" if name == "rate" else f"--{name.replace('_', '-')}"
        config.require(value is None or value is False or value > 0, flag, value, "above 0")
    if (wanted.rows is None) != (wanted.tokens is None):
        raise ConfigError("--rows and --tokens must be given together")
    if wanted.labels is not None and wanted.rows is None:
        raise ConfigError("--labels needs --rows and --tokens: the rows of the data name their labels")
    if wanted.probe and (wanted.rows or wanted.rate):
        raise ConfigError("--probe trains on the rows of the data: leave out --rows and --tokens-per-second")
    timed = wanted.probe or wanted.rate is not None
    if wanted.usd_per_hour is not None and not timed:
        raise ConfigError("--usd-per-hour needs the time: --probe, or --tokens-per-second")
    if wanted.budget_usd is not None and wanted.usd_per_hour is None:
        raise ConfigError("--budget-usd needs --usd-per-hour")
    return wanted, plain, left


def main() -> int:
    """Run the command line; return the exit code."""
    config.register()
    plugin.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hands errors to us, to be told in one line
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    return verb.ended(_main)


def _main() -> int:
    wanted, plain, left = parse(sys.argv[1:])
    try:
        whole = gather(overrides.prepare(left), wanted)
    except config.COMPOSING as error:
        raise ConfigError(overrides.told(error)) from error
    if wanted.probe:
        whole = probed(whole, wanted)
    passed = over(whole, wanted)
    if plain:
        print(verb.as_json(as_json(whole, wanted, passed), None))
    else:
        console = Console()
        tell(whole, wanted, console if console.is_terminal else Console(width=WIDTH))
    for text in passed:
        print(f"ftexp: over the limit: {text}", file=sys.stderr)
    return OVER if passed else 0


if __name__ == "__main__":
    sys.exit(main())
