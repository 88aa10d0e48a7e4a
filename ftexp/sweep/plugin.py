"""The Hydra sweeper `hydra/sweeper=ftexp`: checks a whole sweep, freezes it, and has workers run it.

The same command again goes on with what is missing, whatever ended the last launch.
"""

from __future__ import annotations

import copy
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.plugins.sweeper import Sweeper as HydraSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from ftexp import config, data, experiment, metrics, overrides, track
from ftexp.config import Run
from ftexp.errors import ConfigError, FtexpError, MachineError, TrialsFailed
from ftexp.files import read_json
from ftexp.progress import say
from ftexp.sweep import frozen, space
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import Options, Pruner, Sampler
from ftexp.sweep.space import Space


class Sweeper(HydraSweeper):
    """Runs a search space as trials in `outputs/sweeps/<name>/<number>`."""

    started: Callable[[Path], None] | None = None
    """Called with the sweep's folder once its trials begin."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over before `sweep`."""
        self.context, self.master = hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep; Hydra calls this with the overrides of the command line.

        Raises:
            FtexpError: some trial was refused, or the name belongs to another sweep; nothing was started.
            TrialsFailed: the sweep ended and trials failed; the others are complete.
        """
        setup_globals()
        options = self._options()
        searched = space.parse([*(f"{k}={v}" for k, v in options.params.items()), *arguments])
        folder = Path(self.master.hydra.sweep.dir).absolute()
        runs = self._checked(searched, options)
        if not (folder / frozen.FILE).exists():
            for run in {config.digest(r.model, r.lora, r.data, r.trainer, r.eval): r for r in runs}.values():
                experiment.prepare(run)
        with _only_supervisor(folder, runs[0].name):
            launch(folder, searched, options, runs, self._compose, self.master, type(self).started)

    def _options(self) -> Options:
        try:
            options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), self.given))
        except OmegaConfBaseException as error:
            raise ConfigError(f"sweep.{str(error).splitlines()[0]}") from error
        return cast(Options, options)

    def _compose(self, point: list[str]) -> DictConfig:
        cfg = copy.deepcopy(self.context.config_loader.load_sweep_config(cast(DictConfig, self.master), point))
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        return cfg

    def _checked(self, searched: Space, options: Options) -> list[Run]:
        """Build and check every point of a grid, or the ends and values of every axis of a search."""
        searching = options.sampler is not Sampler.grid
        if searching and options.n_trials is None:
            raise ConfigError(f"sweep.n_trials must be set with sweep.sampler={options.sampler.value}, got null")
        if not searching and options.n_trials is not None:
            raise ConfigError(
                f"sweep.n_trials={options.n_trials} needs a sampler that draws; a grid has the points it has"
            )
        points = frozen.corners(searched) if searching else searched.grid()
        frozen.check_limit(len(points))
        runs = []
        for number, point in enumerate(points or [{}]):
            given = searched.point(point)
            try:
                runs.append(config.build(self._compose(given)))
                experiment.check(runs[-1], None)
            except FtexpError as error:
                raise type(error)(f"{error} (trial {number}: {' '.join(given)})") from error
        if searching or options.pruner is not Pruner.none:
            from ftexp.sweep import study

            study.sampler(options, 0)  # both refuse keywords they do not know
            study.pruner(options, 1)
        return runs


def launch(
    folder: Path,
    searched: Space,
    options: Options,
    runs: list[Run],
    compose: Any,
    master: Any,
    started: Callable[[Path], None] | None,
) -> None:
    """Freeze a sweep, or find it frozen and unchanged, and run what is missing of it.

    Args:
        folder: of the sweep.
        searched: what is searched.
        options: how.
        runs: the checked configs; the first stands for what all share.
        compose: takes overrides and returns a composed config.
        master: Hydra's config of the launch.
        started: called with the folder once the sweep is ready to run.
    """
    from ftexp.sweep import study, supervisor, worker

    objectives = runs[0].objectives
    searching = options.sampler is not Sampler.grid
    grid: list[dict[str, Any]] = [] if searching else searched.grid() or [{}]
    identity = study.Identity.of(searched, options, objectives, _shared(searched, runs))
    kept = read_json(folder / "identity.json")
    identity.check(kept, runs[0].name)
    folder.mkdir(parents=True, exist_ok=True)
    if kept is None:
        OmegaConf.save(master, folder / "multirun.yaml")
        frozen.freeze(folder, searched, grid or frozen.corners(searched), compose)
    before = read_json(folder / frozen.FILE) or {}
    same_store = before.get("track_uri") == runs[0].track.uri
    parent = (before.get("mlflow_run") if same_store else None) or track.open_parent(
        runs[0].track, runs[0].name, folder
    )
    rows = {config.digest(r.data): data.load(r.data).digest() for r in runs}
    if any(before.get("rows", {}).get(key, digest) != digest for key, digest in rows.items()):
        raise ConfigError(f"name={runs[0].name}: the rows changed since the sweep was launched; choose another name")
    sweep = Frozen(folder, runs[0].name, searched, options, objectives, parent, runs[0].track.uri, rows)
    sweep.save()
    if kept is None:
        from ftexp.files import write_json

        write_json(folder / "identity.json", identity.told)
    record = worker.open_study(sweep)
    points = tickets(grid, options)
    with study.locked(folder / "settle.lock"):
        record.set_user_attr(worker.STOP, None)
        study.settle(record, points, options.max_retries)
    left = sum(not t.state.is_finished() for t in study.counted(record))
    count = options.workers or len(supervisor.gpus())
    say(f"sweep {sweep.name}: {left} of {len(points)} trials to do, {options.sampler.value}, "
        f"{f'{min(count, left)} workers' if count else 'in this process'}, in {os.path.relpath(folder)}")  # fmt: skip
    if started is not None:
        started(folder)
    if left and count:
        supervisor.supervise(sweep, record, min(count, left))
    elif left:
        while not record.user_attrs.get(worker.STOP) and study.counted(record):
            worker.work(sweep, record)
            if not study.reap(record, options.max_retries):
                break
    _finish(sweep, record, runs[0])


def tickets(grid: list[dict[str, Any]], options: Options) -> list[dict[str, Any] | None]:
    """List the points of all tickets, each replicate its own; None is left to the sampler."""
    points: list[dict[str, Any] | None] = list(grid)
    if options.sampler is not Sampler.grid:
        total = cast(int, options.n_trials)
        first = [{str(k): v for k, v in dict(b).items()} for b in options.baselines]
        points = [*first[:total], *[None] * (total - len(first[:total]))]
    return [point for point in points for _ in range(options.replicates)]


def _shared(searched: Space, runs: list[Run]) -> dict[str, Any]:
    """Return the config values that are the same at every point, searched keys left out."""
    flat = [experiment.identity(run) for run in runs]
    searched_keys = {axis.key for axis in searched.axes}
    return {k: v for k, v in flat[0].items() if k not in searched_keys and all(f.get(k) == v for f in flat)}


def _finish(sweep: Frozen, record: Any, run: Run) -> None:
    """Close the sweep's run in the tracking store and say how it ended.

    Raises:
        TrialsFailed: trials failed.
    """
    from ftexp.sweep import study, worker

    trials = study.counted(record)
    failed = [study.ticket(t) for t in trials if t.user_attrs.get("ftexp:kind") or t.state.name == "FAIL"]
    direction = metrics.METRICS[sweep.objectives[0]].direction
    values = [t.values[0] if t.state.name == "COMPLETE" else None for t in trials]
    best = metrics.best(values, direction)
    told = {"trials": float(len(trials)), "failed": float(len(failed))}
    if best is not None:
        told[sweep.objectives[0]] = cast(float, values[best])
    tags = {} if best is None else {"ftexp.best_trial": study.ticket(trials[best])}
    track.close_parent(run.track, sweep.mlflow_run, tags, told, bool(failed))
    stop = record.user_attrs.get(worker.STOP)
    if failed or stop:
        raise TrialsFailed(
            f"{len(failed)} of {len(trials)} trials failed: {', '.join(map(str, failed))}"
            f"{f'; stopped: {stop}' if stop else ''}; see {os.path.relpath(sweep.folder)}"
        )


@contextmanager
def _only_supervisor(folder: Path, name: str) -> Iterator[None]:
    """Keep a second launch of the same sweep out.

    Raises:
        MachineError: another process runs it; nothing was changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "supervisor.lock").open("a+") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            raise MachineError(
                f"name={name} is being run by process {held.read().strip()}; wait for it, or choose another name"
            ) from None
        held.truncate(0)
        held.write(f"{os.getpid()}")
        held.flush()
        yield


# Hydra 1.3 takes a plugin only under a name in hydra_plugins; 1.4 takes the class's own name.
OWN = f"{Sweeper.__module__}.{Sweeper.__qualname__}"
TARGET = f"hydra_plugins.{OWN}" if hasattr(Plugins, "is_in_toplevel_plugins_module") else OWN


def register() -> None:
    """Make the sweeper known to Hydra as `hydra/sweeper=ftexp`."""
    plugins = Plugins.instance()
    plugins.register(Sweeper)
    plugins.class_name_to_class[TARGET] = Sweeper
    store = ConfigStore.instance()
    store.store(group="hydra/sweeper", name="ftexp", node=Options(_target_=TARGET), provider="ftexp")
    for path in sorted(overrides.SWEEPS.glob("*.yaml")):
        store.store(group="sweep", name=path.stem, node=OmegaConf.load(path), package="_global_", provider=str(path))
