"""The Hydra sweeper `hydra/sweeper=ftexp`: checks a whole sweep, freezes it, and has workers run it.

The same command again goes on with what is missing, whatever ended the last launch.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.plugins.sweeper import Sweeper as HydraSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from ftexp import config, data, experiment, facts, metrics, overrides, probe, track
from ftexp.config import Method, Run
from ftexp.errors import ConfigError, FtexpError, MachineError, NoRoom, TrialsFailed
from ftexp.files import check_folder, read_json, read_sweep, write_json
from ftexp.progress import say
from ftexp.runs import called, keep
from ftexp.sweep import frozen, limits, race, space
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import BY_ROWS, Engine, Options, Pruner, Sampler, idle
from ftexp.sweep.space import Space
from ftexp.train import control, spread

LOCK = "supervisor.lock"


class Sweeper(HydraSweeper):
    """Runs a search space as trials in `outputs/sweeps/<name>/<number>`."""

    started: Callable[[Path], None] | None = None
    """Called with the sweep's folder once its trials begin."""
    instead: Callable[[Space, Options, list[Run]], None] | None = None
    """Called with the checked sweep instead of its launch; nothing is written."""

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
        folder = Path(self.master.hydra.sweep.dir).absolute()
        searched = as_begun(folder, space.parse(*_params(options.params, arguments)))
        self._check_typed(options, begun=(folder / frozen.FILE).exists())
        runs = self._checked(searched, options)
        overrides.check_effect(arguments, runs)
        if (instead := type(self).instead) is not None:
            instead(searched, options, runs)
            return
        check_folder(folder)
        if not (folder / frozen.FILE).exists():
            for run in {config.digest(r.model, r.lora, r.data, r.trainer, r.eval): r for r in runs}.values():
                experiment.prepare(run, elsewhere=options.engine is not Engine.local)
            if options.engine is Engine.local:
                experiment.check_gpu("sweep.at_most", options.at_most)
            limits.refuse(self._named(searched, options, runs), options)
            probe.refuse(probe.quick(runs[0], folder))
        deserted = False
        with only_supervisor(folder, runs[0].name, options.join) as alone:
            if alone:
                launch(folder, searched, options, runs, self._compose, self.master, type(self).started)
            else:
                deserted = help_out(folder, searched, options, runs)
        if deserted:  # who helped closes it
            with only_supervisor(folder, runs[0].name, options.join) as alone:
                if alone:  # and is not one of several
                    launch(folder, searched, options, runs, self._compose, self.master, type(self).started)

    def _named(self, searched: Space, options: Options, runs: list[Run]) -> list[tuple[str, Run]]:
        """Name the points that `_checked` built."""
        points = searched.grid() or [{}] if options.sampler is Sampler.grid else frozen.corners(searched)
        named = (" ".join(f"{k}={v}" for k, v in point.items()) or "the trial" for point in points)
        return list(dict(zip(named, runs, strict=True)).items())

    def _options(self) -> Options:
        try:
            options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), self.given))
        except OmegaConfBaseException as error:
            raise ConfigError(f"sweep.{str(error).splitlines()[0]}") from error
        return cast(Options, options)

    def _check_typed(self, options: Options, begun: bool) -> None:
        """Refuse keys of the command line that have no effect; a file may bring them for another choice.

        A sweep that has begun with one that its identity holds goes on with it.

        Raises:
            ConfigError: names the key and what leaves it without effect.
        """
        why = {key: told for key, told in idle(options).items() if not (begun and key in overrides.KEPT_KEYS)}
        for text in self.master.hydra.overrides.hydra:
            key, _, value = text.lstrip("+").removeprefix("hydra.sweeper.").partition("=")
            if (name := key.partition(".")[0]) in why:
                raise ConfigError(f"sweep.{key} would change nothing, got {value}: {why[name]}")

    def _compose(self, point: list[str]) -> DictConfig:
        cfg = copy.deepcopy(self.context.config_loader.load_sweep_config(cast(DictConfig, self.master), point))
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        return cfg

    def _placed(self, cfg: DictConfig, searched: Space, point: dict[str, Any]) -> DictConfig:
        """Set a point in a composed config; what does not fit there is composed, because Hydra tells which override."""
        try:
            return frozen.placed(cfg, searched, point)
        except OmegaConfBaseException:
            return self._compose(searched.point(point))

    def _checked(self, searched: Space, options: Options) -> list[Run]:
        """Build and check every point of a grid, or the ends and values of every axis of a search."""
        searching = options.sampler is not Sampler.grid
        if searching and options.n_trials is None:
            raise ConfigError(f"sweep.n_trials must be set with sweep.sampler={options.sampler.value}, got null")
        if not searching and options.n_trials is not None:
            raise ConfigError(
                f"sweep.n_trials={options.n_trials} needs a sampler that draws, such as sweep.sampler=tpe; a grid has "
                "the points it has"
            )
        points = frozen.corners(searched) if searching else searched.grid()
        frozen.check_limit(len(points))
        runs = []
        variants: dict[str, DictConfig] = {}
        for number, point in enumerate(points or [{}]):
            given, variant = searched.point(point), frozen.variant(searched, point)
            try:
                if variant not in variants:
                    variants[variant] = self._compose(frozen.shared(searched, point))
                runs.append(config.build(self._placed(variants[variant], searched, point)))
                experiment.check(runs[-1], None)
            except FtexpError as error:
                raise type(error)(f"{error} (trial {number}: {' '.join(given)})") from error
        self._check_options(searched, options, runs)
        silent = [run for run in runs if not run.trainer.report_steps]
        if options.pruner is not Pruner.none and silent:
            raise ConfigError(f"sweep.pruner={options.pruner.value} needs trainer.report_steps above 0, got 0")
        if searching or options.pruner is not Pruner.none:
            from ftexp.sweep import study

            if searching:
                study.try_sampler(searched, options, [metrics.METRICS[n].direction.value for n in runs[0].objectives])
            study.try_pruner(options, runs[0].trainer.report_steps, longest(runs, options))
        return runs

    def _check_options(self, searched: Space, options: Options, runs: list[Run]) -> None:
        """Refuse keys of the sweep that are at odds with what is searched."""
        from ftexp.sweep import engines, packs, supervisor

        for axis in searched.axes:
            if axis.key in ("name", "objectives"):
                raise ConfigError(f"{axis.key} must be one value for the whole sweep, got {','.join(axis.texts)}")
            if all(why := config.idle(run, axis.key) for run in runs):
                raise ConfigError(f"{axis.key} must not be searched, its trials would be the same: {why}")
        if options.replicates > 1:
            if any(axis.key == "seed" for axis in searched.axes):
                raise ConfigError(
                    f"seed must be one value with sweep.replicates={options.replicates}, which count it up"
                )
            last = max(run.seed for run in runs) + options.replicates - 1
            config.require(last < 2**32, "seed + sweep.replicates", last, "at most 4294967295 for the last")
        if options.sampler is not Sampler.grid and not searched.axes:
            raise ConfigError(
                f"sweep.sampler={options.sampler.value} needs keys to search, got none; lora.r=8,16 is one"
            )
        for run in runs:
            for name in options.at_most:
                metrics.check_objective(name, experiment.switched_on(run), "sweep.at_most")
        if options.sampler is Sampler.qmc and options.sampler_args:
            raise ConfigError(
                f"sweep.sampler_args must be left out with sweep.sampler=qmc, whose points hang on sweep.seed alone, "
                f"got {', '.join(options.sampler_args)}"
            )
        if options.baselines and options.sampler is Sampler.grid:
            raise ConfigError(
                "sweep.baselines need a sampler that draws, such as sweep.sampler=tpe; a grid has the points it has"
            )
        for point in options.baselines:
            searched.baseline(point)
        if options.pruner is not Pruner.none and len(runs[0].objectives) > 1:
            raise ConfigError(
                f"sweep.pruner={options.pruner.value} needs one objective, got {', '.join(runs[0].objectives)}"
            )
        if options.pruner is not Pruner.none:
            race.check_alike(options, runs)
        if options.pruner in BY_ROWS:
            rows = min(len({*data.units(data.load(run.data).valid)}) for run in runs)
            race.check(options, [axis.key for axis in searched.axes], runs[0].objectives, rows)
        engines.check(options)
        packs.check(options, searched.axes, runs)
        for run in runs if options.gpus_per_trial > 1 else ():
            spread.shape(run.trainer, options.gpus_per_trial)
            if run.trainer.kind is not Method.sft:
                kind = run.trainer.kind.value
                raise ConfigError(f"sweep.gpus_per_trial={options.gpus_per_trial} needs trainer.kind=sft, got {kind}")
            if run.trainer.engine is not config.Engine.trl:
                name = run.trainer.engine.value
                raise ConfigError(f"sweep.gpus_per_trial={options.gpus_per_trial} needs trainer.engine=trl, got {name}")
        count = supervisor.workers(options)
        if options.storage is not None and options.storage.startswith("sqlite") and count > 1:
            raise ConfigError(
                f"sweep.storage={options.storage} with {count} GPUs, so {count} workers: SQLite hands one trial to two "
                "workers; add sweep.workers=1, or leave sweep.storage out for a journal file"
            )


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
    from ftexp.sweep import study, worker

    objectives = runs[0].objectives
    searching = options.sampler is not Sampler.grid
    grid: list[dict[str, Any]] = [] if searching else searched.grid() or [{}]
    kept = read_json(folder / "identity.json")
    identity = study.Identity.of(
        searched, options, objectives, _shared(searched, runs), _depending(searched, runs)
    ).known_to(kept)
    identity.check(_filled(folder, kept), runs[0].name, called(folder, runs[0].name))
    searched = as_begun(folder, searched)  # it may have been begun by another process since this one looked
    folder.mkdir(parents=True, exist_ok=True)
    if kept is None:
        shutil.rmtree(folder / "frozen", ignore_errors=True)  # of a launch that ended before its trials began
        OmegaConf.save(master, folder / "multirun.yaml")
        frozen.freeze(folder, searched, grid or frozen.corners(searched), compose)
    before = read_sweep(folder) or {}
    was, now = before.get("track_uri", runs[0].track.uri), runs[0].track.uri
    if was != now:
        raise ConfigError(
            f"name={runs[0].name} was launched with track.uri={was}, got {now}: its trials would lie in two stores; "
            "keep the first, or choose another name"
        )
    _same_record(before, options, runs[0].name)
    if before:
        take_back(folder)
    rows = _rows(folder, runs, before.get("rows", {}), runs[0].name)
    rung, code = runs[0].trainer.report_steps, facts.code()
    own = os.path.relpath(overrides.Own.folder) if overrides.Own.folder else None
    grid = [] if options.sampler is not Sampler.grid else searched.grid() or [{}]
    total, most = len(tickets(grid, options, searched)), longest(runs, options)
    params = track.searched(identity.told)
    parent = before.get("mlflow_run") or track.open_parent(runs[0].track, runs[0].name, folder, params)
    sweep = Frozen(
        folder, runs[0].name, searched, options, objectives, parent, runs[0].track.uri, rows, rung, code, total, own,
        str(Path.cwd()), most,
    )  # fmt: skip
    if kept is None and options.storage is not None and study.counted(worker.open_study(sweep)):
        track.end(runs[0].track, parent, {}, {}, "KILLED")
        raise ConfigError(
            f"name={sweep.name}: sweep.storage={options.storage} holds another sweep of this name; choose another name"
        )
    if before.get("code", code) != code:
        say("the code of ftexp is not that of the launch; trials from now on run with the new code", always=True)
    sweep.save()
    if parent is not None:  # which leads to it from now on
        (folder / track.BEGUN).unlink(missing_ok=True)
    if kept is None:
        write_json(folder / "identity.json", identity.told)
    carry_out(sweep, runs[0], started)


def longest(runs: list[Run], options: Options) -> int:
    """Return the steps of the longest trial where the pruner is Hyperband, else 0; of a search among its ends."""
    if options.pruner is not Pruner.hyperband:
        return 0
    steps = [0]
    for run in {config.digest(r.model, r.data, r.trainer): r for r in runs}.values():
        if run.trainer.steps is not None:
            steps.append(run.trainer.steps)
            continue
        from ftexp import estimate
        from ftexp.train import sft

        task = experiment.TASKS[run.trainer.kind](run, data.load(run.data))
        steps.append(sft.planned_steps(run.trainer, len(estimate.rows(task.train, run).lengths)))
    return max(steps)


def as_begun(folder: Path, searched: Space) -> Space:
    """Search the keys in the order they were begun in, and ranges in the numbers they were.

    Points are drawn key by key, so in another order they would be others. An earlier ftexp took `interval(0,1)` of any
    key for whole numbers, and Optuna's record refuses a key that changes. Of another space nothing is changed.
    """
    if not (folder / frozen.FILE).exists():
        return searched
    begun = {axis.key: axis for axis in frozen.load(folder).space.axes}
    if begun.keys() != {axis.key for axis in searched.axes}:
        return searched
    axes = sorted(searched.axes, key=lambda axis: list(begun).index(axis.key))
    return replace(searched, axes=tuple(replace(axis, whole=begun[axis.key].whole) for axis in axes))


def _filled(folder: Path, kept: dict[str, str] | None) -> dict[str, str] | None:
    """Add to the identity of a launch the keys that its ftexp did not have: its trials have their defaults."""
    if kept is None or not (had := frozen.keys(folder)):
        return kept
    later = {key: value for key, value in experiment.identity(Run()).items() if key not in had}
    return {f"config {key}": json.dumps(value) for key, value in later.items()} | kept


def _rows(folder: Path, runs: list[Run], kept: dict[str, str], name: str) -> dict[str, str]:
    """Digest the rows of each config of data, by its digest.

    Raises:
        ConfigError: they are not those of the launch, whose ftexp may have had fewer keys.
    """
    rows, had = {}, frozen.keys(folder) if kept else set()
    for run in {config.digest(run.data): run for run in runs}.values():
        key, digest = config.digest(run.data), data.load(run.data).digest()
        then = config.digest({k: v for k, v in config.plain(run.data).items() if f"data.{k}" in had})
        if kept.get(key, kept.get(then, digest)) != digest:
            raise ConfigError(f"name={name}: the rows changed since the sweep was launched; choose another name")
        rows[key] = digest
    return rows


def _same_record(before: dict[str, Any], options: Options, name: str) -> None:
    """Refuse a launch whose record would be another one than that of the trials that are there.

    Raises:
        ConfigError: `sweep.storage` changed.
    """
    was, now = before.get("options", {}).get("storage"), options.storage
    if before and was != now:
        raise ConfigError(
            f"name={name} was launched with sweep.storage={was or 'null'}, got {now or 'null'}: its record would begin "
            "anew, and its trials be overwritten; keep the first, or choose another name"
        )


def take_back(folder: Path) -> None:
    """Forget what stopped the launch before, once the sweep is ours and before rows are read.

    An order to stop that comes while this launch gets ready is for this one.
    """
    from ftexp.sweep import worker

    record = worker.open_study(frozen.load(folder))
    for mark in (worker.STOP, worker.LEAVE, worker.FULL):
        if record.user_attrs.get(mark) is not None:
            record.set_user_attr(mark, None)


def carry_out(sweep: Frozen, run: Run, started: Callable[[Path], None] | None = None) -> None:
    """Run what is missing of a frozen sweep, and close it.

    Args:
        sweep: what was launched.
        run: the config of one of its points, for what all share.
        started: called with the folder once the sweep is ready to run.

    Raises:
        TrialsFailed: trials failed; the others are complete.
        Preempted: the sweep was told to stop before its end.
    """
    from ftexp.sweep import layout, screen, study, worker

    options, record = sweep.options, worker.open_study(sweep)
    keep(sweep.folder, sweep.name)
    grid = [] if options.sampler is not Sampler.grid else sweep.space.grid() or [{}]
    points = tickets(grid, options, sweep.space)
    with study.locked(sweep.folder / "settle.lock"):
        gone = study.settle(record, points, options.max_retries, sweep.folder)
        study.skipped_again(record, limits.mark(options))
        worker.stop_after_failures(sweep, record)  # those of the launches before count too
    record.set_user_attr(worker.LAUNCH, _holder(sweep.folder))
    if gone:
        say(
            f"sweep {sweep.name}: files of trials {', '.join(map(str, gone))} are gone; they run again",
            always=True,
        )
    left = sum(not t.state.is_finished() for t in study.counted(record))
    try:
        if left:
            track.reopen_parent(run.track, sweep.mlflow_run)
            keys = [axis.key for axis in sweep.space.axes if not axis.composes]
            track.view(run.track, sweep.mlflow_run, sweep.name, sweep.objectives, keys)
            probe.refuse(probe.quick(run, sweep.folder))  # of a sweep that goes on: elsewhere, or with other versions
        count = layout.workers(sweep, record, left)
        where = f"{min(count, left)} workers" if count else "in this process"
        where += "" if options.engine is Engine.local else f" on {options.engine.value}"
        say(
            f"sweep {sweep.name}: {left} of {len(points)} trials to do, {options.sampler.value}, {where}, "
            f"in {os.path.relpath(sweep.folder)}"
        )
        if started is not None:
            started(sweep.folder)
        _run_left(sweep, record, left, count)
    except BaseException:  # above all a signal, at which there is no end to tell
        track.end(run.track, sweep.mlflow_run, {}, {}, "KILLED")
        raise
    if left:
        say(screen.line(sweep, record))
    _finish(sweep, record, run)


def go_on(sweep: Frozen, workers: int | None) -> None:
    """Run what is missing of a sweep from its folder alone.

    Args:
        sweep: what was frozen at the launch.
        workers: processes; None takes as many as the launch.

    Raises:
        ConfigError: the rows are no longer those of the launch.
        TrialsFailed: trials failed; the others are complete.
        Preempted: it was told to stop before its end.
    """
    take_back(sweep.folder)
    options = sweep.options if workers is None else replace(sweep.options, workers=workers)
    searching = options.sampler is not Sampler.grid
    points = frozen.corners(sweep.space) if searching else sweep.space.grid()
    runs = [sweep.run(point, 0) for point in points or [{}]]
    rows = _rows(sweep.folder, runs, sweep.rows, sweep.name)
    if sweep.code != facts.code():
        say("the code of ftexp is not that of the launch; trials from now on run with the new code", always=True)
    total = len(tickets([] if searching else points or [{}], options, sweep.space))
    most = longest(runs, options)
    sweep = replace(sweep, options=options, code=facts.code(), rows=rows, tickets=total, longest=most)
    sweep.save()
    carry_out(sweep, runs[0])


def _run_left(sweep: Frozen, record: Any, left: int, count: int, helps: bool = False) -> None:
    """Run waiting tickets with so many workers, with none in this process."""
    from ftexp.sweep import study, supervisor, worker

    if left and count:
        supervisor.supervise(sweep, record, count, left, helps)
        return
    while left and not record.user_attrs.get(worker.STOP) and study.counted(record):
        worker.work(sweep, record)
        study.reap(record, sweep.options.max_retries, folder=sweep.folder)
        if not (study.unfinished(record) or study.mend(record)):
            break
        time.sleep(supervisor.POLL_SECONDS)  # a helper is at the last trials, and may give one back


def help_out(folder: Path, searched: Space, options: Options, runs: list[Run]) -> bool:
    """Run tickets of a sweep that another process launched and will close.

    Returns:
        Whether that process is gone, as after a kill, and has not closed it.

    Raises:
        ConfigError: it has another search space.
    """
    from ftexp.sweep import study, supervisor, worker

    while not (folder / "identity.json").exists():  # the launch is still freezing it
        if running(folder) is None:
            raise MachineError(
                f"name={runs[0].name}: the launch to help ended before its trials began; launch it again"
            )
        time.sleep(0.2)
    kept = read_json(folder / "identity.json")
    shared, depending = _shared(searched, runs), _depending(searched, runs)
    identity = study.Identity.of(searched, options, runs[0].objectives, shared, depending).known_to(kept)
    identity.check(_filled(folder, kept), runs[0].name, called(folder, runs[0].name))
    _same_record(read_sweep(folder) or {}, options, runs[0].name)
    sweep = replace(frozen.load(folder), options=options)
    if sweep.code != facts.code():
        raise MachineError(
            f"name={sweep.name}: the launch runs other code of ftexp than this process has, and one sweep must not mix "
            "two; bring both to the same version"
        )
    record = worker.open_study(sweep)
    while _unsettled(record, folder) and running(folder) is not None:
        time.sleep(0.2)
    waiting = sum(t.state.name == "WAITING" for t in study.counted(record))
    say(f"sweep {sweep.name}: helping process {_holder(folder)}; {waiting} trials wait")
    _run_left(sweep, record, waiting, supervisor.workers(options), helps=True)
    return running(folder) is None and record.user_attrs.get(worker.LAUNCH) is not None


def _unsettled(record: Any, folder: Path) -> bool:
    """Whether the launch has yet to queue its tickets, or to take back what stopped the one before it."""
    from ftexp.sweep import study, worker

    attrs = record.user_attrs
    return attrs.get(worker.LAUNCH) != _holder(folder) and bool(attrs.get(worker.STOP) or not study.counted(record))


def _params(params: dict[str, Any], arguments: list[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Turn a sweep's file and the command line into overrides, and conditions of keys the command line left alone.

    Raises:
        ConfigError: a conditional entry has other keys than `when` and `is`; or a list is given for single values.
    """
    given = {text.partition("=")[0].lstrip("+") for text in arguments}
    texts, conditions = [], {}
    for key, value in params.items():
        if isinstance(value, dict):
            when = value.get("when")
            if value.keys() != {"when", "is"} or not isinstance(when, dict):
                raise ConfigError(f"sweep.params.{key} must be values, or {{when: {{key: values}}, is: values}}")
            conditions |= {} if key in given else {key: when}
            value = value["is"]
        if isinstance(value, list) and not (config.is_list(key) or key.startswith(overrides.OPEN)):
            several = ",".join(map(str, value))
            raise ConfigError(
                f'sweep.params.{key} must be text with commas for several values, "{several}", got {value}'
            )
        texts.append(f"{key}={value}")
    return [*texts, *arguments], conditions


def tickets(grid: list[dict[str, Any]], options: Options, searched: Space) -> list[dict[str, Any] | None]:
    """List the points of all tickets, each replicate its own; None is left to the sampler."""
    points: list[dict[str, Any] | None] = list(grid)
    if options.sampler is not Sampler.grid:
        total = cast(int, options.n_trials)
        first = [searched.baseline(b) for b in options.baselines]
        points = [*first[:total], *[None] * (total - len(first[:total]))]
    return [point for point in points for _ in range(options.replicates)]


def _shared(searched: Space, runs: list[Run]) -> dict[str, Any]:
    """Return the config values that are the same at every point, searched keys left out."""
    flat = [experiment.identity(run) for run in runs]
    fixed = flat[0].keys() - {axis.key for axis in searched.axes}
    return {k: v for k, v in flat[0].items() if k in fixed and all(f.get(k) == v for f in flat)}


def _depending(searched: Space, runs: list[Run]) -> dict[str, list[Any]]:
    """Return the values of what is not searched and yet differs between the points, such as `${mul:2,${lora.r}}`."""
    flat = [experiment.identity(run) for run in runs]
    keys = {key for one in flat for key in one} - {axis.key for axis in searched.axes}
    told = {key: [one.get(key) for one in flat] for key in sorted(keys)}
    return {key: values for key, values in told.items() if any(value != values[0] for value in values)}


def _finish(sweep: Frozen, record: Any, run: Run) -> None:
    """Close the sweep's run in the tracking store and say how it ended.

    Raises:
        TrialsFailed: trials failed.
        Preempted: it was told to stop before its end.
    """
    from ftexp.sweep import screen, study, worker

    trials = study.counted(record)
    _tell_of_the_dead(sweep, trials, run)
    failed = [study.ticket(t) for t in trials if t.user_attrs.get("ftexp:kind") or t.state.name == "FAIL"]
    states = Counter(map(screen.state_of, trials))
    tags, told = track.outcome(states, sweep.objectives[0], screen.best_point(sweep, trials))
    stop = record.user_attrs.get(worker.STOP)
    absent = max(0, sweep.tickets - len(trials))
    left = record.user_attrs.get(worker.LEAVE) or ((stop or absent) and not failed)
    status = "KILLED" if left else "FAILED" if failed else "FINISHED"
    track.end(run.track, sweep.mlflow_run, tags, told, status)
    record.set_user_attr(worker.LAUNCH, None)
    if record.user_attrs.get(worker.LEAVE):
        raise control.left(f"sweep {sweep.name} was stopped: {screen.line(sweep, record)}")
    if record.user_attrs.get(worker.FULL):
        raise NoRoom(stop)
    if absent and not (failed or stop):
        raise TrialsFailed(f"{absent} of {sweep.tickets} trials have not begun; the same command goes on with them")
    if failed or stop:
        reasons = {t.user_attrs.get("ftexp:reason") or "" for t in trials if study.ticket(t) in failed}
        why = f" ({reason})" if len(reasons) == 1 and (reason := reasons.pop()) else ""
        raise TrialsFailed(
            f"{len(failed)} of {len(trials)} trials failed: {', '.join(map(str, failed))}{why}"
            f"{f'; stopped: {stop}' if stop else ''}; see {os.path.relpath(sweep.folder)}"
        )


def _tell_of_the_dead(sweep: Frozen, trials: list[Any], run: Run) -> None:
    """Write down that trials have failed whose workers died: in their folders they run, and in the tracking store."""
    from ftexp.sweep import study

    for trial in trials:
        path = sweep.folder / str(study.ticket(trial)) / "trial.json"
        told: dict[str, Any] = (read_json(path) or {}) if trial.state.name == "FAIL" else {}
        if told.get("state") == "running":
            write_json(path, told | {"state": "failed", "error": trial.user_attrs.get("ftexp:reason") or "worker died"})
            if told.get("mlflow_run"):
                track.end(run.track, told["mlflow_run"], {}, {}, "FAILED")


@contextmanager
def only_supervisor(folder: Path, name: str, join: bool | None = False) -> Iterator[bool]:
    """Keep a second launch of the same sweep out, or let it help; None where it is one run, and cannot.

    Yields:
        True to the launch that holds the sweep, False to one that joins it.

    Raises:
        MachineError: another process runs it and `join` is false; nothing was changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as held:
        if not _taken(held):
            if join:
                yield False
                return
            help_it = "" if join is None else ", or help it with sweep.join=true"
            raise MachineError(
                f"name={name} is being run by process {_holder(folder)}; wait for it, {'or ' * (join is None)}choose "
                f"another name{help_it}"
            )
        held.truncate(0)
        held.write(f"{os.getpid()} on {socket.gethostname()}")
        held.flush()
        yield True


def only(folder: Path, name: str) -> AbstractContextManager[bool]:
    """Keep a second launch of the same run out of its folder.

    Raises:
        MachineError: as of `only_supervisor`.
    """
    return only_supervisor(folder, name, join=None)


def _taken(held: Any) -> bool:
    """Take the lock, or tell that another holds it; `running` holds it for a moment, so once is not enough."""
    for attempt in range(4):
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05 * (attempt < 3))
    return False


def _holder(folder: Path) -> str:
    return (folder / LOCK).read_text().strip()


def running(folder: Path) -> str | None:
    """Tell which process runs a sweep, as `<pid> on <host>`; None where none does."""
    path = folder / LOCK
    if not path.exists():
        return None
    with path.open("a+") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(folder)
    return None


# Hydra 1.3 takes a plugin only under a name in hydra_plugins; 1.4 takes the class's own name.
OWN = f"{Sweeper.__module__}.{Sweeper.__qualname__}"
TARGET = f"hydra_plugins.{OWN}" if hasattr(Plugins, "is_in_toplevel_plugins_module") else OWN


def register() -> None:
    """Make the sweeper known to Hydra as `hydra/sweeper=ftexp`."""
    plugins = Plugins.instance()
    plugins.register(Sweeper)
    plugins.register(overrides.Own)
    plugins.class_name_to_class[TARGET] = Sweeper
    config.store("ftexp", Options(_target_=TARGET), "hydra/sweeper")
    for path in sorted(overrides.SWEEPS.glob("*.yaml")):
        config.store_sweep(path)
