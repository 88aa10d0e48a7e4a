"""`python -m ftexp.sweep`: list, look at, stop, resume and export sweeps from their folders."""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ftexp import config, runs
from ftexp.errors import ConfigError, MachineError
from ftexp.files import read_trial
from ftexp.metrics import written
from ftexp.progress import Sheet, quiet_libraries, say, warn
from ftexp.sweep import frozen
from ftexp.sweep.frozen import Frozen
from ftexp.verb import as_json, ended

if TYPE_CHECKING:
    from optuna import Study

SWEEPS = runs.OUTPUTS / "sweeps"
ENDED = ("complete", "pruned", "skipped", "failed")
"""States of trials that are over."""
STOP_SECONDS = 90.0
"""Time `stop` waits for the running trials to keep a checkpoint and end."""


def find(name: str) -> Path:
    """Return the folder of a sweep given its name or its folder.

    Raises:
        MachineError: there is none, or several have the name.
    """
    folder = runs.place(name, frozen.FILE)
    if (folder / frozen.FILE).exists():
        return folder
    there = ", ".join(sorted(runs.sweeps().values())) or "none"
    raise MachineError(f"{name}: no sweep of this name in {SWEEPS}, and no folder of one; there are: {there}")


def opened(folder: Path) -> tuple[Frozen, Study]:
    """Open what was frozen of a sweep, and its record."""
    from ftexp.sweep import worker

    sweep = frozen.load(folder.absolute())
    return sweep, worker.open_study(sweep)


def run_by(folder: Path, record: Study) -> str | None:
    """Tell which process runs a sweep, as `<pid> on <host>`; None where none does.

    Where the launch is gone that is one of this machine that is still at a trial: a helper, or a worker that was left.
    """
    from optuna.trial import TrialState

    from ftexp.sweep import plugin, study

    if (holder := plugin.running(folder)) is not None:
        return holder
    running = record.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    signed = (t.user_attrs["ftexp:worker"] for t in running if "ftexp:worker" in t.user_attrs and study.alive(t))
    return next((f"{w['pid']} on {w['host']}" for w in signed if w["host"] == study.HOST), None)


def summary(folder: Path) -> dict[str, Any]:
    """Sum a sweep up for `ls`: name, states, best point and who runs it."""
    from ftexp.sweep import screen

    sweep, record = opened(folder)
    at = screen.glance(sweep, record)
    total = sum(at.counts.values())
    return {
        "name": sweep.name, "trials": total, **{s: at.counts.get(s, 0) for s in screen.STATES},
        "objective": sweep.objectives[0], "best_trials": at.best[0] if at.best else None,
        "best": at.best[1] if at.best else None, "run_by": run_by(folder, record), "folder": str(folder),
    }  # fmt: skip


def ls(args: argparse.Namespace) -> int:
    """List the sweeps here; those whose record cannot be reached are told on stderr."""
    if args.names:
        raise ConfigError(f"ls takes no name, got {args.names[0]}; ftexp sweep show {args.names[0]} shows one sweep")
    rows = []
    there = runs.sweeps()
    for folder in sorted(there, key=lambda place: (place / frozen.FILE).stat().st_mtime):
        try:
            rows.append(summary(folder))
        except MachineError as error:  # such as a database that is down; the other sweeps are listed
            warn(f"{there[folder]} is not listed: {error}")
    if args.json:
        print(as_json(rows))
        return 0
    table = Sheet()
    for title in ("sweep", "done", *ENDED, "best", "state"):
        table.column(title, right=title not in ("sweep", "best", "state"))
    for row in rows:
        done = sum(row[state] for state in ENDED)
        best = (
            "" if row["best"] is None else f"{row['objective']} {written(row['best'])} ({_numbers(row['best_trials'])})"
        )
        state = f"process {row['run_by']}" if row["run_by"] else "ended" if done == row["trials"] else "stopped"
        counts = (str(row[state]) for state in ENDED)
        where = "" if Path(row["folder"]) == SWEEPS / row["name"] else f" in {row['folder']}"
        table.row(f"{row['name']}{where}", f"{done}/{row['trials']}", *counts, best, state)
    Console(width=None if sys.stdout.isatty() else 132).print(table if rows else f"no sweeps in {SWEEPS}")
    return 0


def _numbers(trials: list[int]) -> str:
    return f"trial {','.join(map(str, trials))}"


def show(args: argparse.Namespace) -> int:
    """Show the trials of a sweep as they stand; with `--watch` until it ends."""
    from ftexp.sweep import screen

    folder = find(args.name)
    sweep, record = opened(folder)
    console = Console(width=None if sys.stdout.isatty() else 132)
    if args.json:
        print(as_json(rows_of(sweep, record)))
        return 0
    if args.watch and console.is_terminal:
        with screen.live(sweep, record) as refresh:
            while run_by(folder, record):
                refresh()
                time.sleep(screen.FRESH_SECONDS)
    console.print(screen.table(sweep, record))
    return 0


def stop(args: argparse.Namespace) -> int:
    """Have a sweep's running trials keep a checkpoint and end; none is lost."""
    from ftexp.sweep import screen, worker

    folder = find(args.name)
    sweep, record = opened(folder)
    holder = run_by(folder, record)
    if holder is None:
        _told(args, folder, f"{sweep.name} is not running: {screen.line(sweep, record)}")
        return 0
    _ask_to_stop(record)
    say(f"asked process {holder} to stop; waiting for its running trials to keep a checkpoint")
    until = time.monotonic() + STOP_SECONDS
    while (at := run_by(folder, record)) and time.monotonic() < until:
        if at == holder and not record.user_attrs.get(worker.LEAVE):  # a launch that has just begun takes orders back
            _ask_to_stop(record)
        time.sleep(0.2)
    if holder := run_by(folder, record):
        raise MachineError(f"{sweep.name}: process {holder} still runs; it ends after the step or score under way")
    line, way = screen.line(sweep, record), runs.called(folder, sweep.name)
    _told(args, folder, f"{sweep.name} stopped: {line}; goes on with: ftexp sweep resume {way}")
    return 0


def _ask_to_stop(record: Study) -> None:
    from ftexp.sweep import worker

    record.set_user_attr(worker.STOP, "stopped by `ftexp sweep stop`")
    record.set_user_attr(worker.LEAVE, True)


def _told(args: argparse.Namespace, folder: Path, line: str) -> None:
    """Print where a sweep stands: the line, or what `ls --json` says of it."""
    print(as_json(summary(folder)) if args.json else line)


def resume(args: argparse.Namespace) -> int:
    """Run what is missing of a sweep from what was frozen at its launch, whatever `conf/` holds by now."""
    from ftexp import report
    from ftexp.sweep import plugin

    folder = find(args.name).resolve()  # what was kept of the launch has no links in it
    sweep = frozen.load(folder)
    home = Path(sweep.cwd)
    if sweep.cwd and folder.is_relative_to(home) and home.is_dir() and home != Path.cwd():
        say(f"goes on in {home}, where it was launched: its files and its tracking store may be named from there")
        os.chdir(home)
    with plugin.only_supervisor(folder, sweep.name):
        plugin.go_on(sweep, args.workers)
    if args.json:
        print(as_json(summary(folder)))
        return 0
    report.show(Path(os.path.relpath(folder)))
    return 0


def rows_of(sweep: Frozen, record: Study) -> list[dict[str, Any]]:
    """Return one flat entry a trial: number, state, reason, point, scores and where its files are."""
    from ftexp.sweep import screen, study

    rows = []
    size = sweep.options.replicates
    for trial in study.counted(record):
        number = study.ticket(trial)
        kept = read_trial(sweep.folder / str(number)) or {}
        point = trial.params or trial.system_attrs.get("fixed_params") or {}
        config = kept.get("config", {})  # where a value is a number, not the text of an override
        point = {key: config.get(key, value) for key, value in point.items()}
        rows.append({
            "trial": number, "point": number // size, "replicate": number % size,
            "state": screen.state_of(trial), "kind": trial.user_attrs.get("ftexp:kind", ""),
            "reason": trial.user_attrs.get("ftexp:reason", ""), **point, **kept.get("scores", {}),
            "retries": trial.user_attrs.get("ftexp:retries", 0), "mlflow_run": kept.get("mlflow_run"),
            "folder": os.path.relpath(sweep.folder / str(number)),
        })  # fmt: skip
    return rows


def export(args: argparse.Namespace) -> int:
    """Write the trials as CSV or JSON to stdout."""
    rows = rows_of(*opened(find(args.name)))
    if args.json or args.format == "json":
        print(as_json(rows))
        return 0
    titles = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(sys.stdout, titles, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return 0


def _cell(value: Any) -> Any:
    """Write a list as JSON, not as Python's text."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


VERBS = {
    ls: "list the sweeps that were launched here",
    show: "show the trials of a sweep",
    stop: "end a running sweep, each trial with a checkpoint",
    resume: "run what is missing of a sweep, as it was frozen at its launch",
    export: "write the trials as CSV or JSON",
}


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser("ftexp sweep", description="List, look at, stop, resume and export sweeps.")
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    for run, about in VERBS.items():
        verb = verbs.add_parser(run.__name__, help=about, description=run.__doc__)
        verb.set_defaults(run=run)
        if run is ls:
            verb.add_argument("names", nargs="*", help=argparse.SUPPRESS)  # refused with what to type instead
        else:
            verb.add_argument("name", help="name of the sweep, or its folder")
        verb.add_argument("--json", action="store_true", help="for scripts")
        if run is show:
            verb.add_argument("--watch", action="store_true", help="keep the screen up to date until the sweep ends")
        if run is resume:
            verb.add_argument("--workers", type=int, default=None, help="processes; default as at the launch")
        if run is export:
            verb.add_argument("--format", choices=("csv", "json"), default="csv")
    return made


def _no_verb(given: str) -> int:
    known = [run.__name__ for run in VERBS]
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"sweep must be followed by one of {', '.join(known)}, got {given!r}{hint}")


def main() -> int:
    """Run the command line; return the exit code."""
    from ftexp.train import control

    if (given := sys.argv[1:2]) and not given[0].startswith("-") and given[0] not in (run.__name__ for run in VERBS):
        return ended(lambda: _no_verb(given[0]))
    args = parser().parse_args()
    quiet_libraries()
    config.register()
    with control.listening():
        return ended(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
