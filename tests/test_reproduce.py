"""A run trained again: equal to the last bit on a CPU, and every way in which it may not be."""

import json
import signal
import sys

import pytest
import transformers
from safetensors.torch import load_file, save_file

from ftexp import experiment, facts, reproduce, runs
from ftexp.errors import ConfigError, DataError, MachineError
from ftexp.files import read_json, write_json
from ftexp.sweep import plugin
from ftexp.train import control


@pytest.fixture
def kept(tiny, tmp_path):
    experiment.execute(tiny("trainer.neftune=5", "lora.dropout=0.1"), tmp_path / "a", "x")
    return runs.find(str(tmp_path / "a"))


def test_run_is_bit_exact_on_a_cpu(kept, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ftexp.reproduce", str(kept.folder)])
    assert reproduce.main() == 0
    assert capsys.readouterr().out.startswith("bit-exact: 6 losses compared, adapters equal")
    assert read_json(kept.folder / "reproduced.json")["verdict"] == "bit-exact"
    assert read_json(kept.folder / "trial.json") == kept.trial  # the run itself is as it was


def change(kept, **values):
    trial = json.loads(json.dumps(kept.trial))
    for key, value in values.items():
        trial[key] = trial[key] | value
    write_json(kept.folder / "trial.json", trial)
    return runs.find(str(kept.folder))


def test_other_training_is_told_with_its_first_step(kept):
    """The config in the file says another learning rate than the one that trained: every point but the first differs."""
    result = reproduce.reproduce(change(kept, config={"trainer.lr": 0.1}))
    assert result.verdict == "different"
    assert result.first_difference.startswith("train/loss at step 2: ")
    assert result.largest > reproduce.TOLERANCE
    assert not result.adapter_equal


def test_causes_are_named(kept):
    told = kept.trial["facts"]["versions"] | {"torch": "1.0"}
    result = reproduce.reproduce(change(kept, facts={"versions": told}))
    assert result.verdict == "bit-exact"
    assert result.causes == {"versions.torch": ("1.0", facts.versions()["torch"])}


def test_fact_that_an_earlier_ftexp_did_not_keep_is_told_as_absent():
    result = reproduce.Result("bit-exact", 6, None, 0.0, True, {"tokenizer_sha256": (None, "058b")})
    assert reproduce.told(result)[1:] == ["not shared: tokenizer_sha256: absent -> 058b"]


def test_small_differences_are_within_tolerance_and_larger_are_not(kept, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    (again / "trial.json").write_text((kept.folder / "trial.json").read_text())
    for factor, verdict in ((1.0, "different"), (1.009, "within tolerance"), (1.02, "different")):
        points = [
            {k: v * factor if k.endswith("/loss") and p["step"] == 3 else v for k, v in p.items()}
            for p in kept.points()
        ]
        (again / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
        result = reproduce.compared(kept, runs.find(str(again)), reproduce.TOLERANCE)
        assert result.verdict == verdict  # never bit-exact: there is no adapter to compare, which equal losses betray
        assert (result.first_difference is None) == (factor == 1)
    (again / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in kept.points()[:-3]))
    assert reproduce.compared(kept, runs.find(str(again)), reproduce.TOLERANCE).verdict == "different"


def test_other_weights_after_equal_losses_are_not_what_the_run_trained(kept, monkeypatch, capsys):
    path = kept.folder / "adapter" / "adapter_model.safetensors"
    save_file({name: 50 * weight for name, weight in load_file(path).items()}, path)
    monkeypatch.setattr(sys, "argv", ["ftexp.reproduce", str(kept.folder)])
    assert reproduce.main() == 5
    told = capsys.readouterr().out
    assert told.startswith("different: 6 losses compared, adapters differ")
    assert "the weights in the folder are not those that it trained" in told
    path.unlink()
    assert reproduce.main() == 4
    assert "what it trained is gone" in capsys.readouterr().err


def test_an_interrupted_repetition_goes_on_from_its_checkpoint(kept, monkeypatch, capsys):
    real, taken = transformers.Trainer.training_step, []

    def leaving(self, *args, **more):
        taken.append(1)
        if len(taken) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args, **more)

    monkeypatch.setattr(sys, "argv", ["ftexp.reproduce", str(kept.folder)])
    monkeypatch.setattr(transformers.Trainer, "training_step", leaving)
    try:
        assert reproduce.main() == 75
    finally:
        control.LEAVE.clear()
    assert "the same command goes on" in capsys.readouterr().err
    again = kept.folder / "reproduced"
    assert [p.name for p in again.rglob("checkpoint-*") if p.is_dir()]
    assert reproduce.main() == 0
    assert capsys.readouterr().out.startswith("bit-exact")
    assert read_json(again / "trial.json")["resumed_at"] == [2]
    assert reproduce.main() == 0  # and a third time from nothing
    assert "resumed_at" not in read_json(again / "trial.json")


def test_a_second_repetition_at_once_is_kept_out(kept, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ftexp.reproduce", str(kept.folder)])
    with plugin.only(kept.folder / "reproduced", "first"):
        assert reproduce.main() == 4
    assert "again is being run by process" in capsys.readouterr().err
    assert [path.name for path in (kept.folder / "reproduced").iterdir()] == [plugin.LOCK]


def test_rows_that_changed_are_refused(kept):
    told = {"rows": kept.trial["facts"]["rows"] | {"sha256": "0" * 64}}
    with pytest.raises(DataError, match=r"its rows were 000000000000, those of data\.kind=yoda are now "):
        reproduce.reproduce(change(kept, facts=told))


def test_what_cannot_be_reproduced_is_refused(kept):
    failed = runs.Kept(kept.folder, kept.trial | {"state": "failed"})
    with pytest.raises(MachineError, match="must be complete to be reproduced, it is failed"):
        reproduce.reproduce(failed)
    with pytest.raises(ConfigError, match="gone"):
        reproduce.reproduce(change(kept, config={"lora.gone": 1}))


@pytest.mark.parametrize("words", [[], ["a", "b"], ["a", "--tolerance"], ["a", "--tolerance", "x"]])
def test_wrong_command_line_ends_in_usage(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ftexp.reproduce", *words])
    assert reproduce.main() == 2
    assert capsys.readouterr().err.startswith("usage: ")
    monkeypatch.setattr(sys, "argv", ["ftexp.reproduce", "-h"])
    assert reproduce.main() == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: ") and not err


def test_interruption_ends_in_one_line(monkeypatch, capsys):
    def interrupted(target):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce.runs, "find", interrupted)
    monkeypatch.setattr(sys, "argv", ["reproduce", "x"])
    assert reproduce.main() == 130
    assert capsys.readouterr().err == "ftexp: interrupted; the same command goes on\n"
