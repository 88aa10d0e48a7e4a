"""Data sets of the hub: pinned, never run, refused in one line; folders in the hub's layout go the same way."""

import json
import os

import pytest

from ftexp import data, experiment
from ftexp.config import Data, Shape, Source
from ftexp.data import hub, rows
from ftexp.errors import DataError, MachineError
from ftexp.files import read_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def pairs(count, name="p"):
    return [{"prompt": f"{name} {n} alone", "completion": f"c{n}"} for n in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A data set with two configs, as on the hub: a card that names its files."""
    made = tmp_path / "set"
    lines(made / "plain" / "train.jsonl", *pairs(20))
    lines(made / "plain" / "test.jsonl", *pairs(5, "t"))
    lines(made / "other" / "train.jsonl", *pairs(3, "o"))
    (made / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  default: true\n  data_files:\n"
        "  - split: train\n    path: plain/train.jsonl\n  - split: test\n    path: plain/test.jsonl\n"
        "- config_name: other\n  data_files: other/train.jsonl\n---\n"
    )
    return made


def of(folder, **keys):
    return Data(kind=Source.hub, path=str(folder), **{"valid": 4, **keys})


def prompts(folder, **keys):
    return [row.prompt for row in rows.read(of(folder, **keys))]


def test_config_and_split_are_the_ones_asked_for(folder):
    assert prompts(folder) == [f"p {n} alone" for n in range(20)]
    assert prompts(folder, split="test") == [f"t {n} alone" for n in range(5)]
    assert prompts(folder, config="other") == [f"o {n} alone" for n in range(3)]
    assert prompts(folder, split="train[:10%]") == ["p 0 alone", "p 1 alone"]
    assert len(prompts(folder, rows=7)) == 7
    assert rows.read(of(folder))[2].where == f"{folder}/train:3"


@pytest.mark.parametrize("keys", [{"config": "none"}, {"split": "dev"}])
def test_config_or_split_that_is_not_there_is_refused_in_one_line(folder, keys):
    with pytest.raises(DataError, match=r"set: data\.config=.* data\.split=.*: cannot be read: ") as told:
        data.load(of(folder, **keys))
    assert "\n" not in str(told.value)


def test_changed_folder_is_read_anew_though_size_and_time_are_the_same(folder):
    """The library's own cache tells files by size and time, and would give the old rows."""
    file = folder / "other" / "train.jsonl"
    before, stamp = data.load(of(folder, config="other", valid=1)).digest(), file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("c2", "d2"))
    os.utime(file, ns=(stamp, stamp))
    assert data.load(of(folder, config="other", valid=1)).digest() != before


def test_a_script_is_never_run(tmp_path):
    made = tmp_path / "set"
    made.mkdir()
    (made / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises((DataError, MachineError), match="cannot be (read|fetched)"):
        data.load(of(made))
    assert not (tmp_path / "ran").exists()


def test_labels_come_by_their_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, List, Value

    names = ClassLabel(names=["no", "yes"])
    features = Features(text=Value("string"), label=names, labels=List(names))
    made = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0], "labels": [[0, 1], []]}, features=features)
    told = [record for record, _ in hub.numbered(made, "x")]
    assert told == [{"text": "a", "label": "yes", "labels": ["no", "yes"]}, {"text": "b", "label": "no", "labels": []}]
    (tmp_path / "data").mkdir()
    made.remove_columns("labels").to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert [row.completion for row in rows.read(of(tmp_path, shape=Shape.labels))] == ["yes", "no"]


def test_hub_that_cannot_be_asked_is_refused_in_one_line():
    with pytest.raises(
        MachineError, match=r"data\.path=org/rows data\.revision=main: the hub cannot be reached"
    ) as told:
        data.load(of("org/rows", revision="main"))
    assert "\n" not in str(told.value)
    assert "give a file with data=file" in str(told.value)
    with pytest.raises(MachineError, match=r"org/rows: data\.config=null data\.split=train: cannot be fetched"):
        data.load(of("org/rows", revision=COMMIT))


@pytest.mark.parametrize(
    ("path", "keys", "message"),
    [("./none", {}, "there is none of that name"), ("a/b/c/d", {}, "the hub has no such data set")],
)
def test_path_that_names_nothing_is_refused(path, keys, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        data.load(of(path, **keys))


def test_folder_has_no_revision(folder):
    with pytest.raises(DataError, match=r"data\.revision must be null for a folder, got 'main'"):
        data.load(of(folder, revision="main"))


@pytest.fixture
def moving(folder, monkeypatch):
    """A hub whose branch moves; gives what the library was asked for."""
    from types import SimpleNamespace

    import datasets
    import huggingface_hub

    asked, honest = [], datasets.load_dataset

    def load(path, name, split, revision, cache_dir):
        asked.append((path, revision))
        return honest(str(folder), name, split=split, cache_dir=str(folder.parent / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, path, revision=None: SimpleNamespace(sha=COMMIT)
    )
    return asked


def test_branch_is_resolved_before_it_is_read_and_kept_with_the_run(moving, tiny, tmp_path):
    run = tiny(
        "data=hub",
        "data.path=org/rows",
        "data.revision=main",
        "data.rows=null",
        "data.valid=4",
        "trainer.steps=1",
        "eval=loss",
    )
    experiment.execute(run, tmp_path / "run", "x")
    assert set(moving) == {("org/rows", COMMIT)}
    assert read_json(tmp_path / "run" / "trial.json")["facts"]["data_commit"] == COMMIT


def test_sabotage_a_branch_that_is_not_resolved_is_read_as_it_moves(moving, monkeypatch):
    monkeypatch.setattr(hub, "commit", lambda how: how.revision)
    data.load(of("org/rows", revision="a-branch"))
    assert set(moving) == {("org/rows", "a-branch")}


@pytest.mark.hub
def test_set_of_the_real_hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    made = data.load(
        Data(kind=Source.hub, path="dvgodoy/yoda_sentences", prompt="{sentence}", completion="{translation}")
    )
    assert hub.COMMIT.fullmatch(made.commit)
    assert made.read == 720
