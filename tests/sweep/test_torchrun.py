"""A trial over two processes (gloo): the steps, scores and adapters of one; killed, asked to leave, pruned and failing."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import UNWRITTEN
from safetensors.torch import load_file

from ftexp.files import read_json
from ftexp.sweep import frozen, study, supervisor, worker

ROWS = [t for t in UNWRITTEN if not t.startswith(("data.rows", "trainer.steps", "trainer.report"))]
SWEEP = [*ROWS, "data.rows=70", "track=none", "name=s"]  # 58 training rows: the last step of an epoch is not full
TWO = "sweep.gpus_per_trial=2"


def launch(folder, *words):
    folder.mkdir(exist_ok=True)
    out = (folder / "out.txt").open("w")
    command = [sys.executable, "-m", "ftexp.run", *SWEEP, *words, "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=env)


def ended(process, folder):
    code = process.wait(300)
    told = (folder / "out.txt").read_text()[-2000:]
    assert code == 0, told + "".join(p.read_text()[-2000:] for p in folder.glob("outputs/sweeps/s/workers/*.log"))
    return worker.open_study(frozen.load(folder / "outputs/sweeps/s"))


def curve(folder, number):
    lines = (folder / f"outputs/sweeps/s/{number}/metrics.jsonl").read_text().splitlines()
    return [
        (e["step"], e.get("train/loss"), e.get("valid/loss"))
        for e in map(json.loads, lines)
        if "train/loss" in e or "valid/loss" in e
    ]


def same(one, two, number, rounding=1e-5):
    """The other curve, scores and adapter, up to the order of a sum."""
    for (step, *losses), (other, *others) in zip(curve(one, number), curve(two, number), strict=True):
        assert step == other
        assert [a if a is None else pytest.approx(a, rel=rounding) for a in losses] == others
    first, second = (read_json(f / f"outputs/sweeps/s/{number}/trial.json") for f in (one, two))
    assert first["steps"] == second["steps"]
    assert second["scores"] == {k: pytest.approx(v, rel=rounding) if not k.startswith("cost/") else second["scores"][k]
                                for k, v in first["scores"].items()}  # fmt: skip
    adapters = [load_file(f / f"outputs/sweeps/s/{number}/adapter/adapter_model.safetensors") for f in (one, two)]
    for name, weight in adapters[0].items():
        assert (weight - adapters[1][name]).abs().max() <= 1e-4 * weight.abs().max(), name


@pytest.mark.slow
def test_two_processes_train_score_and_prune_as_one(tmp_path):
    """The first one alone is told where held-out rows are scored, and the second must score with it."""
    words = ["trainer.steps=12", "trainer.report_steps=2", "trainer.batch=4", "trainer.accumulation=1",
             "sweep.pruner=halving", "sweep.pruner_args.every_rung=false", "sweep.pruner_args.min_rows=12",
             "trainer.group_by_length=true", "trainer.lr=1e-2,1e-9",
             "eval.max_new_tokens=8"]  # fmt: skip
    records = [ended(launch(tmp_path / n, *words, *more), tmp_path / n) for n, more in (("one", ()), ("two", (TWO,)))]
    states = [[(t.state.name, t.intermediate_values.keys()) for t in study.counted(r)] for r in records]
    assert states[0] == states[1]
    assert [(name, [*steps]) for name, steps in states[0]] == [("COMPLETE", [2, 4, 8]), ("PRUNED", [2])]
    same(tmp_path / "one", tmp_path / "two", 0)
    told = read_json(tmp_path / "two/outputs/sweeps/s/0/trial.json")
    assert told["facts"]["compute"]["processes"] == 2
    assert "the plan is wrong" not in (tmp_path / "two/outputs/sweeps/s/workers/0.log").read_text()


def process_of(parent, rank, until):
    """A process of the worker, by its rank; the torchrun above them where None."""
    while time.monotonic() < until:
        for child in psutil.Process(parent).children(recursive=True):
            try:
                words, env = child.cmdline(), child.environ()
            except psutil.Error:
                continue
            if (rank is None and "ftexp.sweep.torchrun" in words) or (
                rank is not None and "ftexp.sweep.worker" in words and env.get("RANK") == str(rank)
            ):
                return child
        time.sleep(0.05)
    raise AssertionError("no such process")


def steps_done(folder):
    path = folder / "outputs/sweeps/s/0/metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def until_at(folder, process, steps):
    until = time.monotonic() + 120
    while steps_done(folder) < steps:
        assert time.monotonic() < until and process.poll() is None, (folder / "out.txt").read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_process_loses_the_trial_once_and_one_asked_to_leave_loses_nothing(tmp_path):
    words = [
        "trainer.steps=250",
        "trainer.report_steps=0",
        "trainer.batch=2",
        "trainer.accumulation=2",
        "seed=0",
        "eval=loss",
    ]
    ended(launch(tmp_path / "one", *words), tmp_path / "one")
    folder = tmp_path / "two"
    process = launch(folder, *words, TWO)
    until_at(folder, process, 20)
    agent = process_of(process.pid, None, time.monotonic() + 30)
    process_of(process.pid, 1, time.monotonic() + 30).kill()
    agent.wait(60)  # torchrun ends the first process too
    until_at(folder, process, 1)
    while (agent := process_of(process.pid, None, time.monotonic() + 60)) is None:
        time.sleep(0.05)
    record = worker.open_study(frozen.load(folder / "outputs/sweeps/s"))
    until = time.monotonic() + 90
    while not any(
        t.user_attrs.get("ftexp:retries") and t.state.name == "RUNNING" for t in record.get_trials(deepcopy=False)
    ):
        assert time.monotonic() < until
        time.sleep(0.05)
    before = steps_done(folder)
    while steps_done(folder) < before + 20:
        assert time.monotonic() < until
        time.sleep(0.02)
    agent.send_signal(signal.SIGTERM)
    record = ended(process, folder)
    [trial] = study.counted(record)
    assert (trial.state.name, trial.user_attrs["ftexp:retries"]) == ("COMPLETE", 1)
    assert len(read_json(folder / "outputs/sweeps/s/0/trial.json")["resumed_at"]) == 1
    assert [t.user_attrs.get("ftexp:reason") for t in record.get_trials() if t.user_attrs.get("ftexp:lost")] == [
        "crash: worker died",
        "preempted",
    ]
    adapters = [
        load_file(f / "outputs/sweeps/s/0/adapter/adapter_model.safetensors") for f in (tmp_path / "one", folder)
    ]
    for name, weight in adapters[0].items():
        assert (weight - adapters[1][name]).abs().max() <= 1e-4 * weight.abs().max(), name


FAILING = """
import os, sys, time
from ftexp import experiment, ranks
from ftexp.sweep import worker
if os.environ["RANK"] == "0":
    execute = experiment.execute
    def late(*given):
        time.sleep(%d)
        return execute(*given)
    experiment.execute = late
if os.environ["RANK"] == "1":
    ranks.PATIENCE_SECONDS = %s
    follow, seen = experiment.follow, []
    def failing(run, folder):
        seen.append(1)
        if len(seen) == 1:
            raise MemoryError("out of memory, made up")
        follow(run, folder)
    experiment.follow = failing
sys.exit(worker.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 30])
def test_what_fails_in_the_second_process_is_told_by_the_first(tmp_path, cli, late):
    """A trial that runs out of memory in one process alone: said so, once, and the worker starts anew for the next.

    Also where the first process is still loading when the second has failed and gone.
    """
    from ftexp.sweep import plugin

    def frozen_only(*given):
        raise KeyboardInterrupt

    words = [
        "trainer.steps=4",
        "trainer.report_steps=2",
        "trainer.batch=2",
        "trainer.accumulation=2",
        "seed=0,1",
        "eval=loss",
        TWO,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "_run_left", frozen_only)
        cli(*SWEEP, *words, "-m")
    folder = tmp_path / "outputs/sweeps/s"
    (tmp_path / "failing.py").write_text(FAILING % (late, 0.5 if late else 5))  # a loaded machine takes its time
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "failing.py"),
        str(folder),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode != 0
    record = worker.open_study(frozen.load(folder))
    told = {
        study.ticket(t): (t.state.name, t.user_attrs.get("ftexp:kind"), t.user_attrs.get("ftexp:reason"))
        for t in study.counted(record)
    }
    assert told[0] == ("PRUNED", "oom", "out of memory: out of memory, made up")
    assert told[1][0] == "WAITING"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.batch=3", "trainer.accumulation=1", TWO], "sweep.gpus_per_trial=2 must divide"),
        (["data=genres", "trainer=classify", TWO], "sweep.gpus_per_trial=2 needs trainer.kind=sft, got classify"),
        ([TWO, "sweep.slots_per_gpu=2"], "are at odds"),
        (["sweep.slots_per_gpu=2"], "sweep.slots_per_gpu=2 needs a GPU"),
        (["sweep.gpus_per_trial=0"], "sweep.gpus_per_trial must be between 1 and 64"),
        (
            [TWO, "sweep.engine=slurm", "sweep.engine_args.gpus_per_node=1", "sweep.workers=1"],
            "needs as many GPUs in a job",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused(cli, monkeypatch, words, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, err = cli(
        *(w for w in SWEEP if not w.startswith("data.") or "data=genres" not in words), *words, "seed=0,1", "-m"
    )
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("given", "each", "sharing", "made"),
    [
        ("0,1,2,3", 2, 1, ["0,1", "2,3"]),
        ("GPU-a,GPU-b,GPU-c", 2, 1, ["GPU-a,GPU-b"]),
        ("0,1", 1, 2, ["0", "1", "0", "1"]),
        ("4,7", 1, 1, ["4", "7"]),
    ],
)
def test_gpus_are_dealt_out(monkeypatch, given, each, sharing, made):
    from ftexp.sweep.options import Options

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    count = supervisor.workers(Options(gpus_per_trial=each, slots_per_gpu=sharing))
    places = supervisor.slots(count, each, sharing)
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in places] == made
    assert {p.env.get("FTEXP_SLOTS_PER_GPU") for p in places} == {None if sharing == 1 else str(sharing)}


def test_more_gpus_than_there_are_is_refused(monkeypatch):
    from ftexp.errors import ConfigError
    from ftexp.sweep.options import Options

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match="sweep.gpus_per_trial=4 must be at most the 2 GPUs"):
        supervisor.workers(Options(gpus_per_trial=4))


def test_a_plan_that_passes_its_share_of_a_gpu_is_refused():
    from types import SimpleNamespace

    from ftexp import estimate, experiment
    from ftexp.errors import ConfigError

    planned = SimpleNamespace(memory=12 * estimate.GIB)
    experiment.check_share(planned, None)
    experiment.check_share(planned, 12.0)
    with pytest.raises(ConfigError, match=r"leaves a trial 10.0 GiB of the GPU, its plan needs 12.0"):
        experiment.check_share(planned, 10.0)


def test_cores_of_a_slot_are_shared_by_its_processes(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    [first, second] = supervisor.slots(2, each=2)
    assert (first.env["OMP_NUM_THREADS"], len(first.cores), second.cores) == ("2", 4, {4, 5, 6, 7})


@pytest.mark.parametrize(
    ("codes", "told"),
    [({1: worker.RENEWED}, worker.RENEWED), ({0: 3, 1: worker.RENEWED}, 3), ({1: -9}, 1), ({0: -9, 1: 3}, 1)],
)
def test_the_exit_code_is_of_the_first_process_or_of_the_one_that_ended_it(monkeypatch, tmp_path, codes, told):
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from ftexp.sweep import torchrun

    def failing(given):
        raise ChildFailedError("worker", {rank: ProcessFailure(rank, 1, code, "") for rank, code in codes.items()})

    monkeypatch.setattr(run, "run", failing)
    monkeypatch.setattr(sys, "argv", ["torchrun", "2", str(tmp_path)])
    assert torchrun.main() == told
