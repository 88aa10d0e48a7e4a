"""The Hydra sweeper `hydra/sweeper=ftexp`: checks every trial of a sweep, then runs them one after the other.

The trials share one process, so the base model is loaded and scored once. One that fails is recorded and the others
go on. The same command again runs what is missing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.plugins.sweeper import Sweeper as HydraSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ftexp import config, experiment, metrics, track
from ftexp.config import Run
from ftexp.errors import FtexpError, TrialsFailed
from ftexp.files import read_json, write_json
from ftexp.progress import say
from ftexp.sweep import space


class Sweeper(HydraSweeper):
    """Runs each point of a grid as a trial in `outputs/sweeps/<name>/<number>`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over before `sweep`."""
        self.context, self.task = hydra_context, task_function
        self.config = config

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Run the sweep; Hydra calls this with the overrides of the command line.

        Raises:
            FtexpError: some trial was refused, and nothing was started.
            TrialsFailed: the sweep ran to its end and trials failed; the others are complete.
        """
        points = space.grid(arguments)
        folder = Path(cast(DictConfig, self.config).hydra.sweep.dir)
        trials = [self._compose(point, number) for number, point in enumerate(points)]
        runs = self._checked(trials, points, folder)
        labels = space.swept(points)
        self._begin(folder, runs[0], labels)
        say(f"sweep {runs[0].name}: {len(runs)} trials in {folder}")
        results = [
            self._run(number, trial, label) for number, (trial, label) in enumerate(zip(trials, labels, strict=True))
        ]
        self._end(folder, runs[0], results)
        return results

    def _compose(self, point: list[str], number: int) -> DictConfig:
        cfg = self.context.config_loader.load_sweep_config(cast(DictConfig, self.config), point)
        with open_dict(cfg):
            cfg.hydra.job.id, cfg.hydra.job.num = str(number), number
        return cfg

    def _checked(self, trials: list[DictConfig], points: list[list[str]], folder: Path) -> list[Run]:
        runs = []
        for number, (trial, point) in enumerate(zip(trials, points, strict=True)):
            try:
                runs.append(config.build(_without_hydra(trial)))
                experiment.check(runs[-1], folder / str(number))
            except FtexpError as error:
                raise type(error)(f"{error} (trial {number}: {' '.join(point)})") from error
        return runs

    def _begin(self, folder: Path, run: Run, labels: list[str]) -> None:
        """Write what the trials of a sweep share, and open its run in the tracking store once."""
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        kept = read_json(folder / "sweep.json") or {}
        parent = kept.get("mlflow_run") or track.open_parent(run.track, run.name, folder)
        write_json(
            folder / "sweep.json",
            {"name": run.name, "trials": labels, "objectives": run.objectives, "mlflow_run": parent},
        )

    def _run(self, number: int, trial: DictConfig, label: str) -> Any:
        say(f"trial {number}: {label}")
        done: JobReturn = run_job(
            hydra_context=self.context, task_function=self.task, config=trial,
            job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
        )  # fmt: skip
        result = done._return_value
        if done.status is JobStatus.FAILED or isinstance(result, FtexpError):
            say(f"trial {number} failed: {result}")
        return result

    def _end(self, folder: Path, run: Run, results: list[Any]) -> None:
        failed = [n for n, r in enumerate(results) if isinstance(r, Exception)]
        told = {"trials": float(len(results)), "failed": float(len(failed))}
        objective = run.objectives[0]
        values = [None if isinstance(r, Exception) else r[objective] for r in results]
        best = metrics.best(values, metrics.METRICS[objective].direction)
        tags = {} if best is None else {"ftexp.best_trial": best}
        if best is not None:
            told |= {name: value for name, value in results[best].items() if name in metrics.METRICS}
        parent = (read_json(folder / "sweep.json") or {})["mlflow_run"]
        track.close_parent(run.track, parent, tags, told, bool(failed))
        if failed:
            raise TrialsFailed(
                f"{len(failed)} of {len(results)} trials failed: {', '.join(map(str, failed))}; see {folder}"
            )


def _without_hydra(trial: DictConfig) -> DictConfig:
    bare = copy.deepcopy(trial)
    with read_write(bare), open_dict(bare):
        del bare["hydra"]
    return bare


@dataclass
class Options:
    """Keys of `hydra.sweeper`."""

    _target_: str = ""


# Hydra 1.3 takes a plugin only under a name in hydra_plugins; 1.4 takes the class's own name.
OWN = f"{Sweeper.__module__}.{Sweeper.__qualname__}"
TARGET = f"hydra_plugins.{OWN}" if hasattr(Plugins, "is_in_toplevel_plugins_module") else OWN


def register() -> None:
    """Make the sweeper known to Hydra as `hydra/sweeper=ftexp`."""
    plugins = Plugins.instance()
    plugins.register(Sweeper)
    plugins.class_name_to_class[TARGET] = Sweeper
    ConfigStore.instance().store(group="hydra/sweeper", name="ftexp", node=Options(_target_=TARGET), provider="ftexp")
