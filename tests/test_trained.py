"""Trained runs found and loaded: the winner of a sweep, the scores of the run again, and every refusal."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ftexp import data, evaluate, trained
from ftexp.data import prompts
from ftexp.errors import MachineError
from ftexp.files import read_json, write_json


@pytest.fixture
def copied(shipped, tmp_path, monkeypatch):
    """A copy that a test may change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shipped / "outputs", tmp_path / "outputs")
    return tmp_path / "outputs" / "sweeps" / "s"


def edit(path, **keys):
    write_json(path, read_json(path) | keys)


def test_sweep_stands_for_its_winner(at):
    losses = {n: read_json(at / f"outputs/sweeps/s/{n}/trial.json")["scores"]["valid/loss"] for n in (0, 1)}
    best = str(min(losses, key=losses.get))
    for target in ("s", "outputs/sweeps/s"):
        assert trained.find(target).folder.name == best
    assert trained.find("outputs/sweeps/s/0").folder.name == "0"
    assert trained.find("c").folder == Path("outputs/runs/c")


def test_winner_of_replicates_is_the_point_and_its_first_seed(tmp_path, capsys):
    import made

    folder = made.sweep(tmp_path / "r", 6, replicates=2)
    means = {}
    for n in range(6):
        means.setdefault(n // 2, []).append(read_json(folder / str(n) / "trial.json")["scores"]["valid/loss"])
    best = min(means, key=lambda point: sum(means[point]))
    assert trained.winner(folder).folder.name == str(2 * best)
    assert "the first of its 2 seeds" in capsys.readouterr().err


def test_what_is_not_there_or_not_complete_is_refused(copied, tmp_path):
    with pytest.raises(MachineError, match="nowhere: must be the folder of a run"):
        trained.find("nowhere")
    for n in (0, 1):
        edit(copied / str(n) / "trial.json", state="failed")
    with pytest.raises(MachineError, match="it has no winner"):
        trained.find("s")
    with pytest.raises(MachineError, match="must be complete, it is failed"):
        trained.find(str(copied / "0"))


def test_loaded_run_scores_as_it_did(at):
    kept = trained.find("s")
    with trained.load(kept) as loaded:
        rows = prompts.render(data.load(loaded.run.data).valid, loaded.tokenizer, loaded.run.data)
        tuned = evaluate.score(loaded.tuned, loaded.tokenizer, rows, loaded.run.eval, "t").scores
        with loaded.untuned() as untuned:
            base = evaluate.score(untuned, loaded.tokenizer, rows, loaded.run.eval, "b").scores
    told = kept.trial["scores"]
    assert tuned["loss"] == pytest.approx(told["valid/loss"], rel=1e-9)
    assert base["loss"] == pytest.approx(told["base/loss"], rel=1e-9)
    assert abs(tuned["loss"] - base["loss"]) > 1e-3  # so that one cannot be taken for the other


def test_other_base_weights_are_refused(copied):
    trial = read_json(copied / "0" / "trial.json")
    edit(copied / "0" / "trial.json", facts=trial["facts"] | {"weights_sha256": "0" * 64})
    with pytest.raises(MachineError, match="was trained on weights 000000000000, those of the base model are now"), \
         trained.load(trained.find(str(copied / "0"))):  # fmt: skip
        pass


def test_another_device_is_told(copied, capsys):
    trial = read_json(copied / "0" / "trial.json")
    facts = trial["facts"] | {"compute": trial["facts"]["compute"] | {"device": "cuda", "dtype": "bfloat16"}}
    edit(copied / "0" / "trial.json", facts=facts)
    with trained.load(trained.find(str(copied / "0"))) as loaded:
        assert loaded.compute.device == "cpu"
    assert "s/0 was trained on cuda in bfloat16; this is cpu in float32" in capsys.readouterr().err


def test_labels_are_those_of_a_classifier_alone(at):
    assert len(trained.names(trained.find("c"))) > 2
    assert trained.names(trained.find("s")) == []


def test_confirmation_is_that_of_the_winner(copied):
    assert trained.confirmed(trained.find("s")) is None
    entry = {"result": {"members": [{"trials": [1]}, {"trials": [0]}]}}
    write_json(copied / "confirm.json", {"line": "Confirmed.", "openings": [entry]})
    assert trained.confirmed(trained.find(str(copied / "1"))) == "Confirmed."
    assert trained.confirmed(trained.find(str(copied / "0"))) is None
    write_json(copied / "confirm.json", {"line": "begun", "openings": [{}]})
    assert trained.confirmed(trained.find(str(copied / "1"))) is None


def test_whole_model_scores_as_the_run_did_beside_its_base(stages):
    with trained.load(trained.find("whole")) as loaded:
        rows = prompts.render(data.load(loaded.run.data).valid, loaded.tokenizer, loaded.run.data)
        tuned = evaluate.score(loaded.tuned, loaded.tokenizer, rows, loaded.run.eval, "t").scores
        with loaded.untuned() as untuned:
            base = evaluate.score(untuned, loaded.tokenizer, rows, loaded.run.eval, "b").scores
    told = loaded.kept.trial["scores"]
    assert tuned["loss"] == pytest.approx(told["valid/loss"], rel=1e-9)
    assert base["loss"] == pytest.approx(told["base/loss"], rel=1e-9)
    assert abs(tuned["loss"] - base["loss"]) > 1e-3


def test_base_of_a_whole_model_must_be_the_one_it_was_trained_on(stages):
    trial = read_json(stages / "whole" / "trial.json")
    edit(stages / "whole" / "trial.json", facts=trial["facts"] | {"weights_sha256": "0" * 64})
    told = "was trained on weights 000000000000"  # what it answers itself hangs on no base
    with trained.load(trained.find("whole")) as loaded, pytest.raises(MachineError, match=told), loaded.untuned():
        pass


def _config(**keys):
    return lambda folder: edit(folder / "config.json", **keys)


def _code(folder):
    """A config of a kind that transformers does not know, whose classes are a file of the folder."""
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (folder / "evil.py").write_text(
        "open('executed', 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M"
    )


def _outside(folder):
    """An index that takes every weight from a file beside the run."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../../outside.safetensors")}
    write_json(folder / "model.safetensors.index.json", index)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda f: shutil.rmtree(f), "neither adapter nor model is left"),
        (lambda f: (f / "config.json").unlink(), r"must be a folder with a config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), "whole/model cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"torn"), "whole/model cannot be loaded"),
        (_config(hidden_size=33), "whole/model cannot be loaded"),
        (_config(intermediate_size=7), "whole/model cannot be loaded"),
        (_config(attn_implementation="evil/kernel"), "must name an attention of transformers, not code"),
        (_code, "whole/model cannot be loaded: .*custom code"),
        (_outside, "weight_map must name files of its folder"),
    ],
)
def test_a_broken_or_hostile_whole_model_is_refused(stages, broken, told, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    broken(stages / "whole" / "model")
    with pytest.raises(MachineError, match=told), trained.load(trained.find("whole")):
        pass
    assert not Path("executed").exists()


def test_a_model_in_several_files_has_one_hash(stages):
    kept = trained.find("whole")
    alone = kept.weights()
    folder = kept.folder / "model"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert kept.weights() == alone
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"more")
    both = kept.weights()
    assert both is not None and both != alone
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"less")
    assert kept.weights() not in (alone, both)
