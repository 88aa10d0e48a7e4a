"""Every experiment of `conf/`: it composes, plans to the figures of its source, and learns something with scale=smoke."""

import json
import math
import sys
from pathlib import Path

import numpy
import pytest
import yaml

from ftexp import config, data, estimate, experiment, model, overrides, plan
from ftexp.config import Kind, Method, Model, Quant, Source
from ftexp.train import classify

ROWS = sorted(path.stem for path in (overrides.CONF / "experiment").glob("*.yaml"))
GOLDEN = yaml.safe_load((Path(__file__).parent / "golden" / "seeds.yaml").read_text())
SMALL = ["scale=smoke", "model=hub", "model.dtype=float32", "track=none", "trainer.report_steps=0",
         "eval.max_new_tokens=4"]  # fmt: skip
"""The smoke of a recipe on a model that takes seconds."""
OWN = {"anime_genres": ["lora.train=[layers.0,layers.1]", "trainer.lr=2e-3"], "latex_gpt2": ["trainer.lr=2e-3"]}
"""The tiny model has no layers 28 and 29, and takes larger steps."""
SWAPPED = {
    "model.kind", "model.path", "model.revision", "model.dtype", "lora.targets", "lora.train",
    "data.kind", "data.path", "data.valid_path", "data.split", "data.rows", "data.valid", "data.prompt",
    "data.completion", "data.columns.text", "data.columns.labels", "data.max_length", "trainer.lr", "trainer.steps",
    "trainer.batch", "trainer.accumulation", "trainer.report_steps", "eval.max_new_tokens", "eval.batch",
}  # fmt: skip
"""Keys that a smoke may change: model, rows, and how much of them. All others are the recipe's."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The tiny model in a folder: weights that were stored can be quantized."""
    folder = tmp_path_factory.mktemp("stored")
    base = model.load(Model(kind=Kind.tiny), Quant())
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small(composed, stored):
    """Return a function that composes the smoke of a recipe on the stored model."""

    def build(row, *given):
        return composed(f"experiment={row}", *SMALL, f"model.path={stored}", *OWN.get(row, []), *given)

    return build


@pytest.mark.parametrize("row", ROWS)
def test_recipe_and_its_smoke_differ_in_model_and_rows_alone(row, composed):
    recipe, smoke = (config.flat(composed(f"experiment={row}", *given)) for given in ([], ["scale=smoke"]))
    differ = {key for key in recipe | smoke if recipe.get(key) != smoke.get(key)}
    assert differ <= SWAPPED
    assert smoke["model.kind"] == Kind.embedded.value
    assert smoke["data.kind"] not in {kind.value for kind in (*config.FILES, Source.hub)}
    assert (overrides.CONF / "scale" / "smoke" / f"{row}.yaml").exists()


def test_a_smoke_of_another_method_would_be_seen(composed):
    recipe = config.flat(composed("experiment=korean_llama2"))
    other = config.flat(composed("experiment=korean_llama2", "scale=smoke", "data.packing=bfd", "lora=dora"))
    assert {key for key in other if recipe.get(key) != other[key]} - SWAPPED == {"data.packing", "lora.variant"}


def planned(row, given, monkeypatch, capsys):
    """Plan a recipe on the command line; activations, which no source prints, are left out."""
    monkeypatch.setattr(estimate.activations, "trace", lambda *_: numpy.zeros(1, dtype=int))
    monkeypatch.setattr(sys, "argv", ["ftexp plan", f"experiment={row}", *given, "--json"])
    code = plan.main()
    out, err = capsys.readouterr()
    assert code == 0, err
    told = json.loads(out)["trials"][0]
    return told | {
        "percent": 100 * told["trainable"] / told["total"],
        "packed_percent": 100 * told["trainable"] / told["packed"],
        "adapter_file_mb": told["adapter_file"] / 1e6,
    }


def same(found, wanted):
    """Compare a figure as the source prints it: text to its last digit, a number exactly."""
    return f"{found:.{len(wanted.partition('.')[2])}f}" == wanted if isinstance(wanted, str) else found == wanted


@pytest.mark.parametrize("row", sorted(GOLDEN))
def test_recipe_is_planned_to_the_figures_of_its_source(row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wanted = {key: value for key, value in GOLDEN[row].items() if key != "plan"}
    found = planned(row, GOLDEN[row]["plan"], monkeypatch, capsys)
    assert {key: found[key] for key, value in wanted.items() if not same(found[key], value)} == {}
    assert not list(tmp_path.iterdir())


def test_phi3_prints_its_base_before_the_rest_becomes_float32(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [*GOLDEN["yoda_phi3"]["plan"], "model.dtype=bfloat16"]
    assert planned("yoda_phi3", given, monkeypatch, capsys)["footprint"] == 2206341312


def test_an_adapter_that_is_not_the_sources_would_be_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for given in (["lora.targets=[q_proj,v_proj]"], ["lora.r=16"], ["quant=none"]):
        found = planned("quotes_mistral_probe", [*GOLDEN["quotes_mistral_probe"]["plan"], *given], monkeypatch, capsys)
        assert (found["trainable"], found["packed"]) != (21260288, 3773331456)


def test_every_recipe_of_a_tutorial_has_figures():
    assert set(ROWS) == {*GOLDEN, "yoda_smollm2"}


def learned(run, folder):
    """Train a run; return the loss of what knows nothing of the rows, and that of the trained model."""
    experiment.check(run, None)
    experiment.prepare(run)
    scores = experiment.execute(run, folder / "run", "smoke")
    if run.trainer.kind is not Method.classify:
        return scores["base/loss"], scores["valid/loss"]
    import torch

    train, valid, known = experiment.classified(run, data.load(run.data))
    untrained = torch.zeros(len(valid), len(known), dtype=torch.float64)  # the head starts at zero
    return classify.loss(untrained, valid, known, run.trainer.multi_label), scores["valid/loss"]


@pytest.mark.parametrize("row", ROWS)
def test_smoke_of_a_recipe_learns(row, small, composed, tmp_path):
    """With the recipe's own quantization and optimizer, which CPUs have."""
    run = small(row)
    assert (run.quant, run.trainer.optimizer) == (
        (asked := composed(f"experiment={row}")).quant,
        asked.trainer.optimizer,
    )
    before, after = learned(run, tmp_path)
    assert after < before - 0.05


def test_a_smoke_that_learns_nothing_would_be_seen(small, tmp_path):
    before, after = learned(small("yoda_phi3", "trainer.lr=1e-9"), tmp_path)
    assert after > before - 0.05


@pytest.mark.slow
def test_smoke_of_the_classifier_tells_genres(composed, tmp_path):
    """On the embedded model, whose tokens are words; an untrained head has an area of 0.5."""
    run = composed("experiment=anime_genres", "scale=smoke", "track=none", "trainer.report_steps=0")
    before, after = learned(run, tmp_path)
    assert before == pytest.approx(math.log(2))
    assert after < 0.5 * before
    scores = json.loads((tmp_path / "run" / "trial.json").read_text())["scores"]
    assert scores["valid/roc_auc_macro"] > 0.65
