"""Tracking: our files are the truth, MLflow is the view.

Every metric goes to `metrics.jsonl` in the run's folder first and to MLflow in batches. A tracking store that fails
in mid-run costs one warning and never a trial.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ftexp import config, garbage
from ftexp.config import Run, Track, Tracker
from ftexp.errors import MachineError, Pruned
from ftexp.files import cache, finite, naming, read_json, read_points, replacing, write_json, write_text
from ftexp.metrics import METRICS, Direction
from ftexp.progress import say, warn

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

FILE = "metrics.jsonl"
FLUSH_SECONDS = 5.0
BATCH = 900
"""Points in one call; MLflow takes at most 1000."""
NAME, DIGEST = 500, 36
"""Letters that MLflow takes of the name and of the digest of a data set."""
PRUNED, ERROR, CHANGED = "ftexp.pruned", "ftexp.error", "ftexp.changed"
CONFIRMED = "ftexp.confirmed"
"""Tag of a sweep, and of its winner's trials, whose sealed rows were opened: the line that tells it."""
MARK = "ftexp.launch"
"""Tag of a sweep: a number of the launch that opened it."""
BEGUN = "parent.json"
"""Holds where the run of a sweep is to be found and by which mark, until `sweep.json` has its id."""
ENDS = {PRUNED, ERROR}
"""Tags that tell how an attempt ended."""
SQLITE = "sqlite:///"
FROM_WHERE = "call this from the folder that the run was started in"
VIEWS, VIEW = "mlflow.sharedViewState.", "ftexp"
"""Tag of an experiment that holds a view of its runs, and the key of ours."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Opens the experiment among the UI's pages for training, not those for agents."""


@dataclass
class Log:
    """Writes what a run reports. Made by `start`."""

    folder: Path
    client: MlflowClient | None = None
    run_id: str | None = None
    _points: list[tuple[str, float, int, int]] = field(default_factory=list)
    _sent: float = field(default_factory=time.monotonic)
    _last: dict[str, int] = field(default_factory=dict)
    """Metric -> its last step that an earlier attempt at this run brought to MLflow."""
    _single: dict[str, float] = field(default_factory=dict)
    """Metric of step 0, which is no curve -> the value an earlier attempt brought; another one is brought beside it."""
    _params: dict[str, str] = field(default_factory=dict)
    """Parameters that an earlier attempt brought; MLflow never changes one."""

    def curve(self, name: str) -> list[tuple[float, int]]:
        """Return the points of a metric that the run's file holds, as (value, step)."""
        return curve(self.folder / FILE, name)

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Report metrics of an optimizer step."""
        now = int(time.time() * 1000)
        with naming(self.folder / FILE), (self.folder / FILE).open("a", encoding="utf-8") as out:
            out.write(json.dumps(finite({"step": step, "time": now, **values})) + "\n")
        known = self._single if step == 0 else {k: v for k, v in values.items() if step <= self._last.get(k, -1)}
        self._points += [(k, v, now, step) for k, v in values.items() if known.get(k) != v]
        if time.monotonic() - self._sent > FLUSH_SECONDS or len(self._points) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered to MLflow."""
        points, self._points, self._sent = self._points, [], time.monotonic()

        def send(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import Metric

            for start in range(0, len(points), BATCH):
                client.log_batch(run_id, metrics=[Metric(*p) for p in points[start : start + BATCH]])

        self._try(send)

    def params(self, values: dict[str, Any]) -> None:
        """Record the config under its dotted names, as overrides spell them.

        Where an earlier attempt had another value, such as the batch before memory ran out, the new one is a tag.
        """
        told = {name: str(value) for name, value in values.items()}
        changed = {f"{CHANGED}.{name}": v for name, v in told.items() if self._params.get(name, v) != v}
        told = {name: value for name, value in told.items() if name not in self._params}

        def send(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import Param

            items = [Param(name, value) for name, value in told.items()]
            for start in range(0, len(items), 100):
                client.log_batch(run_id, params=items[start : start + 100])

        self._try(send)
        if changed:
            self.tags(changed)

    def tags(self, values: dict[str, Any]) -> None:
        """Record facts that are not parameters."""

        def send(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import RunTag

            client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in values.items()])

        self._try(send)

    def inputs(self, sets: list[dict[str, Any]]) -> None:
        """Record what was trained and scored on, as MLflow's data sets: name, digest, rows and where they are from."""

        def send(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag
            from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

            told = [
                DatasetInput(
                    Dataset(one["name"][:NAME], one["sha256"][:DIGEST], one["kind"], json.dumps(one["source"]),
                            profile=json.dumps({"num_rows": one["rows"]})),
                    [InputTag(MLFLOW_DATASET_CONTEXT, one["context"])],
                ) for one in sets
            ]  # fmt: skip
            if told:
                client.log_inputs(run_id, told)

        self._try(send)

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Store a table that the MLflow UI can open."""
        columns = {key: [row.get(key) for row in rows] for key in rows[0]} if rows else {}
        self._try(lambda client, run_id: client.log_table(run_id, columns, f"{name}.json"))

    def files(self, path: Path, under: str | None = None) -> None:
        """Store a file or folder."""
        send = "log_artifacts" if path.is_dir() else "log_artifact"
        self._try(lambda client, run_id: getattr(client, send)(run_id, str(path), under))

    def _try(self, send: Callable[[MlflowClient, str], None]) -> None:
        if self.client is None or self.run_id is None:
            return
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            send(self.client, self.run_id)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            self.client = None  # one warning, and no more waiting; the files of the run are complete
            _warn(error)


def _warn(error: Exception) -> None:
    warn(f"MLflow failed, the run goes on with files only: {_first(error)}; "
         "bring them later with: python -m ftexp.sync")  # fmt: skip


@contextmanager
def start(
    run: Run, folder: Path, label: str, parent: str | None, before: str | None = None, done: int = 0
) -> Iterator[Log]:
    """Open a run in the tracking store and close it as finished, or as failed when an exception leaves.

    Args:
        run: the checked config.
        folder: where the run's files are.
        label: name shown in the UI.
        parent: MLflow id of the sweep's run.
        before: MLflow id of an attempt at the same run that was killed, which is gone on with; points it brought
            there are not brought again.
        done: optimizer steps the run goes on from; later points of the killed attempt leave the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _cut(folder / FILE, done)
    log = Log(folder)
    log.run_id = None if run.track.kind is Tracker.none else before  # where `ftexp sync` looks, also without a store
    if _reached(run.track):
        with _failing():
            if before is None or not _reopen(run.track, before, log):
                log.client, log.run_id = _open(run.track, label, folder, parent)
    try:
        yield log
    except Pruned as error:
        log.flush()
        log.tags({PRUNED: error})
        _close(log, "FINISHED")
        raise
    except BaseException as error:
        log.flush()
        log.tags({ERROR: f"{type(error).__name__}: {error}"[:500]})
        _close(log, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    log.flush()
    _close(log, "FINISHED")


def curve(path: Path, name: str) -> list[tuple[float, int]]:
    """Return the points of a metric that a file of metrics holds, as (value, step)."""
    return [(point[name], point["step"]) for point in read_points(path) if name in point]


def _cut(path: Path, done: int) -> None:
    """Keep the points of the first `done` steps."""
    if path.exists():
        kept = [point for point in read_points(path) if 0 < point["step"] <= done]
        write_text(path, "".join(json.dumps(finite(point)) + "\n" for point in kept))


def _first(error: Exception) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def _failing() -> Iterator[None]:
    """Let a store fail, at the cost of one warning."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        _warn(error)


def _reopen(track: Track, run_id: str, log: Log) -> bool:
    """Open the run of a killed attempt again; False where the store does not hold it.

    Raises:
        MlflowException: the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    client, _ = store(track)
    try:
        known = client.get_run(run_id).data
        client.update_run(run_id, status="RUNNING")
        for tag in ENDS & known.tags.keys():
            client.delete_tag(run_id, tag)
        points = {name: client.get_metric_history(run_id, name) for name in known.metrics}
    except MlflowException as error:
        if is_unanswered(error):
            raise
        return False
    log._params = dict(known.params)
    log._last = {name: max(m.step for m in history) for name, history in points.items()}
    log._single = {name: m.value for name, history in points.items() for m in history if m.step == 0}
    log.client, log.run_id = client, run_id
    return True


def is_unanswered(error: MlflowException) -> bool:
    """Tell a server that did not answer from one that says no: what was asked for may be there."""
    return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")


def searched(identity: dict[str, str]) -> dict[str, Any]:
    """Return a sweep's identity by the names that trials have: values that all share, and of a searched key what is.

    Keys without effect in any trial are left out.

    >>> searched({"config lora.variant": '"none"', "config lora.r": "16", "space trainer.lr": "1e-4,1e-3"})
    {'lora.variant': 'none', 'trainer.lr': '1e-4,1e-3'}
    >>> searched({"space lora.r": "8,16", "config seed": "0", "sweep.sampler": "grid"})
    {'sweep.sampler': 'grid', 'seed': 0, 'lora.r': '8,16'}
    """
    shared = {k.removeprefix("config "): json.loads(v) for k, v in identity.items() if k.startswith("config ")}
    space = {k.removeprefix("space "): v for k, v in identity.items() if k.startswith("space ")}
    return {k: v for k, v in identity.items() if " " not in k} | config.effective(shared) | space


def open_parent(track: Track, name: str, folder: Path, params: dict[str, Any]) -> str | None:
    """Open the run of a sweep, under which its trials appear; return its id, or None where nothing can be opened.

    `params` say what is searched, and what all trials share, so that sweeps can be compared there. The run that a
    launch had opened which was killed before `sweep.json` named it is found by its mark, and gone on with.
    """
    told, client, run_id, known = {name: str(value) for name, value in params.items()}, None, None, {}
    if (begun := read_json(folder / BEGUN, "uri", "experiment", "mark")) is not None:
        with _failing():
            client, run_id, known = _left_behind(track, begun, told)
    if not _reached(track):
        return None
    with _failing():
        if client is None or run_id is None:
            mark = secrets.token_hex(8)
            where = {"uri": address(track.uri), "experiment": track.experiment, "mark": mark}
            write_json(folder / BEGUN, where)  # before there is anything to find
            client, run_id = _open(track, name, folder, None, more={MARK: mark})
        Log(Path(), client, run_id, _params=known).params(told)
        return run_id
    return None


def _left_behind(
    track: Track, begun: dict[str, str], told: dict[str, str]
) -> tuple[MlflowClient | None, str | None, dict[str, str]]:
    """Find the run that a killed launch had opened for a sweep, and its parameters; one that does not fit is ended."""
    where = replace(track, kind=Tracker.mlflow, uri=begun["uri"], experiment=begun["experiment"])
    is_gone = where.uri.startswith(SQLITE) and not Path(where.uri.removeprefix(SQLITE).partition("?")[0]).exists()
    if is_gone or not _reached(where):
        return None, None, {}
    client, experiment = store(where)
    here = track.kind is Tracker.mlflow and (where.uri, where.experiment) == (address(track.uri), track.experiment)
    for run in client.search_runs([experiment], f"tags.`{MARK}` = '{begun['mark']}'"):
        if here and run.data.params.items() <= told.items():
            client.update_run(run.info.run_id, status="RUNNING")
            return client, run.info.run_id, dict(run.data.params)
        client.set_terminated(run.info.run_id, "KILLED")
    return None, None, {}


def view(track: Track, parent: str | None, name: str, objectives: Sequence[str], keys: Sequence[str]) -> None:
    """Save how the MLflow UI shows a sweep, in its menu "Views": the trials best first, what was searched, and scores.

    An experiment keeps one such view, of its newest sweep, since the UI stops at 40. The tag is as MLflow's own "Save"
    writes it; a server that knows no views keeps a tag that says nothing to it.

    Args:
        track: the store.
        parent: run of the sweep; None where there is none.
        name: of the sweep.
        objectives: metrics, the first of which ranks.
        keys: that are searched.
    """
    if parent is None or not _reached(track):
        return
    scores = dict.fromkeys((*objectives, "valid/loss", "cost/trainable", "cost/seconds"))
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'",
        "orderByKey": f"metrics.`{objectives[0]}`",
        "orderByAsc": METRICS[objectives[0]].direction is Direction.minimize,
        "selectedColumns": [*(f"metrics.`{score}`" for score in scores), *(f"params.`{key}`" for key in keys)],
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    told = {"name": f"sweep {name}", "createdAt": int(time.time() * 1000), "state": f"deflate;{packed}"}
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client, experiment = store(track)
        client.set_experiment_tag(experiment, f"{VIEWS}{VIEW}", json.dumps(told))
    except (MlflowException, SQLAlchemyError, OSError) as error:  # as of who may write runs alone
        warn(f"sweep {name} is no view in MLflow: {_first(error)}")


def viewed(uri: str) -> str | None:
    """Return where in the MLflow UI of a store the newest sweep is shown; None where none is on record."""
    _restrain()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        found = MlflowClient(tracking_uri=address(uri)).search_experiments()
    except (MlflowException, SQLAlchemyError, OSError):
        return None
    dated = [(json.loads(one.tags[key])["createdAt"], one.experiment_id) for one in found
             if (key := f"{VIEWS}{VIEW}") in one.tags]  # fmt: skip
    if not dated:
        return None
    return f"#/experiments/{max(dated)[1]}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def attach(uri: str, run_id: str, path: Path, note: str) -> None:
    """Show a file and a description with a run of the tracking store; one not here, or that fails, costs a line."""
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE).partition("?")[0]).exists():
        say(f"{path.name} is not in MLflow: {uri} is not here", always=True)
        return
    _restrain()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri=address(uri))
        client.log_artifact(run_id, str(path))
        client.set_tag(run_id, "mlflow.note.content", note)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        warn(f"{path.name} is not in MLflow: {_first(error)}")


def reopen_parent(track: Track, run_id: str | None) -> None:
    """Show the run of a sweep as running again: it goes on."""
    if run_id is not None and _reached(track):
        Log(Path(), store(track)[0], run_id)._try(lambda client, run_id: client.update_run(run_id, status="RUNNING"))


def outcome(
    counts: dict[str, int], objective: str, best: tuple[list[int], float] | None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the tags and metrics that a sweep's run is closed with.

    Args:
        counts: state -> trials.
        objective: what ranks.
        best: trials of the best point and its score; None where none is.
    """
    told = {"trials": float(sum(counts.values())), "failed": float(counts.get("failed", 0))}
    told |= {"skipped": float(counts["skipped"])} if counts.get("skipped") else {}
    if best is None:
        return {}, told
    return {"ftexp.best_trial": ",".join(map(str, best[0]))}, told | {objective: best[1]}


def end(track: Track, run_id: str | None, tags: dict[str, Any], metrics: dict[str, float], status: str) -> None:
    """Close a run that was opened before, as a sweep's, with its summary.

    MLflow knows FINISHED, FAILED, and KILLED for one that was stopped.
    """
    if run_id is None or not _reached(track):
        return
    log = Log(Path(), store(track)[0], run_id)
    log.tags(tags)
    log._points = [(name, value, int(time.time() * 1000), 0) for name, value in metrics.items()]
    log.flush()
    _close(log, status)


def tag(track: Track, run_id: str | None, tags: dict[str, Any]) -> None:
    """Tag a run that has ended; none where nothing is tracked."""
    if run_id is not None and track.kind is not Tracker.none:
        Log(Path(), store(track)[0], run_id).tags(tags)


def _close(log: Log, status: str) -> None:
    log._try(lambda client, run_id: client.set_terminated(run_id, status))


def create(track: Track, label: str, folder: Path, parent: str | None, began: int | None = None) -> str:
    """Make a run in the store, which began at a time in milliseconds or now, and return its id."""
    return _open(track, label, folder, parent, began)[1]


def _open(
    track: Track,
    label: str,
    folder: Path,
    parent: str | None,
    began: int | None = None,
    more: dict[str, str] | None = None,
) -> tuple[MlflowClient, str]:
    from getpass import getuser

    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_SOURCE_NAME, MLFLOW_USER

    client, experiment = store(track)
    tags = {
        MLFLOW_RUN_NAME: label,
        MLFLOW_SOURCE_NAME: "ftexp.run",
        MLFLOW_USER: getuser(),
        "ftexp.folder": str(folder),
        **(more or {}),
    }
    if parent:
        tags[MLFLOW_PARENT_RUN_ID] = parent
    return client, client.create_run(experiment, start_time=began, tags=tags).info.run_id


_stores: dict[tuple[str, str, str], tuple[MlflowClient, str]] = {}
_dead: set[str] = set()


def hope() -> None:
    """Ask servers again that did not answer."""
    _dead.clear()


class Unreachable(MachineError):
    """A tracking server that does not answer: the run goes on with its files, and `ftexp sync` brings them later."""


def _reached(track: Track) -> bool:
    """Tell whether there is a store to write to; a server that does not answer is warned of and waited for once."""
    if track.kind is Tracker.none or track.uri in _dead:
        return False
    try:
        store(track)
    except Unreachable as error:
        _dead.add(track.uri)
        warn(f"{error}; the run goes on with files only, bring them later with: python -m ftexp.sync")
        return False
    return True


def store(track: Track) -> tuple[MlflowClient, str]:
    """Connect to the tracking store; return the client and the id of the experiment.

    A SQLite store is created under a lock: processes that open an empty one together break it for good.

    Raises:
        MachineError: the store cannot be reached or opened.
    """
    key = (str(Path.cwd()), track.uri, track.experiment)  # a store of a relative name is another elsewhere
    if key not in _stores:
        _stores[key] = _connect(track)
    return _stores[key]


def address(uri: str) -> str:
    """Spell the address of a store in one way: a SQLite file by its whole path, another without a slash at its end.

    >>> address("sqlite:////a/../b.db?x=1"), address("http://host:5000/")
    ('sqlite:////b.db?x=1', 'http://host:5000')
    """
    if not uri.startswith(SQLITE):
        return uri.rstrip("/")
    name, mark, query = uri.removeprefix(SQLITE).partition("?")
    return f"{SQLITE}{Path(name).resolve()}{mark}{query}"


def check_here(uri: str, folder: Path, else_do: str = "") -> None:
    """Refuse a SQLite store that the run of a folder is in and that is not there from here: it would be made.

    Where the folder lies beside it, the store was deleted, and is made anew.

    Raises:
        MachineError: says from where to call, `else_do` what may be done instead.
    """
    path = _relative(uri)
    if path is not None and not path.exists() and is_foreign(uri, folder):
        raise MachineError(f"track.uri={uri} is not there from {Path.cwd()}; {FROM_WHERE}{else_do}")


def is_foreign(uri: str, folder: Path) -> bool:
    """Tell whether a SQLite store of a relative name is likely another one here: the run is not in its folder."""
    path = _relative(uri)
    return path is not None and not folder.resolve().is_relative_to(path.parent.resolve())


def _relative(uri: str) -> Path | None:
    """Return the file of a SQLite store whose name depends on the current folder."""
    path = Path(uri.removeprefix(SQLITE).partition("?")[0])
    return path if uri.startswith(SQLITE) and not path.is_absolute() else None


def _restrain() -> None:
    """Keep MLflow from waiting long and talking much."""
    import logging

    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the default waits four minutes on a dead server
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # our stdout is for tables and JSON
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)


def _connect(track: Track) -> tuple[MlflowClient, str]:
    """Connect, to a SQLite file by its whole path: a name that MLflow knows from another folder leads there."""
    _restrain()
    with garbage.postponed():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    artifacts, path = None, None
    lock: Any = _unlocked()
    try:
        if track.uri.startswith(SQLITE):
            path = Path(track.uri.removeprefix(SQLITE).partition("?")[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            artifacts = (path.parent / "mlartifacts").resolve().as_uri()
            lock = FileLock(f"{path}.lock")
        with lock:
            if path is not None and not path.exists():
                _begin(path)
            client = MlflowClient(tracking_uri=address(track.uri))
            found = client.get_experiment_by_name(track.experiment)
            experiment = found.experiment_id if found else client.create_experiment(track.experiment, artifacts, KIND)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        if not track.uri.partition(":")[1] or track.uri.startswith("file:"):
            near = f"{SQLITE}{Path(track.uri.removeprefix('file:')).with_suffix('.db')}"
            raise MachineError(
                f"track.uri={track.uri} must be a database, as track.uri={near}: MLflow takes no folder"
            ) from error
        kind = Unreachable if track.uri.startswith("http") else MachineError
        raise kind(f"track.uri={track.uri} cannot be opened: {_first(error)}") from error
    return client, experiment


def _begin(path: Path) -> None:
    """Put an empty store in place, from one that is kept for this version of MLflow; to make its tables takes seconds.

    Where none is kept, the tables are made in place, and a copy is kept if one can be.
    """
    import logging

    import mlflow
    from mlflow.db import upgrade

    make: Any = upgrade.callback  # what `mlflow db upgrade` does
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # tells that it makes tables
    kept, path = cache() / f"mlflow-{mlflow.__version__}.db", path.resolve()  # a link stays one
    with suppress(OSError, sqlite3.Error), replacing(path) as fresh:
        _copy_sound(kept, fresh)
        return
    with replacing(path) as fresh:
        make(f"{SQLITE}{fresh}")
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as fresh:
            shutil.copyfile(path, fresh)


def _copy_sound(kept: Path, made: Path) -> None:
    """Copy a database; raise where it is torn."""
    shutil.copyfile(kept, made)
    with closing(sqlite3.connect(made)) as base:
        if base.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError(f"{kept}: is torn")


@contextmanager
def _unlocked() -> Iterator[None]:
    yield


def params(run: Run) -> dict[str, Any]:
    """Parameters of a run for the store: the config but for where it is tracked and keys without effect in the run."""
    return config.effective(flat(run))


def flat(run: Run) -> dict[str, Any]:
    """Flatten the whole config of a run but for where it is tracked."""
    return {name: value for name, value in config.flat(run).items() if not name.startswith("track.")}
