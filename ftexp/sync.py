"""`python -m ftexp.sync`: bring to MLflow what its store missed; our files have every point.

A server that was dead, slow or full costs a run one warning. What it missed is brought later, each point once.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ftexp import board, config, experiment, registry, runs, sealed, track, verb
from ftexp.config import Track
from ftexp.errors import Damaged, MachineError
from ftexp.files import read_json, read_sweep, read_trial, write_json
from ftexp.progress import progress, quiet_libraries, say
from ftexp.runs import Kept
from ftexp.track import Log

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK = "sync.lock"
ELSEWHERE = "mlflow.json"
"""Holds the ids that runs were given in stores which are not their own, by the sha256 of the store's address."""
ENDED = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}


@dataclass
class Brought:
    """What was brought to the store."""

    runs: int = 0
    """Runs that were not there."""
    points: int = 0
    """Points of metrics that were not there."""
    files: int = 0
    """Files and folders that were not there."""
    running: int = 0
    """Runs that are not over, or were killed and not gone on with, and are left out."""
    damaged: int = 0
    """Files of runs and sweeps that cannot be read, each told in one line; what needs them is left out."""

    def __post_init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, error: Damaged) -> None:
        """Tell of a damaged file, once: all trials of a sweep need its files."""
        if str(error) not in self._told:
            say(str(error), always=True)
            self._told.add(str(error))
            self.damaged += 1


def sync(folders: list[Path], uri: str | None = None) -> Brought:
    """Bring runs to the tracking store they were meant for, or to another.

    Args:
        folders: searched for runs.
        uri: tracking store; None takes the one each run was started with. Runs with `track=none` are left out.

    A file that is damaged is told on stderr. Without its `trial.json` or `metrics.jsonl` a run is left out, without
    `sweep.json`, or an `identity.json` that is yet to be brought, all trials of a sweep; without `confirm.json` no tag
    tells of the confirmation, and without `examples.parquet` no table shows rows.

    Raises:
        MachineError: a store cannot be reached.
    """
    told, parents = Brought(), {}
    found = [path for folder in folders for path in sorted(folder.glob("**/trial.json"))]
    with progress("bringing runs", len(found)) as advance:
        for path in found:
            with FileLock(path.parent.parent / LOCK):  # of the sweep: another node may be bringing it
                try:
                    kept = Kept(path.parent, read_trial(path.parent) or {})
                    if "track" in kept.trial and kept.trial.get("state") == "running":
                        told.running += 1
                    elif "track" in kept.trial and "repeats" not in kept.trial:  # one run for a point and seed
                        _bring(kept, uri, told, parents)
                except Damaged as error:  # the others are not to wait for it
                    told.tell(error)
            advance(1)
    return told


def _bring(kept: Kept, given: str | None, told: Brought, parents: dict[Path, str]) -> None:
    uri, own_id = given or kept.trial["track"]["uri"], kept.trial.get("mlflow_run")
    times = _times(kept)  # before anything is made in the store: a file that is damaged leaves nothing half there
    where = Track(uri=uri, experiment=kept.trial["track"]["experiment"])
    if given is None and own_id is not None:
        track.check_here(uri, kept.folder, ", or give --uri")
    client, _ = track.store(where)
    run_id = _known(client, own_id, *_elsewhere(kept.folder, uri))
    if given is None and run_id is None and own_id is not None and track.is_foreign(uri, kept.folder):
        raise MachineError(
            f"track.uri={uri} in {Path.cwd()} does not hold {kept.folder}; {track.FROM_WHERE}, or give --uri"
        )
    parent = _parent(kept, where, client, parents, told)
    if run_id is None:
        run_id = track.create(where, kept.trial["label"], kept.folder, parent, min(times, default=None))
        if _is_own(kept, uri):
            _note(kept.folder / "trial.json", run_id)
        else:
            _keep_elsewhere(kept.folder, uri, run_id)
        told.runs += 1
    log = Log(kept.folder, client, run_id)
    _points(kept, client, log, told)
    stored = client.get_run(run_id)
    params = config.effective(kept.trial["config"])
    log.params({k: v for k, v in params.items() if k not in stored.data.params})
    if stored.inputs is None or not stored.inputs.dataset_inputs:
        log.inputs(kept.trial.get("inputs", []))
    if "facts" in kept.trial:
        log.tags({f"ftexp.{k}": v for k, v in config.flat(kept.trial["facts"]).items()})
    there = _stored(client, run_id)
    for name in ("examples.parquet", "labels.json", registry.ADAPTER):
        missing = [path for path in _files(kept.folder / name) if _is_missing(path, kept.folder, there)]
        for path in missing:
            under = path.parent.relative_to(kept.folder).as_posix()
            log.files(path, None if under == "." else under)
        told.files += bool(missing)
    if "examples.json" not in there and (kept.folder / "examples.parquet").exists():
        try:
            log.table(_examples(kept), "examples")
            told.files += 1
        except Damaged as error:
            told.tell(error)
    log.tags({"ftexp.test_opened": kept.trial["opened"]} if kept.trial.get("opened") else {})
    log.tags(_confirmed(kept.folder.parent, told, kept.folder.name))
    if log.client is None:
        raise MachineError(f"track.uri={uri} failed while {kept.folder} was brought; the same command goes on")
    _end(kept, client, stored)


def _stored(client: MlflowClient, run_id: str, under: str | None = None) -> dict[str, int | None]:
    """Return the sizes of a run's files in the store by their paths; None where a store does not tell one."""
    found: dict[str, int | None] = {}
    for entry in client.list_artifacts(run_id, under):
        found |= _stored(client, run_id, entry.path) if entry.is_dir else {entry.path: entry.file_size}
    return found


def _files(path: Path) -> list[Path]:
    """List a file, or all files below a folder; none where there is neither."""
    return [file for file in (path, *sorted(path.rglob("*"))) if file.is_file()]


def _is_missing(path: Path, folder: Path, there: dict[str, int | None]) -> bool:
    """Tell whether the store has a file not at all or, of an upload that broke off, in another size."""
    return there.get(path.relative_to(folder).as_posix(), -1) not in (None, path.stat().st_size)


def _confirmed(sweep: Path, told: Brought, trial: str | None = None) -> dict[str, str]:
    """Return the tag that `confirm` gives a sweep and the trials of its winner."""
    try:
        ended = [entry for entry in sealed.openings(sweep) if "result" in entry]
    except Damaged as error:
        told.tell(error)
        return {}
    mine = [entry for entry in ended if trial is None or trial in map(str, entry["plan"][0]["trials"])]
    return {track.CONFIRMED: sealed.line(mine[-1])} if mine else {}


def _examples(kept: Kept) -> list[dict[str, Any]]:
    """Return the rows that the run itself would have shown."""
    import pyarrow
    import pyarrow.parquet

    path = kept.folder / "examples.parquet"
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise Damaged(f"{path}: is damaged, it must be Parquet ({str(error).splitlines()[0]})") from error
    rival = "tfidf" if rows and any(name.startswith("tfidf_") for name in rows[0]) else "base"
    return experiment.shown(rows, rival, kept.trial["config"]["eval.examples"])


def _end(kept: Kept, client: MlflowClient, stored: Any) -> None:
    """Say how a run ended, in place of how an earlier attempt did."""
    state, run_id = kept.trial["state"], stored.info.run_id
    tag = {"pruned": track.PRUNED, "failed": track.ERROR}.get(state)
    for old in track.ENDS & stored.data.tags.keys() - {tag}:
        client.delete_tag(run_id, old)
    if tag is not None and tag not in stored.data.tags:
        client.set_tag(run_id, tag, str(kept.trial.get("error", ""))[:500])
    if state in ENDED and stored.info.status != ENDED[state]:
        client.set_terminated(run_id, ENDED[state], max(_times(kept), default=None))


def _times(kept: Kept) -> list[int]:
    """List when the points of a run were made, in milliseconds."""
    return [int(point["time"]) for point in kept.points()]


def _is_own(kept: Kept, uri: str) -> bool:
    return track.address(uri) == track.address(kept.trial["track"]["uri"])


def _elsewhere(folder: Path, uri: str) -> list[str]:
    """Return the ids that a run or sweep was given in a store not its own, by its address or as that was given."""
    kept = read_json(folder / ELSEWHERE) or {}
    return [kept[key] for key in (_hashed(track.address(uri)), _hashed(uri)) if key in kept]


def _keep_elsewhere(folder: Path, uri: str, run_id: str) -> None:
    write_json(folder / ELSEWHERE, (read_json(folder / ELSEWHERE) or {}) | {_hashed(track.address(uri)): run_id})


def _hashed(uri: str) -> str:
    return hashlib.sha256(uri.encode()).hexdigest()  # a uri may hold a password


def _known(client: MlflowClient, *run_ids: str | None) -> str | None:
    """Return the first id of a run that the store holds: its own one too, for a store may be spelled in several ways.

    Raises:
        MachineError: the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    for run_id in run_ids:
        try:
            if run_id is not None:
                return client.get_run(run_id).info.run_id
        except MlflowException as error:
            if track.is_unanswered(error):
                raise MachineError(f"the tracking store does not answer: {str(error).splitlines()[0][:200]}") from error
    return None


def _parent(
    kept: Kept, where: Track, client: MlflowClient, parents: dict[Path, str], told: Brought
) -> str | None:  # fmt: skip
    """Return the run of the trial's sweep, made where the store does not hold it; None for a single run."""
    folder = kept.folder.parent
    folder = folder.parent if folder.name == "confirm" else folder
    sweep = read_sweep(folder, "name", "mlflow_run")
    if sweep is None:
        return None
    if folder not in parents:
        known = _known(client, sweep["mlflow_run"], *_elsewhere(folder, where.uri))
        params = {} if known else track.searched(read_json(folder / "identity.json") or {})
        parents[folder] = known or track.create(where, sweep["name"], folder, None)
        for name, value in _confirmed(folder, told).items():
            client.set_tag(parents[folder], name, value)
        end = _end_of_sweep(folder, sweep) or ("KILLED" if known is None else None)
        if end is not None and client.get_run(parents[folder]).info.status != end:
            tags, scores = ({}, {}) if end == "KILLED" else _summary(folder)
            track.end(where, parents[folder], tags, scores, end)
        if known is None:
            Log(folder, client, parents[folder]).params(params)
            keys = [axis["key"] for axis in sweep.get("axes", ()) if not axis.get("composes")]
            track.view(where, parents[folder], sweep["name"], sweep["objectives"], keys)
            if _is_own(kept, where.uri):
                _note(folder / "sweep.json", parents[folder])
            else:
                _keep_elsewhere(folder, where.uri, parents[folder])
            told.runs += 1
        page = folder / "report.html"
        if page.exists() and page.name not in {entry.path for entry in client.list_artifacts(parents[folder])}:
            client.log_artifact(parents[folder], str(page))
            told.files += 1
    return parents[folder]


def _note(path: Path, run_id: str) -> None:
    """Write the id of a run into what a folder holds now: a trial, or a launch, may have written while we asked."""
    told: dict[str, Any] = read_json(path) or {}
    write_json(path, told | {"mlflow_run": run_id})


def _end_of_sweep(folder: Path, sweep: dict[str, Any]) -> str | None:
    """Tell how a sweep ended, as MLflow says it; None of one that has trials left, or does not say how many it has."""
    try:
        trials = [read_trial(path.parent) or {} for path in folder.glob("[0-9]*/trial.json")]
    except Damaged:  # of a trial, which is told where it is to be brought
        return None
    states = {(trial | board.undefined(trial, sweep.get("objectives", ()))).get("state") for trial in trials}
    whole = 0 < sweep.get("tickets", 0) <= len(trials)
    if whole and states <= {"complete", "pruned", "skipped", "failed"}:
        return "FAILED" if "failed" in states else "FINISHED"
    return None


def _summary(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the tags and metrics that the launch of a sweep gives its run at the end."""
    found = board.read(folder)
    point = None if found.best is None else found.points[found.best]
    best = point and ([trial["number"] for trial in point.trials], point.scores[found.objective])
    return track.outcome(Counter(trial["state"] for trial in found.trials), found.objective, best)


def _points(kept: Kept, client: MlflowClient, log: Log, told: Brought) -> None:
    """Bring the points the store does not hold; equal steps of a metric count as the same point."""
    missing: dict[str, dict[int, tuple[float, int]]] = {}
    for point in kept.points():
        for name, value in point.items():
            if name not in ("step", "time"):
                missing.setdefault(name, {})[int(point["step"])] = (value, int(point["time"]))
    for name, points in missing.items():
        there = {m.step for m in client.get_metric_history(log.run_id or "", name)}
        new = {step: told for step, told in points.items() if step not in there}
        log._points += [(name, value, when, step) for step, (value, when) in new.items()]
        told.points += len(new)
    log.flush()


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser("ftexp sync", description="Bring to MLflow what its store missed.")
    parser.add_argument("folders", nargs="*", type=Path, default=[],
                        help="searched for runs, or names of sweeps and runs; default: "
                             f"{runs.OUTPUTS}, and the sweeps of {runs.LIST}, which lie elsewhere")  # fmt: skip
    parser.add_argument("--uri", help="tracking store; default: the one each run was started with")
    parser.add_argument("--json", action="store_true", help="for scripts")
    args = parser.parse_args()
    quiet_libraries()
    return verb.ended(lambda: _main(args))


def _away() -> list[Path]:
    """List the sweeps launched here that do not lie in `outputs/`; one that was removed is left out."""
    return [path for path in sorted(runs.elsewhere()) if not path.resolve().is_relative_to(runs.OUTPUTS.resolve())]


def _main(args: argparse.Namespace) -> int:
    folders = [runs.place(folder) for folder in args.folders] or [runs.OUTPUTS, *_away()]
    for folder in folders:
        if not folder.is_dir() and folder != runs.OUTPUTS:
            raise MachineError(f"{folder}: must be a folder with runs in it, there is none{runs.there(folder)}")
    told = sync(folders, args.uri)
    if args.json:
        print(verb.as_json(asdict(told), None))
    else:
        print(f"brought {told.runs} runs, {told.points} points and {told.files} files that were not there")
        if told.running:
            print(f"left out {told.running} that are not over; one that was killed is brought once it has gone on")
    return MachineError.exit_code if told.damaged else 0


if __name__ == "__main__":
    sys.exit(main())
