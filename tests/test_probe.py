"""Every probe passes on the stack as it is, and fails once what it looks at is broken."""

import fcntl
import shutil
from dataclasses import replace
from importlib import metadata

import pytest

from ftexp import data, evaluate, experiment, model, probe
from ftexp.errors import MachineError
from ftexp.probe import GIB, State
from ftexp.train import lengths, sft


@pytest.fixture(scope="module")
def toy():
    return probe.toy()


@pytest.fixture
def packed(tiny):
    return tiny("data.packing=bfd")


# versions


def test_installed_versions_are_above_the_floors():
    assert probe.versions().state is State.ok


@pytest.mark.parametrize(("name", "old"), [("torch", "2.9.1"), ("transformers", "5.2.0"), ("hydra-core", "1.3.2"),
                                           ("datasets", "5.1.0"), ("accelerate", "1.14.0"), ("mlflow", "3.9.0")])  # fmt: skip
def test_sabotage_old_library_is_named_with_its_floor(monkeypatch, name, old):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: old if n == name else real(n))
    found = probe.versions()
    assert found.state is State.fail
    assert f"{name} {old} is below {probe.FLOORS[name][0]} (CVE-" in found.told
    assert f"'{name}>={probe.FLOORS[name][0]}'" in found.remedy


def test_local_builds_and_release_candidates_are_ordered_as_versions(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "2.10.0+cpu" if n == "torch" else real(n))
    assert probe.versions().state is State.ok
    monkeypatch.setattr(metadata, "version", lambda n: "2.10.0rc1" if n == "torch" else real(n))
    assert probe.versions().state is State.fail


# disk and folders


@pytest.mark.parametrize(
    ("free", "needed", "state"),
    [(100 * GIB, 0, State.ok), (GIB, 0, State.warn), (GIB // 8, 0, State.fail), (100 * GIB, 101 * GIB, State.fail),
     (100 * GIB, 60 * GIB, State.warn), (100 * GIB, 40 * GIB, State.ok)],
)  # fmt: skip
def test_free_disk_is_compared_with_what_is_written(monkeypatch, tmp_path, free, needed, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(200 * GIB, 0, free))
    found = probe.disk(tmp_path / "not" / "there", needed)
    assert found.state is state
    assert f"{free / GIB:.2f} GiB free" in found.told


def test_folder_is_written_locked_and_left_empty(tmp_path):
    assert probe.folders(tmp_path / "outputs").state is State.ok
    assert not list(tmp_path.iterdir())


def test_sabotage_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(probe.tempfile, "TemporaryDirectory", refuse)
    found = probe.folders(tmp_path)
    assert found.state is State.fail
    assert "cannot be written: Read-only file system" in found.told


def test_sabotage_disk_whose_locks_hold_nobody_back(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert "does not lock: two processes hold one lock" in probe.folders(tmp_path).told


# tracking and device


def test_store_is_off_will_be_made_or_answers(tiny, tmp_path, composed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert probe.tracking(tiny()).told == "off"
    run = composed("model=tiny", f"track.uri=sqlite:///{tmp_path}/new/mlflow.db")
    assert "will be made" in probe.tracking(run).told
    assert not (tmp_path / "new").exists()


def test_sabotage_dead_server_is_a_warning_and_a_broken_file_a_failure(tmp_path, composed):
    dead = probe.tracking(composed("model=tiny", "track.uri=http://127.0.0.1:9"))
    assert (dead.state, "ftexp sync" in dead.remedy) == (State.warn, True)
    (tmp_path / "mlflow.db").write_text("not a database, whatever its name says" * 100)
    broken = probe.tracking(composed("model=tiny", f"track.uri=sqlite:///{tmp_path}/mlflow.db"))
    assert broken.state is State.fail
    assert "cannot be opened" in broken.told


@pytest.mark.parametrize(
    ("given", "state", "remedy"),
    [("model.dtype=float32", State.ok, ""), ("model.dtype=float16", State.fail, "needs a GPU"),
     ("model.attention=flash_attention_2", State.fail, "needs a GPU")],
)  # fmt: skip
def test_device_says_what_cannot_run_on_a_cpu(tiny, monkeypatch, given, state, remedy):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = probe.device(tiny(given))
    assert found.state is state
    assert remedy in found.remedy


def test_sabotage_memory_that_is_not_there_and_slow_bfloat16(tiny, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe.device(tiny(), 1 << 50).state is State.warn
    monkeypatch.setattr(probe.compute, "has_bfloat16", lambda: False)
    assert "no bfloat16 units" in probe.device(tiny("model.dtype=bfloat16")).remedy


# what is supervised


def test_composed_recipe_supervises_answers_and_their_ends(tiny):
    found = probe.supervision(tiny())
    assert found.state is State.ok
    assert "100.0% of rows show their end, 0 begin twice, 0 teach nothing" in found.told


@pytest.mark.parametrize("broken", ["no end", "two begins", "all masked", "shifted"])
def test_sabotage_rows_that_teach_the_wrong_thing(tiny, broken):
    run = tiny()
    train, _ = experiment.tokenised(run, data.load(run.data))
    end, bos = 2, 1
    rows = []
    for e in train:
        match broken:
            case "no end":
                rows.append(replace(e, completion=e.completion[:-1]))
            case "two begins":
                rows.append(replace(e, prompt=(bos, bos, *e.prompt)))
            case "all masked":
                rows.append(replace(e, prompt=e.prompt + e.completion, completion=()))
            case "shifted":
                labels = [-100, *e.labels[:-1]]
                rows.append(type("Shifted", (), {"ids": e.ids, "labels": labels, "completion": e.completion,
                                                 "supervised": e.supervised}))  # fmt: skip
    assert probe.supervised(train, end, bos).state is State.ok
    assert probe.supervised(rows, end, bos).state is State.fail


# what libraries compute


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Return `probe.stack` as the first launch of a machine calls it, and later ones with the same cache."""
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "cache"))

    def called():
        probe.stack.cache_clear()
        return probe.stack()

    yield called
    probe.stack.cache_clear()


def test_stack_is_as_it_should_be(anew):
    found = anew()
    assert [one.name for one in found] == ["accumulation", "neftune", "padding", "packing"]
    assert {one.state for one in found} == {State.ok}, found


def test_a_stack_that_is_well_is_not_asked_again_until_something_changes(anew, monkeypatch, tmp_path):
    asked, real = [], probe.accumulation
    monkeypatch.setattr(probe, "accumulation", lambda *given: asked.append(1) or real(*given))
    found = anew()
    assert anew() == found
    assert len(asked) == 1
    (kept,) = (tmp_path / "cache" / "stack").iterdir()
    kept.write_text("torn")
    assert anew() == found
    monkeypatch.setattr(probe.facts, "versions", lambda: {"trl": "0"})
    assert anew() == found
    monkeypatch.setattr(probe.facts, "code", lambda: "other")
    anew()
    assert len(asked) == 4


def test_a_stack_that_is_broken_is_asked_each_time(anew, monkeypatch, tmp_path):
    broken = probe.Finding("accumulation", State.fail, "weights differ by 0.5", "use the pinned versions")
    with monkeypatch.context() as patch:
        patch.setattr(probe, "accumulation", lambda *_: broken)
        assert anew()[0] == anew()[0] == broken
        assert not (tmp_path / "cache" / "stack").exists()
    assert anew()[0].state is State.ok


def test_sabotage_mean_over_each_piece(toy, monkeypatch):
    real = sft.token_mean
    monkeypatch.setattr(sft, "token_mean", lambda model, inputs, tokens, *more: real(model, inputs, None, *more))
    assert probe.accumulation(*toy).state is State.fail


def test_sabotage_step_that_does_nothing(toy, monkeypatch):
    real = sft.token_mean
    monkeypatch.setattr(sft, "token_mean", lambda *given: 1e-9 * real(*given))
    found = probe.accumulation(*toy)
    assert found.state is State.fail, "equal weights say nothing where no step was taken"


def test_sabotage_scoring_in_training_mode(toy, monkeypatch):
    base, rows = toy
    embedding = base.model.get_input_embeddings()
    monkeypatch.setattr(type(embedding), "eval", lambda self: self)
    monkeypatch.setattr(type(embedding), "train", lambda self, mode=True: self)
    embedding.training = True
    try:
        found = probe.neftune(base, rows)
    finally:
        embedding.training = False
    assert found.state is State.fail
    assert "0 hooks left" in found.told


def test_sabotage_noise_that_stays_or_never_comes(toy, monkeypatch):
    from transformers import trainer as library

    base, rows = toy
    monkeypatch.setattr(probe, "_steps", _leaving_a_hook(probe._steps, base))  # `model.adapted` takes hooks off itself
    assert "1 hooks left" in probe.neftune(base, rows).told
    monkeypatch.undo()
    monkeypatch.setattr(library, "activate_neftune", lambda model, *_: model.register_forward_hook(lambda *_: None))
    monkeypatch.setattr(library, "deactivate_neftune", lambda *_: None)
    assert probe.neftune(base, rows).state is State.fail


def _leaving_a_hook(real, base):
    def train(*given):
        result = real(*given)
        base.model.get_input_embeddings().register_forward_hook(lambda *_: None)
        return result

    return train


def test_sabotage_loss_of_the_batch_and_padding_on_the_right(toy, monkeypatch):
    base, rows = toy
    real, left = evaluate._nats, evaluate._left_padded

    def mean(scored, some, pad):
        nats = real(scored, some, pad)
        return [sum(nats) / len(nats)] * len(nats)

    def right(asked, pad, begun):
        import torch

        ids, mask = left(asked, pad)
        turned = [int(row.sum()) for row in mask]
        return (torch.stack([row.roll(n) for row, n in zip(ids, turned, strict=True)]),
                torch.stack([row.roll(n) for row, n in zip(mask, turned, strict=True)]))  # fmt: skip

    assert probe.padding(base, base.model, rows, generates=True).state is State.ok
    monkeypatch.setattr(evaluate, "_nats", mean)
    assert probe.padding(base, base.model, rows, generates=False).state is State.fail
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "_left_padded", right)
    found = probe.padding(base, base.model, rows, generates=True)
    assert found.state is State.fail
    assert "0 completions differ" not in found.told


def test_packs_are_apart_off_or_torn(toy, packed, tiny):
    base, rows = toy
    assert probe.packing(packed, base.model, rows).state is State.ok
    assert probe.packing(tiny(), base.model, rows).told == "off"
    assert probe.packing(tiny("data.packing=wrapped"), base.model, rows).state is State.warn


def test_sabotage_packs_that_see_each_other(toy, packed, monkeypatch):
    base, rows = toy
    monkeypatch.setattr(lengths, "contamination", lambda *_: (0.5, 0.5))
    found = probe.packing(packed, base.model, rows)
    assert found.state is State.fail
    assert found.remedy == "data.packing=none"


# the parts


def test_failure_refuses_a_launch_and_a_warning_does_not():
    good, warned = probe.Finding("a", State.ok, "1"), probe.Finding("b", State.warn, "2", "x")
    probe.refuse([good, warned])
    with pytest.raises(MachineError, match=r"^c: 3; do y \(ftexp doctor shows all probes\)$"):
        probe.refuse([good, warned, probe.Finding("c", State.fail, "3", "do y")])


def test_a_probe_leaves_the_model_in_memory_alone(tiny, anew):
    run = tiny()
    kept = model.load(run.model, run.quant)
    before = kept.weights, kept.model.training, [len(m._forward_hooks) for m in kept.model.modules()]
    anew()
    assert model.load(run.model, run.quant) is kept
    assert (kept.weights, kept.model.training, [len(m._forward_hooks) for m in kept.model.modules()]) == before
    assert model.fingerprint(kept.model) == kept.weights


def test_sweep_is_refused_by_the_fast_part_before_a_trial(cli, tmp_path, monkeypatch):
    from conftest import TINY

    broken = probe.Finding("accumulation", State.fail, "weights differ by 0.5", "use the pinned versions")
    monkeypatch.setattr(probe, "stack", lambda: (broken,))
    code, out, err = cli(*TINY, "lora.r=2,4", "track=none", "-m")
    assert code == 4
    assert err.strip().splitlines()[-1] == (
        "ftexp: accumulation: weights differ by 0.5; use the pinned versions (ftexp doctor shows all probes)"
    )
    assert not (tmp_path / "outputs").exists()


def test_every_probe_asks_the_runs_own_model_too(packed, tmp_path):
    found = {one.name: one for one in probe.every(packed, tmp_path / "outputs", trials=3)}
    assert list(found) == ["versions", "folders", "tracking", "supervision", "disk", "device", "accumulation", "neftune",
                           "padding", "packing"]  # fmt: skip
    assert found["packing"].told.startswith("logits of a row change by")
    assert {one.state for one in found.values()} == {State.ok}
