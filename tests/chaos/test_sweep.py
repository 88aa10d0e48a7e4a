"""A sweep that is killed again and again ends as one that was left alone: same trials, same bytes."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import pytest
from conftest import TINY

from ftexp.files import read_json
from ftexp.sweep import study

TRIALS, BLOWS = 24, 40
COMMAND = [
    sys.executable, "-m", "ftexp.run", *[t for t in TINY if ".steps" not in t], "trainer.steps=60",
    f"seed={','.join(map(str, range(TRIALS // 3)))}", "lora.r=2,4,8", "trainer.neftune=5", "trainer.report_steps=20",
    "trainer.checkpoint_minutes=0", "track=none", "eval=loss", "name=k", "sweep.workers=2", "sweep.max_retries=99", "-m",
]  # fmt: skip


def launch(folder):
    out = (folder / "out.txt").open("a")
    return subprocess.Popen(COMMAND, cwd=folder, stdout=out, stderr=out, start_new_session=True)


def family(process):
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def hashes(sweep):
    found = sweep.glob("*/adapter/adapter_model.safetensors")
    return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def scores(sweep):
    kept = {p.parent.name: read_json(p)["scores"] for p in sweep.glob("*/trial.json")}
    return {n: {k: v for k, v in s.items() if not k.startswith("cost/")} for n, s in kept.items()}


@pytest.mark.chaos
def test_forty_kills_change_nothing(tmp_path):
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    for folder in (calm, wild):
        folder.mkdir()
    began = time.monotonic()
    assert launch(calm).wait(900) == 0, (calm / "out.txt").read_text()
    undisturbed = time.monotonic() - began
    dice, told = random.Random(20261122), Counter()
    process, began = launch(wild), time.monotonic()
    while told.total() < BLOWS:
        time.sleep(dice.uniform(0.5, 9.0))
        blow = dice.choices(["worker", "all", "supervisor"], [6, 2, 2])[0]
        if process.poll() is not None:  # it ended, or was killed in the last round: the same command again
            assert process.returncode in (0, -9), (wild / "out.txt").read_text()[-2000:]
            if process.returncode == 0:
                break
            process = launch(wild)
            continue
        workers = family(process)
        if blow == "worker" and not workers:
            continue
        told[blow] += 1
        if blow == "worker":
            dice.choice(workers).send_signal(signal.SIGKILL)
            continue
        targets = [process, *(workers if blow == "all" else [])]
        for target in targets:
            target.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(workers, timeout=20)
    while (process.wait() if process.poll() is None else process.returncode) != 0:
        assert process.returncode == -9, (wild / "out.txt").read_text()[-2000:]
        process = launch(wild)
    disturbed = time.monotonic() - began
    ours, theirs = (folder / "outputs" / "sweeps" / "k" for folder in (wild, calm))
    record = optuna.load_study(study_name="k", storage=study.storage(Path(ours), None))
    lost = sum(bool(t.user_attrs.get("ftexp:lost")) for t in record.get_trials())
    resumed = sum(len((read_json(p) or {}).get("resumed_at", [])) for p in ours.glob("*/trial.json"))
    print(f"\n{told.total()} kills ({dict(told)}), {lost} attempts lost, {resumed} taken up from a checkpoint, "
          f"{disturbed:.0f} s against {undisturbed:.0f} s undisturbed")  # fmt: skip
    assert told.total() >= BLOWS, "the sweep ended before all blows were dealt: make its trials longer"
    assert Counter(t.state.name for t in study.counted(record)) == {"COMPLETE": TRIALS}
    assert [study.ticket(t) for t in study.counted(record)] == list(range(TRIALS))
    assert len(hashes(ours)) == TRIALS
    assert hashes(ours) == hashes(theirs)
    assert scores(ours) == scores(theirs)
