"""Checkpoints: a killed training goes on to the same bits, and nothing torn or foreign is taken up."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest
from conftest import UNWRITTEN

from ftexp import experiment
from ftexp.errors import Diverged, Preempted, Pruned
from ftexp.files import read_json, write_json
from ftexp.train import checkpoints, control
from ftexp.train.control import Control

HARD = ["trainer.neftune=5", "lora.dropout=0.1", "trainer.accumulation=2", "trainer.checkpoint_minutes=0"]
"""Everything that draws random numbers while training, and a checkpoint after each step."""


class After:
    """An event that is set once it was looked at `steps` times: leaves at that optimizer step."""

    def __init__(self, steps):
        self.left = steps

    def is_set(self):
        self.left -= 1
        return self.left <= 0


def leave(run, folder, step):
    with pytest.raises(Preempted, match=f"asked to leave at step {step} of"):
        experiment.execute(run, folder, "x", control=Control(leave=After(step)))


def weights(folder):
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def curve(folder):
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("time", "cost/", "plan/memory_gib_")
    return [{k: v for k, v in p.items() if not k.startswith(measured)} for p in points]


@pytest.mark.parametrize("step", [1, 3, 7])
def test_left_training_goes_on_to_the_same_bits_and_curve(tiny, tmp_path, step):
    """Eight steps of 27 rows in batches of 2 x 2 cross an epoch's end; left in the first epoch, and after it."""
    run = tiny(*HARD, "trainer.steps=8", "data.rows=39", "trainer.batch=2")
    experiment.execute(run, tmp_path / "calm", "x")
    leave(run, tmp_path / "left", step)
    assert read_json(tmp_path / "left" / "trial.json")["state"] == "preempted"
    assert [p.name for p in (tmp_path / "left" / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    experiment.execute(run, tmp_path / "left", "x")
    assert read_json(tmp_path / "left" / "trial.json")["resumed_at"] == [step]
    assert weights(tmp_path / "left") == weights(tmp_path / "calm")
    assert curve(tmp_path / "left") == curve(tmp_path / "calm")
    assert not (tmp_path / "left" / "checkpoints").exists()


def test_sabotage_resume_without_random_state_gives_other_bits(tiny, tmp_path, monkeypatch):
    from transformers import Trainer

    run = tiny(*HARD, "trainer.steps=8")
    experiment.execute(run, tmp_path / "calm", "x")
    leave(run, tmp_path / "left", 3)
    monkeypatch.setattr(Trainer, "_load_rng_state", lambda *_: None)
    experiment.execute(run, tmp_path / "left", "x")
    assert weights(tmp_path / "left") != weights(tmp_path / "calm")


def test_no_checkpoint_is_written_where_none_is_wanted(tiny, tmp_path):
    run = tiny("trainer.checkpoint_minutes=null")
    leave(run, tmp_path, 2)  # a request to leave still keeps one
    assert (tmp_path / "checkpoints" / "checkpoint-2" / checkpoints.SEAL).exists()
    experiment.execute(run, tmp_path, "x")
    assert read_json(tmp_path / "trial.json")["resumed_at"] == [2]


@pytest.fixture
def sealed(tiny, tmp_path):
    """A run left at step 2 with its checkpoint."""
    run = tiny(*HARD)
    leave(run, tmp_path / "a", 2)
    return run, tmp_path / "a" / "checkpoints" / "checkpoint-2"


def test_checkpoint_holds_no_pickled_arguments(sealed):
    assert "training_args.bin" not in {p.name for p in sealed[1].iterdir()}


def test_cost_of_a_run_that_went_on_is_that_of_all_its_work(sealed):
    run, folder = sealed
    kept = read_json(folder / checkpoints.SEAL)
    assert 0 < kept["seconds"] < 100
    write_json(folder / checkpoints.SEAL, kept | {"seconds": 1000.0})
    scores = experiment.execute(run, folder.parents[1], "x")
    assert 1000 < scores["cost/seconds"] < 1100


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped", "no seal", "torn seal"])
def test_damaged_checkpoint_is_not_taken_up(sealed, capfd, damage):
    run, folder = sealed
    kept = read_json(folder / checkpoints.SEAL)
    file = folder / "optimizer.pt"
    content = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(content[:-100])
        case "gone":
            file.unlink()
        case "flipped":
            file.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
        case "no seal":
            (folder / checkpoints.SEAL).unlink()
        case "torn seal":
            (folder / checkpoints.SEAL).write_text((folder / checkpoints.SEAL).read_text()[:-20])
    assert checkpoints.store(folder.parent, kept["fingerprint"]).resume is None
    assert ("a damaged checkpoint, not used" in capfd.readouterr().err) == (damage != "no seal")
    experiment.execute(run, folder.parent.parent, "x")
    assert "resumed_at" not in read_json(folder.parent.parent / "trial.json")


def test_sabotage_damage_is_found_by_the_hash_alone(sealed, monkeypatch):
    _, folder = sealed
    kept = read_json(folder / checkpoints.SEAL)
    (folder / "optimizer.pt").write_bytes(b"x")
    monkeypatch.setattr(checkpoints, "_is_whole", lambda *_: True)
    assert checkpoints.store(folder.parent, kept["fingerprint"]).resume is not None


@pytest.mark.parametrize(
    "key",
    ["trainer.lr", "lora.alpha", "lora.r", "seed", "trainer.scheduler", "trainer.batch", "rows.sha256", "code_sha256",
     "weights_sha256", "template_sha256", "versions.torch", "versions.transformers", "compute.dtype", "trainer.steps",
     "trainer.neftune", "lora.variant", "data.seed", "quant.kind", "trainer.weight_decay", "trainer.warmup"],
)  # fmt: skip
def test_checkpoint_of_another_run_is_not_taken_up(sealed, capfd, key):
    _, folder = sealed
    kept = read_json(folder / checkpoints.SEAL)["fingerprint"]
    assert key in kept
    assert checkpoints.store(folder.parent, kept | {key: "another"}).resume is None
    assert f"of a run with another {key}\n" in capfd.readouterr().err.replace("\n ", " ")


def test_what_changes_no_bit_takes_the_checkpoint_up(tiny, tmp_path):
    run = tiny(*HARD)
    leave(run, tmp_path, 2)
    run.trainer.checkpoint_minutes = 30.0
    run.eval.batch = 3
    now = experiment.fingerprint(run, read_json(tmp_path / "trial.json")["facts"])
    assert checkpoints.store(tmp_path / "checkpoints", now).resume.step == 2


def test_other_number_of_threads_goes_on_and_says_that_bits_may_differ(sealed, capfd):
    _, folder = sealed
    kept = read_json(folder / checkpoints.SEAL)["fingerprint"]
    assert kept["compute.threads"] >= 1
    assert checkpoints.store(folder.parent, kept | {"compute.threads": 77}).resume.step == 2
    assert "equal up to rounding" in capfd.readouterr().err


def test_halved_forward_pass_starts_over_and_does_not_mix(tiny, tmp_path, monkeypatch):
    """Memory that runs out at step 3 changes the batch, so the checkpoint of step 2 is another run's."""
    from ftexp.train import sft

    honest = sft.token_mean
    calls = []

    def full(model, inputs, *rest):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(model, inputs, *rest)

    monkeypatch.setattr(sft, "token_mean", full)
    experiment.execute(tiny("trainer.checkpoint_minutes=0"), tmp_path, "x")
    kept = read_json(tmp_path / "trial.json")
    assert kept["out_of_memory"] == [{"batch": 4, "accumulation": 2}]
    assert "resumed_at" not in kept
    assert calls == [8, 8, 8] + [4] * 8


def test_run_that_was_left_after_it_was_halved_goes_on_halved(tiny, tmp_path, monkeypatch):
    """It began with whole batches anew: its curve was cut, and the checkpoint gone if it came to seal another."""
    from ftexp.train import sft

    honest, calls, run = sft.token_mean, [], tiny("trainer.checkpoint_minutes=0")

    def full(model, inputs, *rest):
        calls.append(len(inputs["input_ids"]))
        if calls[-1] == 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if len(calls) == 1 + 2 * 2:
            control.LEAVE.set()
        return honest(model, inputs, *rest)

    monkeypatch.setattr(sft, "token_mean", full)
    monkeypatch.setattr(control, "LEAVE", threading.Event())
    with pytest.raises(Preempted):
        experiment.execute(run, tmp_path, "x", None, control.Control(leave=control.LEAVE))
    left = read_json(tmp_path / "trial.json")
    (tmp_path / "checkpoints" / "checkpoint-2" / checkpoints.SEAL).stat()
    control.LEAVE.clear()
    experiment.execute(run, tmp_path, "x")
    kept = read_json(tmp_path / "trial.json")
    assert left["out_of_memory"] == kept["out_of_memory"] == [{"batch": 4, "accumulation": 2}]
    assert kept["resumed_at"] == [2]
    assert calls == [8] + [4] * 8
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if step] == sorted(step for step in steps if step) and {1, 2, 3, 4} <= {*steps}


@pytest.mark.slow
def test_killed_run_goes_on_with_the_same_command(cli, tmp_path):
    """kill -9 in the middle of training; SIGTERM later; the same command ends with the bits of an undisturbed run.

    The undisturbed one runs in this process: where a training runs changes no bit.
    """
    command = [sys.executable, "-m", "ftexp.run", *UNWRITTEN, *HARD, "track=none", "eval=loss", "name=k", "trainer.steps=40",
               "trainer.report_steps=0"]  # fmt: skip
    calm, wild = tmp_path, tmp_path / "wild"
    wild.mkdir()
    assert cli(*command[3:])[0] == 0
    run = wild / "outputs" / "runs" / "k"
    for blow, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        already = _step(run)
        process = subprocess.Popen(command, cwd=wild, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while _step(run) < already + 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(blow)
        assert process.wait() == code
    assert b"the same command goes on" in process.stderr.read()
    subprocess.run(command, cwd=wild, check=True, capture_output=True)
    assert weights(run) == weights(calm / "outputs" / "runs" / "k")
    first, second = read_json(run / "trial.json")["resumed_at"]
    assert 4 <= first < second


def _step(run):
    return max((int(p.parent.name.split("-")[1]) for p in run.glob("checkpoints/*/manifest.json")), default=0)


@pytest.mark.parametrize("engine", ["trl", "packed"])
@pytest.mark.parametrize(("end", "kept"), [(None, False), ("behind", False), (Diverged, False), (OSError, True)])
def test_who_is_pruned_or_diverges_leaves_no_checkpoint(tiny, tmp_path, engine, end, kept):
    """Nothing goes on with those; a trial that failed otherwise may be tried again, and goes on."""
    run = tiny("trainer.checkpoint_minutes=0", f"trainer.engine={engine}", "eval=loss")
    seen = []

    def judge(rung, step):
        seen.append((tmp_path / "checkpoints").exists())
        if isinstance(end, type):
            raise end("as by chance")
        return end

    with nullcontext() if end is None else pytest.raises(end if isinstance(end, type) else Pruned):
        experiment.execute(run, tmp_path, "t", control=Control(judge))
    assert seen[0]  # it had one
    assert (tmp_path / "checkpoints").exists() is kept


def test_older_checkpoints_go_once_a_newer_one_is_sealed(tmp_path):
    store = checkpoints.store(tmp_path, {"a": 1})
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "x").write_text("x")
        if step != 2:  # torn by a kill
            store.seal(step)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert checkpoints.store(tmp_path, {"a": 1}).resume.step == 3
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert checkpoints.store(tmp_path, {"a": 1}).resume is None


# a wrong resume: twenty things that may change between a kill and the same command


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    """A folder with a model and a tokenizer, and one with rows."""
    from ftexp import model
    from ftexp.config import Dtype, Kind, Model, Quant

    here = tmp_path_factory.mktemp("own")
    base = model.fresh(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant())
    base.model.save_pretrained(here / "model")
    base.tokenizer.save_pretrained(here / "model")
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(60)]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return here


CHANGED = {  # what changes -> how: an override, or what is done to the folder or the process; and the key that is named
    "learning rate": ("trainer.lr=0.02", "trainer.lr"),
    "alpha": ("lora.alpha=5", "lora.alpha"),
    "rank": ("lora.r=4", "lora.r"),
    "dropout": ("lora.dropout=0.2", "lora.dropout"),
    "seed": ("seed=1", "seed"),
    "scheduler": ("trainer.scheduler=cosine", "trainer.scheduler"),
    "warmup": ("trainer.warmup=0.5", "trainer.warmup"),
    "batch": ("trainer.batch=4", "trainer.batch"),
    "accumulation": ("trainer.accumulation=1", "trainer.accumulation"),
    "split seed": ("data.seed=1", "data.seed"),
    "template": ("data.template=plain", "data.template"),
    "dtype": ("model.dtype=bfloat16", "compute.dtype"),
    "optimizer": ("trainer.optimizer=adamw_torch", "trainer.optimizer"),
    "neftune": ("trainer.neftune=0", "trainer.neftune"),
    "packing": ("data.packing=bfd", "data.packing"),
    "rows": ("one letter, same length and time", "rows.sha256"),
    "base weights": ("one number", "weights_sha256"),
    "tokenizer": ("two tokens swapped", "tokenizer_sha256"),
    "library": ("another version", "versions.trl"),
    "code": ("another letter", "code_sha256"),
}


def told_of(tiny, here, *given):
    """The fingerprint of a run, as the run itself makes it."""
    from ftexp import data, model
    from ftexp.train import lengths

    run = tiny("model=hub", f"model.path={here}/model", "data=jsonl", f"data.path={here}/rows.jsonl", "data.rows=null",
               "data.max_length=128", *HARD, *given)  # fmt: skip
    splits = data.load(run.data)
    used = experiment.tokenised(run, splits)
    lengths.units(used[0], run.data)
    model._warm = None  # the folder may have changed
    base = model.load(run.model, run.quant)
    return experiment.fingerprint(run, json.loads(json.dumps(experiment._facts(run, base, splits, used))))


@pytest.mark.parametrize("what", CHANGED)
def test_wrong_resume_is_refused(tiny, own_model, tmp_path, capfd, monkeypatch, what):
    here = tmp_path / "own"
    shutil.copytree(own_model, here)
    first = told_of(tiny, here)
    (tmp_path / "c" / "checkpoint-2").mkdir(parents=True)
    checkpoints.store(tmp_path / "c", first).seal(2)
    assert checkpoints.store(tmp_path / "c", told_of(tiny, here)).resume.step == 2, "unchanged, it goes on"
    how, key = CHANGED[what]
    change(what, here, monkeypatch)
    now = told_of(tiny, here, *([how] if "=" in how else []))
    assert checkpoints.store(tmp_path / "c", now).resume is None
    assert key in capfd.readouterr().err.replace("\n", " ").split("of a run with another ")[-1].strip().split(", ")


def change(what, here, monkeypatch):
    """Do what no override does."""
    import os
    from importlib import metadata

    from ftexp import facts

    match what:
        case "rows":
            path = here / "rows.jsonl"
            before = path.stat()
            path.write_text(path.read_text().replace("it is 59", "it as 59"))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert path.stat().st_size == before.st_size
        case "base weights":
            from safetensors.torch import load_file, save_file

            path = here / "model" / "model.safetensors"
            weights = load_file(path)
            name = next(n for n in weights if "q_proj" in n)
            weights[name][0, 0] += 1e-3
            save_file(weights, path, metadata={"format": "pt"})
        case "tokenizer":
            path = here / "model" / "tokenizer.json"
            told = json.loads(path.read_text())
            vocabulary = told["model"]["vocab"]
            vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
            path.write_text(json.dumps(told))
        case "library":
            real = metadata.version
            monkeypatch.setattr(facts, "version", lambda name: "0.0" if name == "trl" else real(name))
        case "code":
            monkeypatch.setattr(facts, "code", lambda: "another")


def test_sabotage_fingerprint_without_the_tokenizer_lets_swapped_tokens_go_on(tiny, own_model, tmp_path, monkeypatch):
    here = tmp_path / "own"
    shutil.copytree(own_model, here)
    monkeypatch.setattr(experiment.prompts, "tokenizer_digest", lambda _: "")
    first = told_of(tiny, here)
    (tmp_path / "c" / "checkpoint-2").mkdir(parents=True)
    checkpoints.store(tmp_path / "c", first).seal(2)
    change("tokenizer", here, monkeypatch)
    assert checkpoints.store(tmp_path / "c", told_of(tiny, here)).resume is not None
