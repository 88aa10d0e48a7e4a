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
from ftexp.errors import MachineError
from ftexp.files import write_json
from ftexp.model import architecture
from ftexp.train import classify

ROWS = sorted(path.stem for path in (overrides.CONF / "experiment").glob("*.yaml"))
GOLDEN = yaml.safe_load((Path(__file__).parent / "golden" / "seeds.yaml").read_text())
SMALL = ["scale=smoke", "model=hub", "model.dtype=float32", "track=none", "trainer.report_steps=0",
         "eval.max_new_tokens=4"]  # fmt: skip
"""The smoke of a recipe on a model that takes seconds."""
OWN = {
    "anime_genres": ["lora.train=[layers.0,layers.1]", "trainer.lr=2e-3"],
    "latex_gpt2": ["trainer.lr=2e-3"],
    "sawyer_sft": ["trainer.lr=2e-3"],
    "sawyer_rm": ["trainer.lr=2e-3"],
    "sawyer_rl": ["model=run", "model.path=reproduce-sawyer_sft-smoke", "trainer.lr=2e-3", "trainer.max_new_tokens=8",
                  "eval.max_new_tokens=8"],
}  # fmt: skip
"""The tiny model has no layers 28 and 29, and takes larger steps."""
BEFORE = {"sawyer_rl": ("sawyer_sft", "sawyer_rm")}
"""Recipes that take up what others left."""
SWAPPED = {
    "model.kind", "model.path", "model.revision", "model.dtype", "lora.targets", "lora.train",
    "data.kind", "data.path", "data.valid_path", "data.split", "data.rows", "data.valid", "data.prompt",
    "data.completion", "data.columns.text", "data.columns.labels", "data.max_length", "trainer.lr", "trainer.steps",
    "trainer.batch", "trainer.accumulation", "trainer.report_steps", "eval.max_new_tokens", "eval.batch",
    "trainer.reward", "trainer.max_new_tokens",
}  # fmt: skip
"""Keys that a smoke may change: models, rows, and how much of them. All others are the recipe's."""


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
        model_path = [] if row in BEFORE else [f"model.path={stored}"]
        return composed(f"experiment={row}", *SMALL, *model_path, *OWN.get(row, []), *given)

    return build


@pytest.mark.parametrize("row", ROWS)
def test_recipe_and_its_smoke_differ_in_model_and_rows_alone(row, composed):
    recipe, smoke = (config.flat(composed(f"experiment={row}", *given)) for given in ([], ["scale=smoke"]))
    differ = {key for key in recipe | smoke if recipe.get(key) != smoke.get(key)}
    assert differ <= SWAPPED
    assert smoke["model.kind"] == (Kind.run if row in BEFORE else Kind.embedded).value
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


def left_behind(row, composed):
    """Write what the stages before a recipe leave, but for their weights, which no plan reads."""
    for stage in BEFORE.get(row, ()):
        run = composed(f"experiment={stage}")
        folder = Path("outputs/runs") / f"reproduce-{stage}-none"
        architecture.described(run.model).save_pretrained(folder / "model")
        facts = {"compute": {"dtype": "float32", "attention": "eager"}, "weights_sha256": "0" * 64}
        told = {"state": "complete", "config": experiment.identity(run), "facts": facts}
        write_json(folder / "trial.json", told)


def same(found, wanted):
    """Compare a figure as the source prints it: text to its last digit, a number exactly."""
    return f"{found:.{len(wanted.partition('.')[2])}f}" == wanted if isinstance(wanted, str) else found == wanted


@pytest.mark.parametrize("row", sorted(GOLDEN))
def test_recipe_is_planned_to_the_figures_of_its_source(row, composed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    left_behind(row, composed)
    files = sorted(tmp_path.rglob("*"))
    wanted = {key: value for key, value in GOLDEN[row].items() if key != "plan"}
    found = planned(row, GOLDEN[row]["plan"], monkeypatch, capsys)
    assert {key: found[key] for key, value in wanted.items() if not same(found[key], value)} == {}
    assert sorted(tmp_path.rglob("*")) == files


def test_ranks_of_the_dialogues_differ_in_rank_alone_by_the_command_that_is_told(composed):
    kept = 'lora.alpha="${mul:2,${lora.r}}"'
    readme, file = (overrides.ROOT / "README.md"), (overrides.CONF / "experiment" / "guanaco_llama2.yaml")
    assert all(f"lora.r=8,64 '{kept}' -m" in path.read_text() for path in (readme, file))
    loras = [composed("experiment=guanaco_llama2", kept, f"lora.r={r}").lora for r in (8, 64)]
    assert [lora.alpha / lora.r for lora in loras] == [2, 2]
    assert composed("experiment=guanaco_llama2", "lora.r=64").lora.alpha / 64 == 0.25


def test_a_run_of_the_dialogues_has_the_steps_the_readme_tells(monkeypatch, capsys):
    assert planned("guanaco_llama2", ["--rows", "900", "--tokens", "64"], monkeypatch, capsys)["steps"] == 225
    assert "so it takes fewer: 225 of the 250" in (overrides.ROOT / "README.md").read_text()


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
    """Train a run; return the loss of what knows nothing of the rows, and that of the trained model.

    Of a reward model the share of pairs it gets wrong, and of reinforcement learning the reward with its sign turned.
    """
    experiment.check(run, None)
    experiment.prepare(run)
    scores = experiment.execute(run, folder, "smoke")
    if run.trainer.kind is Method.reward:
        return 0.5, 1 - scores["valid/accuracy"]
    if run.trainer.kind is Method.rloo:
        return -scores["base/reward"], -scores["valid/reward"]
    if run.trainer.kind is not Method.classify:
        return scores["base/loss"], scores["valid/loss"]
    import torch

    train, valid, known = experiment.classified(run, data.load(run.data))
    untrained = torch.zeros(len(valid), len(known), dtype=torch.float64)  # the head starts at zero
    return classify.loss(untrained, valid, known, run.trainer.multi_label), scores["valid/loss"]


@pytest.mark.parametrize("row", ROWS)
def test_smoke_of_a_recipe_learns(row, small, composed, tmp_path, monkeypatch):
    """With the recipe's own quantization and optimizer, which CPUs have."""
    monkeypatch.chdir(tmp_path)
    for stage in BEFORE.get(row, ()):
        learned(small(stage), Path("outputs/runs") / f"reproduce-{stage}-smoke")
    run = small(row)
    assert (run.quant, run.trainer.optimizer) == (
        (asked := composed(f"experiment={row}")).quant,
        asked.trainer.optimizer,
    )
    before, after = learned(run, tmp_path / "run")
    assert after < before - 0.05


def test_a_stage_without_the_one_before_says_which_is_missing(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MachineError, match="reproduce-sawyer_sft-smoke must be a run that is complete here, train it"):
        experiment.check(small("sawyer_rl"), None)


def test_a_smoke_that_learns_nothing_would_be_seen(small, tmp_path):
    before, after = learned(small("yoda_phi3", "trainer.lr=1e-9"), tmp_path / "run")
    assert after > before - 0.05


@pytest.mark.slow
def test_smoke_of_the_classifier_tells_genres(composed, tmp_path):
    """On the embedded model, whose tokens are words; an untrained head has an area of 0.5."""
    run = composed("experiment=anime_genres", "scale=smoke", "track=none", "trainer.report_steps=0")
    before, after = learned(run, tmp_path / "run")
    assert before == pytest.approx(math.log(2))
    assert after < 0.5 * before
    scores = json.loads((tmp_path / "run" / "trial.json").read_text())["scores"]
    assert scores["valid/roc_auc_macro"] > 0.65
