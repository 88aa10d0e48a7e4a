"""A reward model at work: its scores are those of its own run, of an adapter and of a whole model."""

import shutil

import pytest

from ftexp import compare, data, experiment, model
from ftexp.config import Method
from ftexp.errors import ConfigError, DataError, MachineError
from ftexp.files import read_json, write_json
from ftexp.train import rewarder


@pytest.mark.parametrize("judge", ["judge", "judge_whole"])
def test_rewards_are_those_that_the_run_gave(rewarded, stages, judge):
    run = rewarded(f"trainer.reward={judge}")
    loaded = rewarder.load(run)
    told = compare.read_table(stages / judge / "examples.parquet")
    valid = data.load(loaded.run.data).valid
    for side, name in (("completion", "reward_chosen"), ("rejected", "reward_rejected")):
        found = loaded.rewards(valid, [getattr(row, side) for row in valid], 64, "x")
        assert found == pytest.approx(told[name], abs=1e-5)
    assert len({*told["reward_chosen"]}) > 6


def test_it_is_loaded_once_for_trials_that_share_it_and_anew_when_it_changed(rewarded, stages):
    first = rewarder.load(rewarded())
    assert rewarder.load(rewarded("trainer.lr=1e-3")) is first
    shutil.rmtree(stages / "judge")
    shutil.copytree(stages / "judge_whole", stages / "judge")
    assert rewarder.load(rewarded()) is not first


def test_the_base_in_memory_is_not_dropped_for_it(rewarded):
    run = rewarded()
    base = model.load(run.model, run.quant)
    rewarder._kept = None
    rewarder.load(run)
    assert model.load(run.model, run.quant) is base


def test_another_reward_model_is_another_run(rewarded, stages, tmp_path):
    run = rewarded("trainer.steps=1")
    folder = tmp_path / "mine"
    experiment.execute(run, folder, "x")
    told = read_json(folder / "trial.json")["facts"]
    assert told["reward"]["run"] == "judge"
    assert told["start"]["run"] == "sft"
    experiment.check(run, folder)
    prints = experiment.fingerprint(run, told)
    assert prints["reward.trained_sha256"] == told["reward"]["trained_sha256"]
    shutil.rmtree(stages / "judge")
    shutil.copytree(stages / "judge_whole", stages / "judge")
    with pytest.raises(ConfigError, match="judge was trained again since the run in .*; choose another name"):
        experiment.check(run, folder)


def test_a_stage_that_is_missing_is_named(rewarded):
    with pytest.raises(
        MachineError, match="trainer.reward=nowhere must be a run that is complete here, train it first"
    ):
        experiment.check(rewarded("trainer.reward=nowhere"), None)
    with pytest.raises(MachineError, match=r"model\.path=nowhere must be a run that is complete here, train it first"):
        experiment.check(rewarded("model.path=nowhere"), None)


def test_a_run_of_another_method_is_refused(rewarded):
    with pytest.raises(ConfigError, match=r"trainer\.reward=sft must be a run with trainer\.kind=reward, its is sft"):
        experiment.check(rewarded("trainer.reward=sft"), None)
    with pytest.raises(ConfigError, match=r"model\.path=judge must be a run with trainer\.kind=sft or dpo or rloo"):
        experiment.check(rewarded("model.path=judge"), None)


def test_a_run_that_is_not_complete_or_lost_its_weights_is_refused(rewarded, stages):
    told = read_json(stages / "judge" / "trial.json")
    write_json(stages / "judge" / "trial.json", told | {"state": "failed"})
    with pytest.raises(MachineError, match="must be complete, it is failed"):
        rewarder.found(rewarded())
    write_json(stages / "judge" / "trial.json", told)
    shutil.rmtree(stages / "judge" / "adapter")
    with pytest.raises(MachineError, match="neither adapter nor model is left"):
        rewarder.found(rewarded())


def test_another_base_below_the_reward_model_is_refused(rewarded, stages):
    told = read_json(stages / "judge" / "trial.json")
    told["facts"]["weights_sha256"] = "0" * 64
    write_json(stages / "judge" / "trial.json", told)
    rewarder._kept = None
    with pytest.raises(MachineError, match="was trained on weights 000000000000"):
        rewarder.load(rewarded())


def test_an_answer_longer_than_the_reward_model_is_named(rewarded):
    loaded = rewarder.load(rewarded())
    row = data.load(loaded.run.data).valid[0]
    with pytest.raises(DataError, match="the reward model takes at most 512 tokens"):
        loaded.rewards([row], ["e" * 600], 1, "x")
    assert loaded.run.trainer.kind is Method.reward


def test_a_text_that_spells_the_end_token_out_ends_there(rewarded):
    """The tokenizer would read it as the token itself, which no row may go on after."""
    loaded = rewarder.load(rewarded())
    row = data.load(loaded.run.data).valid[0]
    ended, spelled, on = loaded.rewards([row] * 3, ["so it is", "so it is<|im_end|> and on", "so it is and on"], 3, "x")
    assert spelled == pytest.approx(ended, abs=1e-6)
    assert spelled != on
