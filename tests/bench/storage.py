"""What a sweep's record can carry: tickets a second of each storage, its growth, and many workers on it, simulated.

Run by `make bench`; nothing here is a test. A ticket is what a worker writes of a trial: claim, signature, point, rungs and
end; nothing is trained in between. PostgreSQL is started where its programs are; engines that are not installed are left out.
"""

from __future__ import annotations

import heapq
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "cluster"))

import optuna
from hydra import compose, initialize_config_dir

from ftexp import config, experiment, overrides
from ftexp.sweep import frozen, plugin, proxy, space, study, worker
from ftexp.sweep.options import Options

RESULT = Path("outputs/bench/storage.json")
RUNGS = 5
PROCESSES = (1, 2, 4, 8)
TICKETS = {"journal": 200, "sqlite": 30, "PostgreSQL": 60, "PostgreSQL behind the proxy": 60}
LENGTHS = (500, 2_000)
"""Tickets of a journal, to see how it grows."""


def made(total: int, url: str | None, name: str, **options) -> frozen.Frozen:
    """Freeze a sweep of so many points, and queue its tickets."""
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    searched = space.parse([f"seed=range(0,{total})"])
    sweep = frozen.Frozen(folder, name, searched, Options(storage=url, **options), ["valid/loss"], None, "", {})
    sweep.save()
    (folder / "workers").mkdir()

    def composed(point: list[str]):
        with initialize_config_dir(str(overrides.CONF), **overrides.BASE):
            return compose("config", ["model=tiny", *point])

    grid = searched.grid()
    frozen.freeze(folder, searched, grid[:1], composed)
    study.queue(worker.open_study(sweep), list(grid))
    return sweep


def _work(folder: Path, reached: str | None, begun, found) -> None:
    """Be a worker whose trials take no time; tell how many tickets it had, and what looking costs."""
    if reached:
        os.environ[worker.RECORD] = reached
    mine = []

    def trivial(run, folder, label, parent, control):
        mine.append(int(folder.name))
        for rung in range(RUNGS):
            control.judge(1.0 / (rung + 1), rung + 1)
        return {"valid/loss": 0.0}

    experiment.execute, worker.same_rows, worker.say = trivial, lambda *_: None, lambda *_, **__: None
    worker.keep_hydra_files = lambda *_: None
    sweep = frozen.load(folder)
    run = sweep.run({"seed": 0}, 0)
    frozen.Frozen.run = lambda *_: run  # composing it anew costs the worker, not the record
    record = worker.open_study(sweep)
    record.pruner = optuna.pruners.SuccessiveHalvingPruner(min_early_stopping_rate=9)  # asks, and lets all pass
    begun.wait()
    used = time.process_time()
    worker.work(sweep, record)
    used, began = time.process_time() - used, time.perf_counter()
    for _ in range(100):
        record.user_attrs.get(worker.LEAVE)
    found.put((mine, (time.perf_counter() - began) / 100, used))


def served(words: str) -> float:
    """CPU seconds that a server and its children have used, by words of its command line."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if words in " ".join(process.info["cmdline"] or []):
            return sum(process.cpu_times()[:4]) + sum(sum(c.cpu_times()[:2]) for c in process.children())
    return 0.0


def rate(sweep: frozen.Frozen, total: int, processes: int, reached: str | None) -> dict[str, float]:
    """Tickets a second, milliseconds of one look whether the sweep is to be left, and CPU of a ticket on both sides."""
    at = (sweep.options.storage or "").rpartition(":")[2].partition("/")[0]
    servers = [f"-p {at} -k"] * at.isdigit() + ([f"ftexp.sweep.proxy {sweep.folder}"] if reached else [])
    before = sum(served(words) for words in servers)
    context = multiprocessing.get_context("fork")
    begun, found = context.Barrier(processes + 1), context.Queue()
    arguments = (sweep.folder, reached, begun, found)
    started = [context.Process(target=_work, args=arguments) for _ in range(processes)]
    for process in started:
        process.start()
    begun.wait()
    began = time.monotonic()
    told = [found.get() for _ in started]
    took = time.monotonic() - began
    for process in started:
        process.join()
    numbers = sorted(number for mine, _, _ in told for number in mine)
    assert numbers == list(range(total)), f"{len(numbers)} tickets taken of {total}"
    looks = statistics.mean(look for _, look, _ in told)
    return {
        "tickets": total / (took - 100 * looks),
        "look_ms": 1000 * looks,
        "client_ms": 1000 * sum(used for _, _, used in told) / total,
        "server_ms": 1000 * (sum(served(words) for words in servers) - before) / total,
    }


def rates() -> dict[str, dict[int, dict[str, float]]]:
    """Measure each storage with 1, 2, 4 and 8 processes; SQLite with one, it hands a ticket to two."""
    from servers import postgres

    told: dict[str, dict[int, dict[str, float]]] = {}
    with ExitStack() as stack:
        stores: dict[str, Callable[[], str | None]] = {
            "journal": lambda: None,
            "sqlite": lambda: f"sqlite:///{tempfile.mkdtemp()}/study.db",
        }
        try:
            url = stack.enter_context(postgres())
            stores |= {"PostgreSQL": lambda: url, "PostgreSQL behind the proxy": lambda: url}
        except BaseException as missing:  # pytest's skip
            print(f"PostgreSQL is left out: {missing}")
        for store, address in stores.items():
            for processes in PROCESSES if store != "sqlite" else (1,):
                total = TICKETS[store]
                behind = {"proxy": 0} if "proxy" in store else {}
                sweep = made(total, address(), f"{store} {processes}", **behind)
                with proxy.serving(sweep) as (env, _):
                    reached = env.get(worker.RECORD)
                    if reached:
                        study._proxy(reached)  # waits until it serves
                    told.setdefault(store, {})[processes] = rate(sweep, total, processes, reached)
                one = told[store][processes]
                print(f"{store}, {processes} processes: {one['tickets']:.1f} tickets a second, a look {one['look_ms']:.2f} ms, "
                      f"CPU of a ticket {one['client_ms']:.0f} ms in the worker, {one['server_ms']:.0f} ms in servers", flush=True)  # fmt: skip
    return told


def grown(total: int) -> dict[str, float]:
    """A journal of finished tickets: bytes and replay of each, and the cost of one more claim while half still wait."""
    sweep = made(total, None, "grown")
    record = worker.open_study(sweep)
    store, waiting = record._storage, [t._trial_id for t in record.get_trials(deepcopy=False)]
    for at in waiting[: total // 2]:
        store.set_trial_state_values(at, state=optuna.trial.TrialState.RUNNING)
        store.set_trial_user_attr(
            at, "ftexp:worker", {"host": "node-0001", "pid": 12345, "start": 1.7e9, "token": "0" * 32}
        )
        store.set_trial_param(at, "seed", 0.0, optuna.distributions.CategoricalDistribution([str(n) for n in range(3)]))
        for rung in range(RUNGS):
            store.set_trial_intermediate_value(at, rung, 1.0)
        for key in ("ftexp:reason", "ftexp:kind"):
            store.set_trial_user_attr(at, key, "")
        store.set_trial_state_values(at, state=optuna.trial.TrialState.COMPLETE, values=[1.0])
    size = (sweep.folder / study.JOURNAL).stat().st_size
    began = time.process_time()
    fresh = worker.open_study(sweep)
    replay = time.process_time() - began
    began = time.process_time()
    for _ in range(10):
        study.claim(fresh)
    return {"bytes": size, "replay_s": replay, "claim_ms": 100 * (time.process_time() - began)}


def simulated(workers: int, trials: int, minutes: float, rate: float, batches: bool = False) -> float:
    """Share of their time that workers train, with log-normal lengths (sigma 0.6) and a record that serves one at a time.

    Args:
        workers: at work.
        trials: in total.
        minutes: mean length of a trial.
        rate: tickets a second that the record serves.
        batches: whether a worker waits for all of its batch, as under a launcher of Hydra's.
    """
    dice, mean = random.Random(0), 60 * minutes / 2.718281828 ** (0.6**2 / 2)
    lengths = [mean * dice.lognormvariate(0, 0.6) for _ in range(trials)]
    free, served, last = [(0.0, n) for n in range(workers)], 0.0, 0.0
    if batches:
        return sum(lengths) / workers / sum(max(lengths[n : n + workers]) for n in range(0, trials, workers))
    for length in lengths:
        ready, number = heapq.heappop(free)
        served = max(served, ready) + 1 / rate
        last = max(last, served + length)
        heapq.heappush(free, (served + length, number))
    return sum(lengths) / workers / last


@contextmanager
def _ray():
    from servers import ray_nodes

    with ray_nodes(1) as address:
        yield [f"sweep.engine_args.address={address}"]


def engines(total: int = 6) -> dict[str, dict[str, float]]:
    """Seconds from the command to the first trial, and between two trials of a worker, with each engine that is here."""
    tiny = ["model=tiny", "model.dtype=float32", "data.rows=120", "data.valid=12", "data.max_length=256", "trainer.steps=2", "track=none",
            "eval=loss", f"seed=range(0,{total})", "name=s", "sweep.workers=1", "-m"]  # fmt: skip
    ways: dict[str, list[str]] = {"local": []}
    with ExitStack() as stack:
        if importlib.util.find_spec("submitit"):
            ways["submitit"] = ["sweep.engine=slurm", "sweep.engine_args.cluster=local"]
        if importlib.util.find_spec("ray"):
            ways["ray"] = ["sweep.engine=ray", *stack.enter_context(_ray())]
        told = {}
        for name, words in ways.items():
            folder = tempfile.mkdtemp()
            began = time.time()
            subprocess.run(
                [sys.executable, "-m", "ftexp.run", *tiny, *words], cwd=folder, check=True, capture_output=True
            )
            ended = time.time()
            record = worker.open_study(frozen.load(Path(folder) / "outputs/sweeps/s"))
            trials = sorted(record.get_trials(), key=lambda t: t.datetime_start or 0)
            starts = [t.datetime_start.timestamp() for t in trials if t.datetime_start]
            ends = [t.datetime_complete.timestamp() for t in trials if t.datetime_complete]
            gaps = [b - a for a, b in zip(ends, starts[1:], strict=False)]
            told[name] = {"to_first": starts[0] - began, "between": statistics.median(gaps), "after": ended - ends[-1]}
            print(f"{name}: {told[name]['to_first']:.1f} s to the first trial, {1000 * told[name]['between']:.0f} ms between "
                  f"two, {told[name]['after']:.1f} s after the last", flush=True)  # fmt: skip
    return told


def main() -> None:
    """Measure, print and keep."""
    config.register()
    plugin.register()
    told: dict[str, object] = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "rates": rates()}
    told["journal"] = {total: grown(total) for total in LENGTHS}
    for total, cost in told["journal"].items():  # type: ignore[attr-defined]
        print(f"journal of {total} tickets, half done: {cost['bytes'] / total:.0f} bytes and {1e6 * cost['replay_s'] / total:.0f} us "
              f"of replay a ticket ({cost['replay_s']:.1f} s), a claim {cost['claim_ms']:.1f} ms")  # fmt: skip
    told["busy"] = {}
    for store, by_count in told["rates"].items():  # type: ignore[attr-defined]
        for minutes in (1, 10, 60):
            share = simulated(1_000, 100_000, minutes, by_count[max(by_count)]["tickets"])
            told["busy"][f"{store}, {minutes} minutes"] = share  # type: ignore[index]
            print(f"1,000 workers, 100,000 trials of {minutes} minutes, {store}: {share:.1%} busy (simulated)")
    told["batches"] = simulated(1_000, 100_000, 10, 1.0, batches=True)
    print(f"the same in batches of 1,000: {told['batches']:.1%} busy")
    told["engines"] = engines()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(told, indent=1) + "\n")
    print(f"kept in {RESULT}")


if __name__ == "__main__":
    main()
