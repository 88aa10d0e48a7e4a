"""`python -m ftexp.doctor`: probe the machine, the libraries and the recipe before a run or sweep is started.

Takes the overrides of `ftexp.run`. One line a probe: ok, warn or FAIL, the figure that was measured, and what to do. Of
a sweep the first trial of each model and data is probed. Nothing is trained but the tiny model, and nothing is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ftexp import api, config, experiment, overrides, plan, probe, verb
from ftexp.config import Run
from ftexp.errors import ConfigError, MachineError
from ftexp.probe import Finding, State
from ftexp.progress import quiet_libraries
from ftexp.sweep import plugin

OUTPUTS = Path("outputs")
COLOURS = {State.ok: "green", State.warn: "yellow", State.fail: "bold red"}


def asked(argv: list[str]) -> tuple[list[Run], int, int]:
    """Check a command line as `ftexp.run` does; return runs that differ in model or data, and trials and workers.

    Raises:
        FtexpError: `ftexp.run` would refuse it.
    """
    if overrides.runs(argv) is None:
        raise ConfigError("doctor takes overrides and -m, not --cfg or --info")
    if overrides.runs(argv) == "single":
        run = api.compose(argv)
        experiment.check(run, None)
        experiment.prepare(run)
        return [run], 1, 1
    _, options, runs = plan.launched(argv)
    apart = list({config.digest(r.model, r.quant, r.data): r for r in reversed(runs)}.values())[::-1]
    for run in apart:
        experiment.prepare(run)
    return apart, (options.n_trials or len(runs)) * options.replicates, max(1, options.workers)


def examine(argv: list[str]) -> dict[str, list[Finding]]:
    """Probe what a command line stands on; findings by what tells the runs apart.

    Raises:
        FtexpError: `ftexp.run` would refuse it.
    """
    runs, trials, workers = asked(argv)
    told = {}
    for run in runs:
        name = f"{run.model.path or run.model.kind.value} on {run.data.path or run.data.kind.value}"
        told[name if name not in told else f"{name} ({len(told)})"] = probe.every(run, OUTPUTS, trials, workers)
    return told


def lines(found: list[Finding]) -> list[Text]:
    """Write findings as lines: state, name, figure, and the remedy behind an arrow."""
    made = []
    for one in found:
        text = Text.assemble((f"{one.state.value:5}", COLOURS[one.state]), f" {one.name:13} {one.told}")
        made.append(text.append(f" -> {one.remedy}") if one.remedy else text)
    return made


def plain(told: dict[str, list[Finding]]) -> dict[str, Any]:
    """Return findings as plain values."""
    keys = ("name", "told", "remedy")
    return {
        "ok": not _failed(told),
        "probes": {name: [{"state": one.state.value, **{k: getattr(one, k) for k in keys}} for one in found]
                   for name, found in told.items()},
    }  # fmt: skip


def _failed(told: dict[str, list[Finding]]) -> list[str]:
    return [one.name for found in told.values() for one in found if one.state is State.fail]


def main() -> int:
    """Run the command line; return the exit code."""
    config.register()
    plugin.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hands errors to us, to be told in one line
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    return verb.ended(_main)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="ftexp doctor", description=__doc__, allow_abbrev=False,
        usage="%(prog)s [overrides of ftexp.run] [--config-dir DIR] [-m] [--json]")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args, left = parser.parse_known_args(sys.argv[1:])
    try:
        told = examine(overrides.prepare(left))
    except config.COMPOSING as error:
        raise ConfigError(overrides.told(error)) from error
    if args.json:
        print(verb.as_json(plain(told)))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for name, found in told.items():
            console.print(*([Text(name)] if len(told) > 1 else []), *lines(found), sep="\n")
    return MachineError.exit_code if _failed(told) else 0


if __name__ == "__main__":
    sys.exit(main())
