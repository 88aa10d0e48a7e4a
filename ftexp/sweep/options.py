"""Keys of `hydra.sweeper`, short `sweep.<key>` on the command line: how a sweep searches, runs and ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ftexp.config import refuse_secret, require
from ftexp.errors import ConfigError


class Sampler(Enum):
    """How points are chosen.

    Each is seeded for each trial by itself, so a resumed sweep proposes what an undisturbed
    one would have.
    """

    grid = "grid"
    """Every combination of single values, once."""
    random = "random"
    """Independent draws."""
    tpe = "tpe"
    """Tree-structured Parzen estimator, Bergstra et al. 2011; for most searches."""
    gp = "gp"
    """Gaussian process; for few trials over numbers."""
    qmc = "qmc"
    """Scrambled Sobol points: even cover without looking at results."""
    nsga2 = "nsga2"
    """Genetic search for several objectives, Deb et al. 2002."""


DRAWN = (Sampler.grid, Sampler.random, Sampler.qmc)
"""Samplers that look at no result; the points of others depend on how many trials run at a time."""


class Pruner(Enum):
    """When a trial that lags behind is stopped, judged by its held-out loss at the rungs.

    Each judges by those that have come as far by then, so who is stopped depends on how many trials run at a time, and
    after a kill on who goes on first; what a trial learns does not.
    """

    none = "none"
    """Never."""
    asha = "asha"
    """Asynchronous successive halving, arXiv:1810.05934."""
    hyperband = "hyperband"
    """Several brackets of successive halving, arXiv:1603.06560; as many as the longest planned trial has room for."""
    median = "median"
    """Below the median of the trials that came as far."""
    patient = "patient"
    """Median, but only after no gain at two rungs in a row."""
    race = "race"
    """Only where a paired test over the held-out rows says that the trial is behind the best one by more than chance
    (`ftexp/stats/racing.py`): at most `alpha` of all sweeps stop the trial that is truly best at a rung."""
    halving = "halving"
    """Successive halving, but for those of the worse half whom a paired test over the held-out rows does not tell from
    the best: some two thirds of the steps of `race`, without its promise over the sweep. With `at_most` trials are
    compared with complete ones within the bounds alone, as in a race."""


ENTERED = (Pruner.asha, Pruner.hyperband)
"""Pruners that enter a trial in a list of each rung, and go by that list."""
BY_ROWS = (Pruner.race, Pruner.halving)
"""Pruners that go by the rows of a rung."""


class Engine(Enum):
    """What starts the workers; the record hands out the trials in each case."""

    local = "local"
    """Processes of this machine."""
    slurm = "slurm"
    """Jobs of Slurm, through submitit; `ftexp[slurm]`."""
    ray = "ray"
    """Tasks of a Ray cluster; `ftexp[ray]`."""


class Over(Enum):
    """What becomes of a trial whose plan passes a limit."""

    refuse = "refuse"
    """The sweep does not start. A search checks the ends and values of its keys; a draw beyond is skipped."""
    skip = "skip"
    """The trial is left out and recorded with its reason; the others run. A raised limit lets it run."""


def idle(options: Options) -> dict[str, str]:
    """Tell which keys have no effect beside the others, and what leaves them without."""
    rules = (
        (("sampler_args", "seed"), options.sampler is Sampler.grid, "sweep.sampler=grid, which draws nothing"),
        (("pruner_args",), options.pruner is Pruner.none, "sweep.pruner=none"),
        (("tokens_per_second",), not {"hours", "usd"} & {*options.plan_at_most},
         "no bound on hours or usd in sweep.plan_at_most"),
        (("usd_per_hour",), "usd" not in options.plan_at_most, "no bound on usd in sweep.plan_at_most"),
    )  # fmt: skip
    return {key: why for keys, holds, why in rules for key in keys if holds}


PLANNED = ("memory_gib", "checkpoint_gib", "trainable", "tokens", "tflop", "hours", "usd")
"""What `plan_at_most` may bound."""


@dataclass
class Options:
    """How a sweep searches, runs and ends."""

    _target_: str = ""
    _recursive_: bool = False
    sampler: Sampler = Sampler.grid
    """How points are chosen."""
    sampler_args: dict[str, Any] = field(default_factory=dict)
    """More keywords for Optuna's sampler, which refuses those it does not know."""
    n_trials: int | None = None
    """Points in total, for every sampler but `grid`; resuming never adds to it, a larger number does."""
    pruner: Pruner = Pruner.none
    """When a lagging trial is stopped."""
    pruner_args: dict[str, Any] = field(default_factory=dict)
    """More keywords for Optuna's pruner. Of `race`: `alpha` (0.05), `spared` (0.2, share of the steps before which
    nothing is stopped) or `warm_up` (0, rungs), `min_rows` (24, held-out rows below which it is refused). Of `halving`:
    `alpha` (0.02), `reduction_factor` (2), `min_rows` (24), `every_rung` (true; false leaves out the held-out losses
    that stop nobody and are for the curves alone)."""
    seed: int = 0
    """Seed of the search; trials have their own in `seed`."""
    replicates: int = 1
    """Runs of each point, over `seed`, `seed` + 1, ...; the point is ranked by their mean."""
    baselines: list[Any] = field(default_factory=list)
    """Points to try first, as mappings from key to value; they count towards `n_trials`."""
    params: dict[str, Any] = field(default_factory=dict)
    """The search space in Hydra's override grammar, key -> values; the command line wins key by key.

    `{when: {lora: [default, rslora]}, is: "16,32"}` searches a key only where keys before it have these values."""
    at_most: dict[str, float] = field(default_factory=dict)
    """Bounds on metrics: a trial above one is infeasible and never best."""
    plan_at_most: dict[str, float] = field(default_factory=dict)
    """Bounds on the plan of a trial, seen before it runs: `memory_gib`, `checkpoint_gib`, `trainable` weights, `tokens`
    with padding, `tflop`; `hours` of training and `usd` with the next keys."""
    over: Over = Over.refuse
    """What becomes of a trial beyond such a bound."""
    tokens_per_second: float | None = None
    """Speed of training, as `ftexp plan --probe` measures it; gives hours."""
    usd_per_hour: float | None = None
    """Price of the machine; gives dollars."""
    workers: int = 0
    """Processes; 0 takes one for each visible GPU. Without a GPU trials then run in this process, or, in a sweep of
    minutes over a small model whose sampler and pruner look at no other trial, in up to 8 where a probe says that they
    are done sooner. 1 is one process always."""
    pack: int = 1
    """Trials that a worker trains in one pass, with `trainer.engine=packed`; their results are those they have one by
    one. 0 takes as many as memory allows, and takes their first steps together and one by one in turn: they go on the
    faster way, and later ones in packs where those are a tenth faster."""
    engine: Engine = Engine.local
    """What starts the workers. Every machine needs the sweep's folder under the same path."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Of a Slurm job keywords of submitit (`slurm_partition`, `gpus_per_node`, `cpus_per_task`, `timeout_min`; 240
    minutes where none is given, then the job is queued again); of a Ray task its options (`num_cpus`, `num_gpus`,
    `resources`) and the `address` of the cluster."""
    gpus_per_trial: int = 1
    """Processes a trial is spread over, each with a GPU of its own, or without GPUs with a share of the cores. The rows
    of an optimizer step stay those of `trainer.batch` times `trainer.accumulation`."""
    slots_per_gpu: int = 1
    """Workers that share a GPU, for small models; a trial whose plan passes its share of the memory is refused."""
    storage: str | None = None
    """Optuna storage, or `grpc://host:port` of its proxy; null keeps a journal in the sweep's folder."""
    proxy: int | None = None
    """Port at which the launch serves a database in `storage` to its workers through Optuna's proxy, which holds one
    pool of connections for all of them; 0 takes a free port, null starts none. It asks nobody for a password: on one
    machine it listens on loopback, with sweep.engine=slurm or ray to the whole network."""
    join: bool = False
    """Help a sweep that another process is running already, instead of refusing; also from another machine that shares
    the folder."""
    max_failures: int | None = None
    """Failed trials after which the sweep stops, those of the launches before included; null never stops."""
    max_retries: int = 2
    """Further attempts at a trial whose worker died."""
    timeout_minutes: float | None = None
    """Longest a trial may run; null sets no limit."""

    def __post_init__(self) -> None:
        require(self.n_trials is None or 1 <= self.n_trials <= 100_000, "sweep.n_trials", self.n_trials, "1 to 100000")
        require(1 <= self.replicates <= 100, "sweep.replicates", self.replicates, "between 1 and 100")
        require(0 <= self.workers <= 1024, "sweep.workers", self.workers, "between 0 and 1024")
        require(0 <= self.pack <= 256, "sweep.pack", self.pack, "between 0 and 256")
        require(1 <= self.gpus_per_trial <= 64, "sweep.gpus_per_trial", self.gpus_per_trial, "between 1 and 64")
        require(1 <= self.slots_per_gpu <= 16, "sweep.slots_per_gpu", self.slots_per_gpu, "between 1 and 16")
        if self.gpus_per_trial > 1 and self.slots_per_gpu > 1:
            raise ConfigError(
                f"sweep.gpus_per_trial={self.gpus_per_trial} and sweep.slots_per_gpu={self.slots_per_gpu} are at odds: "
                "a trial has several GPUs, or shares one"
            )
        require(self.proxy is None or 0 <= self.proxy < 65536, "sweep.proxy", self.proxy, "null or a port")
        if self.proxy is not None and not (self.storage or "").startswith(("postgresql", "mysql")):
            raise ConfigError(
                f"sweep.proxy={self.proxy} needs a database in sweep.storage, such as postgresql://user@host/db, "
                f"got {self.storage}"
            )
        require(0 <= self.max_retries <= 100, "sweep.max_retries", self.max_retries, "between 0 and 100")
        limit = self.max_failures
        require(limit is None or limit >= 1, "sweep.max_failures", limit, "null or at least 1")
        require(
            self.timeout_minutes is None or self.timeout_minutes > 0,
            "sweep.timeout_minutes", self.timeout_minutes, "null or above 0",
        )  # fmt: skip
        require(0 <= self.seed < 2**31, "sweep.seed", self.seed, "between 0 and 2147483647")
        for name, bound in self.at_most.items():
            require(math.isfinite(bound), f"sweep.at_most.{name}", bound, "a finite number")
        self._check_plan()
        for point in self.baselines:
            require(isinstance(point, dict), "sweep.baselines", point, "a list of points like {lora.r: 8}")
        if self.storage is not None:
            refuse_secret("sweep.storage", self.storage)
            rule = "an address like postgresql://host/name, or left out for a journal file"
            require("://" in self.storage, "sweep.storage", self.storage, rule)
        if self.storage is not None and self.storage.startswith("sqlite") and (self.workers > 1 or self.join):
            others = "sweep.join=true" if self.join else f"sweep.workers={self.workers}"
            raise ConfigError(
                f"sweep.storage={self.storage} with {others}: SQLite hands one trial to two "
                "workers; leave sweep.storage out for a journal file, or give a PostgreSQL address"
            )

    def _check_plan(self) -> None:
        for name, bound in self.plan_at_most.items():
            require(name in PLANNED, "sweep.plan_at_most", name, f"bounds on {', '.join(PLANNED)}")
            require(0 < bound < math.inf, f"sweep.plan_at_most.{name}", bound, "a finite number above 0")
        for key in ("tokens_per_second", "usd_per_hour"):
            value = getattr(self, key)
            require(value is None or 0 < value < math.inf, f"sweep.{key}", value, "null or above 0")
        if self.tokens_per_second is None and {"hours", "usd"} & {*self.plan_at_most}:
            raise ConfigError("sweep.plan_at_most of hours or usd needs sweep.tokens_per_second (ftexp plan --probe)")
        if self.usd_per_hour is None and "usd" in self.plan_at_most:
            raise ConfigError("sweep.plan_at_most of usd needs sweep.usd_per_hour")
        if self.over is Over.skip and not self.plan_at_most:
            raise ConfigError("sweep.over=skip needs a bound in sweep.plan_at_most, as {memory_gib: 8}")
