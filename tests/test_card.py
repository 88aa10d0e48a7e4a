"""The model card: what the run's files say, each figure found again, and nothing of the rows or the machine."""

import re
import shutil
from dataclasses import replace

import pytest
import yaml

from ftexp import card, compare, trained
from ftexp.config import Kind, Model
from ftexp.fidelity import LIMITS, Fidelity
from ftexp.files import read_json, write_json
from ftexp.stats import columns


@pytest.fixture
def kept(at):
    return trained.find("s")


def cells(text, name):
    """Values of a row of a table by its first cell."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_figures_are_those_of_the_run(kept):
    text = card.write(kept, "adapter", None, None)
    told = kept.trial
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "library_name": "peft",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["ftexp", "lora"],
    }
    rows = told["facts"]["rows"]
    for name, value in (
        ("rows read", rows["read"]),
        ("trained on", rows["train"]),
        ("held out", rows["valid"]),
        ("sealed", 10),
    ):
        assert cells(text, name) == [str(value)]
    assert cells(text, "rank") == [str(told["config"]["lora.r"])]
    assert cells(text, "alpha") == [f"{told['config']['lora.alpha']:g}"]
    assert cells(text, "steps") == ["4"]
    assert rows["sha256"] in text and told["facts"]["weights_sha256"] in text and told["facts"]["code_sha256"] in text
    for name, number in told["facts"]["versions"].items():
        assert f"{name} {number}" in text
    base, value, ends = cells(text, "loss")
    assert (base, value) == (f"{told['scores']['base/loss']:.4f}", f"{told['scores']['valid/loss']:.4f}")
    content = compare.read_table(kept.folder / "examples.parquet")
    interval = columns.interval(columns.ratio(content["nats"], content["tokens"]))
    assert ends == f"{interval.low:.4f} to {interval.high:.4f}"
    assert "Unknown: it follows from the base model and the data" in text
    assert "its scores look better than they are" in text


def test_rows_of_one_unit_count_as_one_in_the_interval(kept, tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = shutil.copytree(kept.folder, tmp_path / "1")
    table = pyarrow.parquet.read_table(folder / "examples.parquet")
    rows = len(table)
    units = [n * 4 // rows for n in range(rows)]
    pyarrow.parquet.write_table(
        table.set_column(table.column_names.index("unit"), "unit", pyarrow.array(units))
        if "unit" in table.column_names
        else table.append_column("unit", pyarrow.array(units)),
        folder / "examples.parquet",
    )
    found = {name: ends for name, _, ends, _ in card.intervals(replace(kept, folder=folder))}
    column = columns.ratio(table["nats"].to_pylist(), table["tokens"].to_pylist())
    wanted = columns.interval(column, units)
    assert (found["loss"].low, found["loss"].high) == (wanted.low, wanted.high)
    assert wanted != columns.interval(column)


def test_command_is_that_of_the_trial_and_runs_it(kept, composed):
    from ftexp import experiment

    text = card.write(kept, "adapter", None, None)
    words = re.search(r"```sh\n(.*?)\n```", text, re.DOTALL)[1].split()
    assert words[:3] == ["python", "-m", "ftexp.run"]
    assert experiment.identity(composed(*words[3:])) == kept.trial["config"]


def test_no_row_and_no_path_is_told(kept, at):
    text = card.write(kept, "adapter", None, None)
    assert str(at) not in text
    for row in compare.read_table(kept.folder / "examples.parquet")["prompt"]:
        assert row not in text
    assert card._local("data.path=/home/me/x.jsonl") == "data.path=x.jsonl"
    assert card._local("model.path='/home/me/my model'") == "model.path=my model"
    assert card._local("data.path=x.jsonl") == "data.path=x.jsonl"
    assert card._local("/home/me/team") == "team"  # behind --config-dir


def test_run_of_a_confirmation_is_not_told_as_one_that_was_ranked(kept, tmp_path):
    folder = shutil.copytree(kept.folder, tmp_path / "s/confirm/0")
    text = card.write(replace(kept, folder=folder), "adapter", None, None)
    assert "confirms a sweep's point with a fresh seed" in text
    assert "that these rows ranked" not in text


def test_run_that_is_named_by_a_number_is_no_trial_of_a_sweep(at, tmp_path):
    single = trained.find(str(shutil.copytree(trained.find("c").folder, tmp_path / "7")))
    write_json(tmp_path / "confirm.json", {"line": "x", "openings": [{"result": {"members": [{"trials": [7]}]}}]})
    assert trained.confirmed(single) is None
    assert "trial of a sweep" not in card.write(single, "adapter", None, None)


def test_paths_are_cut_in_the_whole_card(kept, tmp_path):
    folder = shutil.copytree(kept.folder, tmp_path / "1")
    words = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
    (folder / ".hydra" / "overrides.yaml").write_text(
        yaml.safe_dump([*words, "data.path=/home/me/secret-place/x.jsonl"])
    )
    text = card.write(trained.find(str(folder)), "adapter", None, None)
    assert "data.path=x.jsonl" in text and "secret-place" not in text
    assert "Of absolute paths only the last part is shown." in text


def test_confirmation_and_fidelity_are_told(kept):
    told = Fidelity(12, 1.0, 1.00001, 0.00001, 1.0, 12, 12, LIMITS["float32"])
    text = card.write(kept, "merged", told, "Confirmed on 20 sealed rows.")
    assert "The same config was trained again: Confirmed on 20 sealed rows." in text
    assert "held-out loss 1.000000 -> 1.000010" in text
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"
    assert "Confirmed" not in card.write(kept, "merged", told, None)


def test_classifier_lists_labels_and_thresholds(at):
    kept = trained.find("c")
    text = card.write(kept, "adapter", None, None)
    for name, limit in kept.trial["thresholds"].items():
        assert f"| `{name}` | {limit:.4f} |" in text
    assert "nats a decision" in text and "TF-IDF" in text
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "text-classification"
    assert "trial of a sweep" not in text


def test_classifier_of_cut_texts_shows_how_they_are_cut(at, tmp_path):
    folder = shutil.copytree(trained.find("c").folder, tmp_path / "cut")
    assert 'tokenizer("a text", return_tensors="pt")' in card.write(trained.find(str(folder)), "adapter", None, None)
    trial = read_json(folder / "trial.json")
    write_json(folder / "trial.json", trial | {"config": trial["config"] | {"data.long": "cut", "data.max_length": 99}})
    text = card.write(trained.find(str(folder)), "adapter", None, None)
    assert 'tokenizer("a text", truncation=True, max_length=99, return_tensors="pt")' in text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"trainer.kind": "dpo", "trainer.beta": 0.05}, {"beta": "0.05"}),
        (
            {"trainer.kind": "rloo", "trainer.beta": 0.02, "trainer.reward": "/home/me/judge", "trainer.generations": 8},
            {"beta": "0.02 a nat away from the model before training", "reward model": "`judge`", "completions a prompt": "8",
             "longest completion": "a quarter more than the longest reference"},
        ),
        ({"trainer.kind": "rloo", "trainer.reward": "judge", "trainer.max_new_tokens": 9}, {"longest completion": "9 tokens"}),
        ({"trainer.kind": "classify", "trainer.class_weights": True}, {"labels a row": "any number, rare ones weighted"}),
        ({"trainer.kind": "classify", "trainer.multi_label": False}, {"labels a row": "one"}),
        ({"trainer.loss": "focal"}, {"loss": "focal 2"}),
        ({"trainer.loss": "focal", "trainer.loss_strength": 0.0}, {"loss": "focal 0"}),
        ({}, {}),
        ({"trainer.kind": "reward"}, {}),
    ],
)  # fmt: skip
def test_what_a_method_alone_has_is_told(kept, given, told):
    trial = kept.trial | {"config": kept.trial["config"] | given}
    text = card._training(replace(kept, trial=trial), replace(kept, trial=trial).config())
    for name, value in told.items():
        assert cells(text, name) == [value]
    own = {"beta", "reward model", "completions a prompt", "longest completion", "labels a row", "loss"}
    found = {name for name in own if f"| {name} |" in text}
    assert found >= set(told) and (told or not found)


def test_hostile_names_stay_text(kept, tmp_path):
    folder = shutil.copytree(kept.folder, tmp_path / "<script>|`x")
    trial = read_json(folder / "trial.json")
    write_json(folder / "trial.json", trial | {"config": trial["config"] | {"lora.targets": ["a|b`c"]}})
    text = card.write(trained.find(str(folder)), "adapter", None, None)
    assert "<script>" not in text
    assert cells(text, "targets") == ["`a\\", "b'c`"]  # an escaped bar, which Markdown does not cut at


@pytest.mark.parametrize(
    ("given", "name", "hub"),
    [
        (Model(), card.ORIGINAL, True),
        (Model(kind=Kind.tiny), "ftexp-tiny", False),
        (Model(kind=Kind.hub, path="org/name"), "org/name", True),
        (Model(kind=Kind.hub, path="./my-model"), "my-model", False),
        (Model(kind=Kind.hub, path="/home/me/my-model"), "my-model", False),
    ],
)
def test_base_is_named_as_others_know_it(given, name, hub):
    assert (card.base_name(given), card.on_hub(given)) == (name, hub)
