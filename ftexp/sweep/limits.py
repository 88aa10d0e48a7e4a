"""Limits on what a trial is planned to take (`sweep.plan_at_most`): seen before anything of it is loaded or trained."""

from __future__ import annotations

from pathlib import Path

from ftexp import data, estimate, experiment
from ftexp.config import Run, plain
from ftexp.errors import ConfigError
from ftexp.estimate import GIB, Plan
from ftexp.files import write_json
from ftexp.model import compute
from ftexp.sweep.options import Options, Over


def planned(run: Run, options: Options) -> Plan:
    """Plan a trial for the device it would train on.

    Raises:
        FtexpError: the run would be refused.
    """
    task = experiment.TASKS[run.trainer.kind](run, data.load(run.data))
    given = estimate.rows(task.train, run)
    how = compute.policy(run.model, given.longest)
    return experiment.planned(run, task, given, how, options.gpus_per_trial)


def amounts(plan: Plan, options: Options) -> dict[str, float]:
    """Return what a plan is held against, by the names of `sweep.plan_at_most`."""
    told = {
        "memory_gib": plan.memory / GIB,
        "checkpoint_gib": plan.checkpoint / GIB,
        "trainable": float(plan.trainable),
        "tokens": float(plan.padded),
        "tflop": plan.flops / 1e12,
    }
    if options.tokens_per_second is not None:
        told["hours"] = plan.padded / options.tokens_per_second / 3600
        if options.usd_per_hour is not None:
            told["usd"] = estimate.dollars(3600 * told["hours"], options.usd_per_hour)
    return told


def over(plan: Plan, options: Options) -> list[str]:
    """Name the limits that a plan passes, with both values."""
    told = amounts(plan, options)
    return [
        f"takes {told[name]:.6g} {name}, sweep.plan_at_most.{name}={most:g}"
        for name, most in options.plan_at_most.items() if told[name] > most
    ]  # fmt: skip


def refuse(named: list[tuple[str, Run]], options: Options) -> None:
    """Refuse a sweep of which a trial passes a limit, unless such trials are to be skipped.

    Raises:
        ConfigError: names each of them; nothing was started.
    """
    if not options.plan_at_most or options.over is Over.skip:
        return
    found = [f"{label}: {text}" for label, run in named for text in over(planned(run, options), options)]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ConfigError(f"{'; '.join(found[:5])}{more}; sweep.over=skip leaves such trials out and says so")


def passed(run: Run, options: Options) -> str:
    """Return why a trial is not to run; an empty text where it may."""
    return "; ".join(over(planned(run, options), options)) if options.plan_at_most else ""


def keep(run: Run, label: str, folder: Path, reason: str) -> None:
    """Write into the folder of a trial that is not run why it is not."""
    told = {"label": label, "state": "skipped", "config": experiment.identity(run), "folder": str(folder)}
    write_json(folder / "trial.json", told | {"error": reason})


def mark(options: Options) -> str:
    """Spell out the limits, to tell later whether a skipped trial would be skipped again."""
    keys = ("plan_at_most", "tokens_per_second", "usd_per_hour")
    return str({key: value for key, value in plain(options).items() if key in keys})
