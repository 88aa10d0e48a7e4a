"""`python -m ftexp.confirm <sweep>`: train the winner again on fresh seeds and score it once on the sealed rows.

The best of many scores looks better than it is, since chance helped to choose it (`stats.noise.expected_maximum`). Rows
and seeds that had no part in the choice tell what is left.

An opening of the sealed rows stands in `confirm.json` before a single one of them is tokenised, so that no crash hides
it, with its plan: which points on which seeds. What was killed goes on with that plan and opens nothing anew.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import json
import math
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ftexp import config, data, experiment, facts, metrics, registry, report, runs, track, verb
from ftexp.config import Run, Track, Variant
from ftexp.errors import ConfigError, DataError, Diverged, FtexpError, MachineError, TrialsFailed
from ftexp.files import read_trial, write_json
from ftexp.metrics import METRICS, SCORES, Direction
from ftexp.progress import Sheet, quiet_libraries, say, warn
from ftexp.runs import sweeps as known
from ftexp.sealed import FILE, before, line, lines, number, openings, ranged, times
from ftexp.sweep import __main__ as sweeps
from ftexp.sweep import frozen, plugin
from ftexp.sweep.frozen import Frozen

if TYPE_CHECKING:
    from ftexp.board import Board
    from ftexp.compare import Verdict
    from ftexp.stats.columns import Interval
    from ftexp.stats.pairs import Comparison

SEEDS = 3
"""Fresh seeds where none are asked for: with fewer than two the noise between seeds stays unknown."""
WINNER, CHEAPEST = "winner", "cheapest"


@dataclass(frozen=True)
class Member:
    """A point that is trained again."""

    role: str
    """`winner`, or `cheapest` of those that cannot be told from it."""
    index: int
    """Its place among the points of the verdict."""
    label: str
    """Its overrides."""
    trials: list[int]
    """Numbers of its trials in the sweep."""
    run: Run
    """Its config as frozen at the launch."""

    def told(self) -> dict[str, Any]:
        """Say which point this is; a plan that says the same is the same plan."""
        kept = {key: value for key, value in experiment.identity(self.run).items() if key != "seed"}
        return {"role": self.role, "label": self.label, "trials": self.trials, "config": kept}


@dataclass(frozen=True)
class Plan:
    """What sealed rows are opened for."""

    sweep: Frozen
    verdict: Verdict
    trials: dict[int, dict[str, Any]]
    """Number -> contents of the `trial.json`."""
    members: list[Member]
    alone: str | None
    """Why there is no cheapest member beside the winner; None where there is one."""

    @property
    def objective(self) -> str:
        """The metric that ranked, without its split."""
        return self.verdict.objective.removeprefix("valid/")


def confirm(
    folder: Path, seeds: int | None = None, again: bool = False, by: str | None = None, name: str | None = None
) -> dict[str, Any]:
    """Confirm a sweep, go on with what a kill left of it, or return what is kept.

    Args:
        folder: of the sweep.
        seeds: fresh seeds a point; None takes those of the kept plan, else `SEEDS`.
        again: open the sealed rows once more; every output then says how often they were opened.
        by: score of held-out rows whose winner it is, as `valid/chrf`; None takes the sweep's first objective.
        name: registered model that the winner is to become, for which it must have an adapter.

    Returns:
        The last entry of `confirm.json`: opening, plan and result.

    Raises:
        ConfigError: the sweep has no sealed rows or ranks by something else than held-out scores, its points differ by
            the seed, `by` is no score that its trials have, its sealed rows were opened for another plan, or a winner
            with a `name` has no adapter.
        DataError: the rows are no longer those of the sweep.
        MachineError: the sweep is not finished, no point is complete, or its store is not there from this folder.
        TrialsFailed: the winner diverged on every fresh seed.
    """
    sweep, record = sweeps.opened(folder)
    with plugin.only_supervisor(sweep.folder, sweep.name):
        plan = _plan(sweep, record, by)
        if name is not None and plan.members[0].run.lora.variant is Variant.none:
            raise ConfigError(f"--register={name} needs an adapter, {plan.members[0].label} trained the whole model")
        kept = openings(sweep.folder)
        last = kept[-1] if kept and _asked_for(kept[-1], plan, seeds) else None
        if last is not None and "result" in last and not again:
            _write_page(sweep.folder)
            return last
        if sweep.mlflow_run is not None:
            track.check_here(sweep.track_uri, sweep.folder)
        if last is None or "result" in last:
            _check_sealed(plan)
            kept = [*kept, _opening(plan, seeds or SEEDS, again, kept)]
            _keep(sweep.folder, kept)
        return _carry_out(plan, kept)


def _check_sealed(plan: Plan) -> None:
    """Refuse to open rows that could not all be scored: the opening would be on record, and nothing come of it."""
    for member in plan.members:
        try:
            experiment.check_sealed(member.run)
        except (ConfigError, DataError) as error:
            raise type(error)(
                f"{error}; no sealed row was opened, and a sweep of another name, whose rows or keys fit them, can be "
                "confirmed"
            ) from error


def _keep(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Write the file of openings whole, with the line that `report` shows, and then the page."""
    write_json(folder / FILE, {"line": line(entries[-1]), "openings": entries})
    _write_page(folder)


def _write_page(folder: Path) -> None:
    """Write the page of a sweep that has one anew: it tells of the openings. Where that fails, it costs a line."""
    if not (folder / report.PAGE).exists():
        return
    try:
        report.write_page(folder, report.gather(folder))
    except FtexpError as error:
        warn(f"{report.PAGE} does not tell of the sealed rows: {error}")


def _plan(sweep: Frozen, record: Any, by: str | None) -> Plan:
    """Find the points to confirm in a finished sweep, by its own objective or another score."""
    from ftexp import compare  # numpy and scipy, after the command line is checked
    from ftexp.sweep import screen

    objective = by or sweep.objectives[0]
    if by is not None and objective not in {f"valid/{name}" for name in SCORES}:
        raise ConfigError(f"--by must be a score of held-out rows, as valid/chrf, got {by}")
    if not objective.startswith("valid/"):
        raise ConfigError(f"{sweep.name} ranks by {objective}, which no held-out row tells; only valid/ is confirmed")
    counts = screen.glance(sweep, record).counts
    if left := counts.get("waiting", 0) + counts.get("running", 0):
        raise MachineError(
            f"{sweep.name} must be finished, {left} of {sum(counts.values())} trials are not; it goes on with: "
            f"ftexp sweep resume {runs.called(sweep.folder, sweep.name)}"
        )
    board = report.read(sweep.folder, by)
    _check_seed(sweep, board)
    trials = {t["number"]: t for t in board.trials}
    verdict = compare.read(sweep.folder, list(trials.values()), objective)
    if isinstance(verdict.untested, compare.Unlike):
        raise MachineError(f"{sweep.name} has no winner to confirm: {verdict.untested}")
    if verdict.best is None:
        raise MachineError(f"{sweep.name} has no complete point within its bounds: there is no winner to confirm")
    winner = _member(sweep, record, trials, verdict, verdict.best, WINNER)
    alone = _alone(verdict, trials)
    rival = [] if alone else [_member(sweep, record, trials, verdict, verdict.cheapest or 0, CHEAPEST)]
    return Plan(sweep, verdict, trials, [winner, *rival], alone)


def _check_seed(sweep: Frozen, board: Board) -> None:
    """Refuse points that differ by the seed: the winner would be a seed, and what is confirmed other ones."""
    searched = any(axis.key.lstrip("+") == "seed" for axis in sweep.space.axes)
    if searched or len(board.seeds) > 1:
        groups = " and ".join(axis.key for axis in sweep.space.axes if axis.composes)
        why = f"which options of {groups} set to {', '.join(map(str, board.seeds))}"
        raise ConfigError(
            f"the points of {sweep.name} must not differ by the seed, {'which was searched' if searched else why}: "
            "fresh seeds take its place; seeds of one point are launched with sweep.replicates"
        )


def _alone(verdict: Verdict, trials: dict[int, dict[str, Any]]) -> str | None:
    """Say why the winner has no cheaper rival; None where it has one."""
    best, cheapest = verdict.best or 0, verdict.cheapest
    if verdict.untested is not None:
        return f"points were not tested: {verdict.untested}"
    if cheapest is None:
        return "no point that cannot be told from the winner is cheaper"
    if cheapest == best:
        return "the winner is the cheapest of those that cannot be told from it"
    ours, theirs = (trials[verdict.points[n].trials[0]]["facts"]["rows"]["sha256"] for n in (best, cheapest))
    return (
        None if ours == theirs else f"{verdict.points[cheapest].label} was trained, or is to be tested, on other rows"
    )


def _member(
    sweep: Frozen, record: Any, trials: dict[int, dict[str, Any]], verdict: Verdict, index: int, role: str
) -> Member:
    """Build the config of a point from what was frozen, and make sure that it is what was ranked."""
    from ftexp.sweep import study

    point = verdict.points[index]
    number = point.trials[0]
    ticket = next(t for t in study.counted(record) if study.ticket(t) == number)
    run = sweep.run(ticket.params or ticket.system_attrs.get("fixed_params") or {}, number % sweep.options.replicates)
    ran, frozen = trials[number]["config"], experiment.identity(run)
    changed = [f"{key} {value!r} -> {frozen.get(key)!r}" for key, value in ran.items() if frozen.get(key) != value]
    if changed:
        raise ConfigError(f"trial {number} of {sweep.name} ran with another config than is frozen: {changed[0]}")
    return Member(role, index, point.label, list(point.trials), run)


def _asked_for(entry: dict[str, Any], plan: Plan, seeds: int | None) -> bool:
    if entry.get("by", plan.sweep.objectives[0]) != plan.verdict.objective:
        return False
    return entry["plan"] == [member.told() for member in plan.members] and seeds in (None, len(entry["seeds"]))


def _opening(plan: Plan, seeds: int, again: bool, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the record of an opening: the plan with its seeds, when and who, and who else opened these rows."""
    splits = _rows(plan)
    if not splits.test:
        raise ConfigError(
            f"data.test must be above 0 when a sweep is launched, got 0: {plan.sweep.name} kept no row sealed; "
            "launch it with data.test=200 under another name"
        )
    digest = splits.sealed_digest()
    earlier = [entry for entry in kept if entry["test"]["sha256"] == digest]
    if earlier and not again:
        raise ConfigError(
            f"the sealed rows of {plan.sweep.name} were opened {earlier[-1]['date']} by {earlier[-1]['who']} for "
            f"{_purpose(earlier[-1])}; --again opens them once more and says so everywhere"
        )
    numbers = count(sum(len(entry["runs"]) for entry in kept))
    fresh = _fresh(plan, kept, seeds)
    runs = [
        {"number": number, "member": n, "seed": seed}
        for (n, seed), number in zip(((n, s) for n in range(len(plan.members)) for s in fresh), numbers, strict=False)
    ]
    objective, usual = plan.verdict.objective, plan.sweep.objectives[0]
    hashes = splits.sealed_hashes()
    elsewhere, shared = _elsewhere(plan.sweep.folder, digest, hashes)
    return {
        **({} if objective == usual else {"by": objective}),
        "opened": len(earlier) + 1, "date": datetime.now(UTC).isoformat(timespec="seconds"), "who": _who(),
        "test": {"sha256": digest, "rows": len(splits.test), "hashes": " ".join(hashes)},
        "plan": [member.told() for member in plan.members],
        "seeds": fresh, "runs": runs, "elsewhere": elsewhere, "shared": shared,
    }  # fmt: skip


def _rows(plan: Plan) -> data.Splits:
    """Read the rows of the winner and make sure that they are those it was trained on."""
    winner, number = plan.members[0], plan.members[0].trials[0]
    splits = data.load(winner.run.data)
    if splits.digest() != plan.trials[number]["facts"]["rows"]["sha256"]:
        source = winner.run.data.path or winner.run.data.kind.value
        raise DataError(f"{source}: the rows changed since trial {number} of {plan.sweep.name}")
    return splits


def _fresh(plan: Plan, kept: list[dict[str, Any]], seeds: int) -> list[int]:
    """Return the smallest seeds that neither the sweep nor an earlier confirmation used."""
    used = {trial["config"]["seed"] for trial in plan.trials.values() if "config" in trial}
    used |= {seed for entry in kept for seed in entry["seeds"]}
    return list(islice((seed for seed in count() if seed not in used), seeds))


def _purpose(entry: dict[str, Any]) -> str:
    points = " and ".join(member["label"] for member in entry["plan"])
    ended = "" if "result" in entry else ", not finished"
    by = f", first by {entry['by']}," if "by" in entry else ""
    return f"{points}{by} on {len(entry['seeds'])} seed{'s' * (len(entry['seeds']) > 1)}{ended}"


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user} on {socket.gethostname()}"


def _elsewhere(folder: Path, digest: str, hashes: list[str]) -> tuple[list[str], int]:
    """Name the sweeps beside this one, or launched here, that opened some of the same rows, and count those rows.

    Openings of before rows had hashes are known by the digest of all rows.
    """
    beside = (path.parent for path in folder.parent.glob(f"*/{FILE}"))
    others = {place.resolve() for place in (*beside, *known())} - {folder.resolve()}
    named, opened = [], set()
    for name, entry in ((other.name, entry) for other in sorted(others) for entry in openings(other)):
        test = entry["test"]
        theirs = set(hashes) if test["sha256"] == digest else set(test.get("hashes", "").split())
        if not theirs.isdisjoint(hashes):
            named.append(f"{name}, {entry['date']}")
            opened |= theirs
    return named, sum(row in opened for row in hashes)


def _carry_out(plan: Plan, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Train and score what is missing of the last opening, and keep what came of it."""
    sweep, entry = plan.sweep, entries[-1]
    if _rows(plan).sealed_digest() != entry["test"]["sha256"]:
        raise DataError(f"the sealed rows of {sweep.name} are no longer those that were opened {entry['date']}")
    if sweep.code != facts.code():
        say("the code of ftexp is not that of the launch; the winner is trained again with the new code", always=True)
    _warn(entry)
    for planned in entry["runs"]:
        member = plan.members[planned["member"]]
        run, label = replace(member.run, seed=planned["seed"]), f"{member.role} {member.label} seed={planned['seed']}"
        try:
            experiment.execute(run, _folder(sweep, planned), label, sweep.mlflow_run, opened=entry["opened"])
        except Diverged as error:
            say(f"{label}: {error}", always=True)
    done = {**entry, "result": _result(plan, entry)}
    _tag(plan, done)
    _keep(sweep.folder, [*entries[:-1], done])
    return done


def _folder(sweep: Frozen, planned: dict[str, Any]) -> Path:
    return sweep.folder / "confirm" / str(planned["number"])


def _warn(entry: dict[str, Any]) -> None:
    if told := before(entry):
        warn(told)
    if entry["opened"] > 1:
        warn(f"the sealed rows are opened {times(entry)}; what was learned before may bias the choice")


def _result(plan: Plan, entry: dict[str, Any]) -> dict[str, Any]:
    """Score the points that were trained again, from the files of their runs."""
    from ftexp import compare

    ran: list[list[dict[str, Any]]] = [[] for _ in plan.members]
    tables: list[list[dict[str, list[Any]]]] = [[] for _ in plan.members]
    for planned in entry["runs"]:
        folder = _folder(plan.sweep, planned)
        trial, table = read_trial(folder) or {}, compare.read_table(folder / "test.parquet")
        if trial.get("state") == "complete" and table is not None:
            ran[planned["member"]].append(trial)
            tables[planned["member"]].append(table)
    if not ran[0]:
        raise TrialsFailed(f"{plan.members[0].label} diverged on all of the fresh seeds {entry['seeds']}")
    first = (ran[0][0], tables[0][0])
    pairs_of = [list(zip(*both, strict=True)) for both in zip(ran, tables, strict=True)]
    kept = [n for n, part in enumerate(pairs_of) if part and not any(compare.unlike(*first, *pair) for pair in part)]
    members, ran, tables = [plan.members[n] for n in kept], [ran[n] for n in kept], [tables[n] for n in kept]
    alone = plan.alone if len(kept) == len(plan.members) else "the cheapest diverged, or loses other rows to data.long"
    groups = compare.units(tables[0][0])
    told = {name: _scores(name, ran, tables, groups) for name in SCORES if f"test/{name}" in ran[0][0]["scores"]}
    found, comparison = told[plan.objective]
    in_sweep = [_in_sweep(plan.verdict, member.index) for member in members]
    test = found if comparison is None else list(comparison.scores)
    direction = METRICS[plan.verdict.objective].direction
    return {
        "objective": plan.verdict.objective, "unit": _unit(plan.verdict.objective), "rows": len(tables[0][0]["prompt"]),
        "groups": None if groups is None else len(set(groups)),
        "expected_optimism": None if plan.verdict.comparison is None else _finite(plan.verdict.comparison.optimism),
        "points": len(plan.verdict.points) + plan.verdict.behind, "replicates": plan.sweep.options.replicates,
        "members": [
            {"role": member.role, "label": member.label, "trials": member.trials,
             "seeds": [t["config"]["seed"] for t in trials], "failed": len(entry["seeds"]) - len(trials),
             "valid": plan.verdict.points[member.index].score.value,
             "valid_again": _mean(trials, plan.verdict.objective),
             "by_seed": [t["scores"][f"test/{plan.objective}"] for t in trials],
             "optimism": _plain(optimism(valid, tested, direction)),
             "test": {name: _plain(intervals[n]) for name, (intervals, _) in told.items()}}
            for n, (member, trials, valid, tested) in enumerate(zip(members, ran, in_sweep, test, strict=True))
        ],
        "pair": _pair(comparison), "alone": alone,
        "seed_sd": None if comparison is None or comparison.seeds is None else comparison.seeds.sd,
    }  # fmt: skip


def _scores(
    name: str, ran: list[list[dict[str, Any]]], tables: list[list[dict[str, list[Any]]]], groups: Sequence[str] | None
) -> tuple[list[Interval], Comparison | None]:
    """Return each point's score over rows and seeds; without ends and test where it is no mean or ratio over rows."""
    from ftexp import compare
    from ftexp.stats import pairs
    from ftexp.stats.columns import Interval

    table = [[compare.column(content, f"valid/{name}") for content in part] for part in tables]
    known = [[c for c in part if c is not None and math.isfinite(c.value)] for part in table]
    if [len(part) for part in known] != [len(part) for part in table]:
        return [Interval(_mean(trials, f"test/{name}"), math.nan, math.nan) for trials in ran], None
    found = pairs.compare(known, SCORES[name].direction, groups)
    shown = [Interval(*map(_exp, _ends(s))) if name == "perplexity" else s for s in found.scores]
    return shown, found


def _in_sweep(verdict: Verdict, index: int) -> Interval:
    """Return a point's score in the sweep, of perplexity its logarithm."""
    from ftexp.stats.columns import Interval

    if verdict.comparison is not None:
        return verdict.comparison.scores[index]
    score = verdict.points[index].score
    return Interval(math.log(score.value), math.nan, math.nan) if verdict.objective == "valid/perplexity" else score


def optimism(valid: Interval, test: Interval, direction: Direction) -> Interval:
    """Tell how much better a point looked on the rows that chose it than on sealed ones, above 0 for better.

    The interval takes the two sets of rows for independent. It holds the noise between the sweep's own seeds only where
    `valid` does, that is with replicates.
    """
    from ftexp.stats import columns

    return columns.difference(test, valid) if direction is Direction.minimize else columns.difference(valid, test)


def _pair(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None or not comparison.pairs:
        return None
    pair = comparison.pairs[0]
    return {"difference": pair.difference, "low": _finite(pair.low), "high": _finite(pair.high), "p": pair.p}


def _mean(trials: list[dict[str, Any]], name: str) -> float:
    return metrics.mean(name, [trial["scores"][name] for trial in trials])


def _exp(value: float) -> float:
    return math.exp(min(value, 700))


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _plain(interval: Interval) -> dict[str, float | None]:
    return dict(zip(("value", "low", "high"), map(_finite, _ends(interval)), strict=True))


def _finite(value: float) -> float | None:
    """Return a number that JSON knows."""
    return value if math.isfinite(value) else None


def _unit(objective: str) -> str:
    return " nats" if objective == "valid/perplexity" else ""


def _tag(plan: Plan, entry: dict[str, Any]) -> None:
    """Mark the sweep's run and those of the winner's trials in the tracking store; their adapters are the confirmed."""
    told, where = plan.members[0].run.track, {track.CONFIRMED: line(entry)}
    runs = [plan.trials[number].get("mlflow_run") for number in plan.members[0].trials]
    for run_id in (plan.sweep.mlflow_run, *runs):
        track.tag(told, run_id, where)


def table(result: dict[str, Any]) -> Sheet:
    """Lay out each member's scores: in the sweep, on the same rows with fresh seeds, and on the sealed rows."""
    name = result["objective"].removeprefix("valid/")
    made = Sheet(f"{result['objective']} and test/{name}, 95 % intervals over rows and seeds")
    for title in ("", "overrides", "in the sweep", "fresh seeds", "sealed rows", f"optimism{result['unit']}", "seeds"):
        made.column(title, right=title not in ("", "overrides"))
    for member in result["members"]:
        failed = f", {member['failed']} diverged" if member["failed"] else ""
        made.row(
            member["role"], member["label"], number(member["valid"]), number(member["valid_again"]),
            ranged(member["test"][name]), ranged(member["optimism"]), f"{len(member['seeds'])}{failed}",
        )  # fmt: skip
    return made


def scores(result: dict[str, Any]) -> Sheet:
    """Lay out every score on the sealed rows."""
    made = Sheet("on sealed rows")
    made.column("")
    for member in result["members"]:
        made.column(member["role"], right=True)
    for name in result["members"][0]["test"]:
        made.row(f"test/{name}", *(ranged(member["test"][name]) for member in result["members"]))
    return made


def show(entry: dict[str, Any]) -> None:
    """Print a result."""
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH)
    console.print(table(entry["result"]))
    console.print(scores(entry["result"]))
    for told in lines(entry):
        console.print(told, markup=False, highlight=False)


def _check_register(folder: Path, name: str) -> None:
    """Refuse what could not be registered, before anything is trained."""
    registry.check_name(name)
    if frozen.load(folder).mlflow_run is None:
        raise ConfigError(
            f"--register={name} needs a sweep that is in MLflow, {folder.name} is not: it was launched with "
            "track=none, or ftexp sync has yet to bring it"
        )


def register(folder: Path, entry: dict[str, Any], name: str) -> registry.Version:
    """Register the winner's adapter, of several seeds the first, with the sealed score of its config.

    Args:
        folder: of the sweep.
        entry: its last opening, with a result.
        name: of the registered model.

    Raises:
        MachineError: the store cannot be opened or refuses, or does not hold the adapter.
    """
    winner = entry["result"]["members"][0]
    number = winner["trials"][0]
    trial = read_trial(folder / str(number)) or {}
    if "track" not in trial or not trial.get("mlflow_run"):
        raise MachineError(f"trial {number} of {folder.name} is not in MLflow; bring it with: python -m ftexp.sync")
    where = Track(uri=trial["track"]["uri"], experiment=trial["track"]["experiment"])
    track.check_here(where.uri, folder)
    told = json.dumps(trial["config"], sort_keys=True)
    score = entry["result"]["objective"].replace("valid/", "test/")
    ends = winner["test"][score.removeprefix("test/")]
    tags = {
        "ftexp.sweep": folder.name, "ftexp.trial": number, "ftexp.overrides": winner["label"],
        "ftexp.config_sha256": hashlib.sha256(told.encode()).hexdigest(),
        **{f"ftexp.{score}{end}": ends[key] for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
           if ends[key] is not None},
        "ftexp.test_rows": entry["result"]["rows"], "ftexp.test_seeds": len(winner["seeds"]),
        "ftexp.test_opened": entry["opened"],
    }  # fmt: skip
    about = (
        f"{line(entry)} The sealed score is that of the config on fresh seeds; this is the adapter of trial {number}."
    )
    return registry.register(where, trial["mlflow_run"], name, {k: str(v) for k, v in tags.items()}, about)


def _registered(version: registry.Version | None) -> list[str]:
    if version is None:
        return []
    how = "registered" if version.fresh else "registered before"
    return [f"{how}: models:/{version.name}/{version.version}", ""]


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        "ftexp confirm",
        description="Train the winner of a sweep, and the cheapest point that cannot be told from it, again on fresh "
        "seeds, and score them once on the sealed rows (data.test).",
    )
    made.add_argument("name", help="name of the sweep, or its folder")
    made.add_argument("--seeds", type=int, help=f"fresh seeds a point ({SEEDS})")
    made.add_argument("--by", metavar="METRIC", help="confirm the winner by another score, as valid/chrf")
    made.add_argument("--again", action="store_true", help="open the sealed rows once more; every output says so")
    made.add_argument("--register", metavar="NAME",
                      help="make a version of this model in MLflow's registry from the winner's adapter")  # fmt: skip
    made.add_argument("--json", action="store_true", help="for scripts")
    return made


def main() -> int:
    """Run the command line; return the exit code."""
    from ftexp.train import control

    args = parser().parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    config.register()
    with control.listening():
        return verb.ended(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    if args.seeds is not None and not 1 <= args.seeds <= 100:
        raise ConfigError(f"--seeds must be between 1 and 100, got {args.seeds}")
    folder = sweeps.find(args.name).absolute()
    if args.register is not None:
        _check_register(folder, args.register)
    entry = confirm(folder, args.seeds, args.again, args.by, args.register)
    version = None if args.register is None else register(folder, entry, args.register)
    if args.json:
        print(verb.as_json(entry if version is None else entry | {"registered": asdict(version)}))
    else:
        show(entry)
        print(*_registered(version), sep="\n", end="")
    return TrialsFailed.exit_code if any(member["failed"] for member in entry["result"]["members"]) else 0


if __name__ == "__main__":
    sys.exit(main())
