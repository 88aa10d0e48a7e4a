"""RLOO: weights and gradient by hand, a reference that is the untouched base, steps that a kill does not change."""

from contextlib import nullcontext

import pytest
import torch

from ftexp import compare, data, evaluate, experiment, metrics, model
from ftexp.config import Eval
from ftexp.errors import ConfigError, Diverged, Preempted
from ftexp.files import read_json
from ftexp.runs import find
from ftexp.train import checkpoints, rewarder, rloo, sft
from ftexp.train.control import Control

SGD = ("trainer.optimizer=sgd", "trainer.lr=0.5", "trainer.max_grad_norm=0", "trainer.warmup=0", "trainer.steps=1")


def parts(run):
    task = experiment.TASKS[run.trainer.kind](run, data.load(run.data))
    base = model.load(run.model, run.quant)
    task.ready(base)
    return base, task


class Letters:
    """Stands for a reward model: a completion is worth the letters `e` that it holds."""

    def rewards(self, rows, texts, batch, label):
        return [float(text.count("e")) for text in texts]


def trained(run, folder, judge=None, reports=None):
    """Train without scoring and return what was trained."""
    base, task = parts(run)
    told = [] if reports is None else reports
    with model.adapted(base, run.lora, run.seed) as tuned:
        rloo.train(run, base, tuned, task.train, task.valid, checkpoints.store(folder / "t", {}),
                   lambda v, s: told.append((s, v)), Control(), judge or task.more["rewarder"])  # fmt: skip
        return {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}


def moved(tuned):
    """Make another policy of what is its own reference still."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in [p for p in tuned.parameters() if p.requires_grad]:
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.1)


@pytest.fixture
def trainer_of(tmp_path):
    """Return a function that makes the trainer of a run."""

    from transformers import TrainerCallback

    def make(run, base, tuned, task):
        settings = sft.arguments(run.trainer, "cpu", run.seed, str(tmp_path / "t"), 1)
        settings.max_completion_length = 6
        return rloo._trainer(base, tuned, settings, task.train, run, task.more["rewarder"], TrainerCallback())

    return make


def log_likelihoods(scored, prompt, completion):
    """ln p of each token of a completion, one row at a time and without TRL's chunks."""
    ids = torch.tensor([[*prompt, *completion]])
    told = scored(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return told.gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("lora", ["default", "dora", "pissa", "none"])
def test_weights_and_gradient_by_hand(rewarded, trainer_of, lora):
    """reward - beta * sum of ln p / q, less the mean of the other completions; loss -weight * ln p."""
    run = rewarded(f"lora={lora}", "trainer.beta=0.3", *(["model.dtype=float32"] if lora == "none" else []))
    base, task = parts(run)
    untouched = model.load(run.model, run.quant).weights
    reference = model.fresh(run.model, run.quant).model
    with model.adapted(base, run.lora, run.seed) as tuned:
        moved(tuned)
        made = trainer_of(run, base, tuned, task)
        tuned.train()
        batch = [{"prompt": str(n)} for n in (3, 7) for _ in range(4)]
        written, usual = [], made._generate
        made._generate = lambda prompts: written.append(usual(prompts)) or written[-1]
        inputs = made._prepare_inputs(batch)
        prompts, completions, texts = written[0]
        assert prompts == [list(task.train[n].prompt) for n in (3, 7) for _ in range(4)]
        rows = [task.train[n].row for n in (3, 7) for _ in range(4)]
        worth = torch.tensor(task.more["rewarder"].rewards(rows, texts, 8, ""))
        ours = [log_likelihoods(tuned, p, c) for p, c in zip(prompts, completions, strict=True)]
        with torch.no_grad():
            theirs = [log_likelihoods(reference, p, c) for p, c in zip(prompts, completions, strict=True)]
        away = torch.stack([(a.detach() - b).sum() for a, b in zip(ours, theirs, strict=True)])
        assert away.abs().max() > 0.05
        weights = (worth - 0.3 * away).reshape(2, 4)
        weights = (weights - (weights.sum(1, keepdim=True) - weights) / 3).flatten()
        order = [
            next(m for m, c in enumerate(completions) if c == kept[: len(c)].tolist() and prompts[m] == asked[-len(prompts[m]) :].tolist())
            for kept, asked in zip(inputs["completion_ids"], inputs["prompt_ids"], strict=True)
        ]  # TRL shuffles them  # fmt: skip
        assert inputs["advantages"].tolist() == pytest.approx(weights[order].tolist(), abs=2e-4)
        (-(weights * torch.stack([part.sum() for part in ours])).mean()).backward()
        mine = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
        tuned.zero_grad()
        made.compute_loss(tuned, inputs).backward()
        other = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    assert set(mine) == set(other)
    assert max(p.abs().max() for p in mine.values()) > 1e-2
    assert max((mine[n] - other[n]).abs().max() for n in mine) < 1e-3 * max(p.abs().max() for p in mine.values())
    assert model.fingerprint(base.model) == untouched


@pytest.mark.parametrize(("lora", "sabotage"), [("pissa", "adapter off"), ("none", "nothing"), ("default", "nothing")])
def test_sabotage_another_reference_would_be_seen(rewarded, lora, sabotage, monkeypatch):
    """The reference of TRL with an adapter, which is the residue of PiSSA; and the policy itself."""
    run = rewarded(f"lora={lora}", "lora.r=32")
    base, task = parts(run)
    few, how = task.valid[:4], Eval(batch=4)
    right = evaluate.held_out(base.model, base.tokenizer, few, how, "x")
    with model.adapted(base, run.lora, run.seed) as tuned:
        moved(tuned)
        with model.untrained(base, tuned):
            same = evaluate.held_out(tuned, base.tokenizer, few, how, "x")
        with tuned.disable_adapter() if sabotage == "adapter off" else nullcontext():
            wrong = evaluate.held_out(tuned, base.tokenizer, few, how, "x")
    assert [e["nats"] for e in same] == [e["nats"] for e in right]
    assert max(abs(a["nats"] - b["nats"]) for a, b in zip(wrong, right, strict=True)) > 0.05


def test_accumulation_changes_nothing(rewarded, tmp_path):
    """A step of 16 completions at once, or of 4 four times."""
    whole = trained(rewarded(*SGD, "trainer.batch=16"), tmp_path / "a")
    pieces = trained(rewarded(*SGD, "trainer.batch=4", "trainer.accumulation=4"), tmp_path / "b")
    start = trained(rewarded(*SGD, "trainer.batch=16", "trainer.lr=1e-12"), tmp_path / "c")
    assert max((whole[k] - start[k]).abs().max() for k in whole) > 1e-3
    assert max((whole[k] - pieces[k]).abs().max() for k in whole) < 1e-5


class After:
    """Asks to leave at a step."""

    def __init__(self, step):
        self.asked, self.step = 0, step

    def is_set(self):
        self.asked += 1
        return self.asked >= self.step


@pytest.mark.parametrize(("lora", "step"), [("default", 2), ("pissa", 5), ("none", 5)])
def test_killed_training_ends_with_the_bits_of_one_that_was_not(rewarded, tmp_path, lora, step):
    """Four prompts a step and 16 in all: the fifth step is in the second epoch."""
    run = rewarded("trainer.steps=6", "data.rows=28", "data.valid=12", "trainer.accumulation=2", "trainer.report_steps=2",
                   f"lora={lora}")  # fmt: skip
    experiment.execute(run, tmp_path / "calm", "x")
    with pytest.raises(Preempted):
        experiment.execute(run, tmp_path / "left", "x", control=Control(leave=After(step)))
    experiment.execute(run, tmp_path / "left", "x")
    assert read_json(tmp_path / "left" / "trial.json")["resumed_at"] == [step]
    calm, left = (find(str(tmp_path / end)) for end in ("calm", "left"))
    assert calm.weights() == left.weights() is not None
    curves = [{(p["step"], k): v for p in kept.points() for k, v in p.items() if k in ("valid/reward", "train/reward")}
              for kept in (calm, left)]  # fmt: skip
    assert curves[0] == curves[1]


def test_sabotage_an_order_that_begins_anew_would_be_seen(rewarded, tmp_path, monkeypatch):
    """TRL's own sampler draws the first epoch again where a killed training goes on in the second."""
    run = rewarded("trainer.steps=6", "data.rows=28", "data.valid=12", "trainer.accumulation=2")
    seen, usual = [], rewarder.Rewarder.rewards

    def watched(self, rows, texts, batch, label):
        seen.append([row.where for row in rows] if label == "sampled" else [])
        return usual(self, rows, texts, batch, label)

    monkeypatch.setattr(rewarder.Rewarder, "rewards", watched)
    trained(run, tmp_path)
    steps = [{*asked} for asked in seen if asked]
    assert [len(asked) for asked in steps] == [4] * 6
    assert set().union(*steps[:4]) == {e.row.where for e in parts(run)[1].train}
    assert steps[4:] != steps[:2]
    assert [{*asked} for asked in drawn(run, 1)][:2] == steps[4:]
    monkeypatch.setattr(rloo.Order, "set_epoch", lambda self, epoch: None)
    assert [{*asked} for asked in drawn(run, 1)][:2] == steps[:2]


def drawn(run, epoch):
    """Rows of each step of an epoch."""
    rows = parts(run)[1].train
    order = rloo.Order(len(rows), run, 4)
    order.set_epoch(epoch)
    numbers = list(order)
    assert len(numbers) == len(order) == 4 * 16 * 2
    return [[rows[n].row.where for n in numbers[at : at + 16]] for at in range(0, len(numbers), 32)]


def test_the_base_is_left_as_it_was_and_one_adapter_is_kept(rewarded, tmp_path):
    run = rewarded("lora=pissa")
    base, _ = parts(run)
    text = base.model.config.get_text_config()
    before = (
        model.fingerprint(base.model),
        text.pad_token_id,
        base.model.model_tags,
        base.model.generation_config.to_dict(),
    )
    hooks = model._hooks(base.model)
    experiment.execute(run, tmp_path / "a", "x")
    assert model.load(run.model, run.quant) is base
    assert before == (
        model.fingerprint(base.model),
        text.pad_token_id,
        base.model.model_tags,
        base.model.generation_config.to_dict(),
    )
    assert model._hooks(base.model) == hooks
    assert "forward" not in base.model.__dict__
    assert sorted(p.name for p in (tmp_path / "a" / "adapter").iterdir() if p.is_dir()) == []


def test_sabotage_the_second_adapter_of_trl_would_be_seen(rewarded, tmp_path, monkeypatch):
    monkeypatch.setattr(rloo, "_one_adapter", lambda tuned: nullcontext())
    experiment.execute(rewarded(), tmp_path / "a", "x")
    assert (tmp_path / "a" / "adapter" / "ref").is_dir()


def test_divergence_is_exact_by_hand(rewarded):
    """Summed over the vocabulary with float64, a token at a time."""
    run = rewarded()
    base, task = parts(run)
    reference = model.fresh(run.model, run.quant).model
    with model.adapted(base, run.lora, run.seed) as tuned:
        moved(tuned)
        told = rloo.score(tuned, base, task.valid, run, task.more["rewarder"], "x", rival=[0.0] * len(task.valid))
        nats, tokens = 0.0, 0
        for e, entry in zip(task.valid, told.table, strict=True):
            settings = evaluate.greedy(tuned, base.tokenizer, task.valid, run.eval)
            (ids,) = evaluate.continued(tuned, base.tokenizer, [e.prompt], settings, 1, "x")
            at = torch.tensor([[*e.prompt, *ids]])
            with torch.no_grad():
                p, q = (
                    m(input_ids=at).logits[0, len(e.prompt) - 1 : -1].double().log_softmax(-1)
                    for m in (tuned, reference)
                )
            row = (p.exp() * (p - q)).sum().item()
            assert entry["kl_nats"] == pytest.approx(row, rel=1e-4)
            assert entry["written"] == len(ids)
            assert entry["nats"] == pytest.approx(run.trainer.beta * row - entry["reward"], rel=1e-4)
            nats, tokens = nats + row, tokens + len(ids)
    assert told.scores["kl"] == pytest.approx(nats / tokens, rel=1e-4)
    assert told.scores["kl"] > 1e-3
    assert told.scores["win_rate"] == sum((e["reward"] > 0) + 0.5 * (e["reward"] == 0) for e in told.table) / 12


def test_more_of_what_is_rewarded_is_written(rewarded, tmp_path):
    """Held-out completions, greedy, are worth more after training than before; and the reward is no other's."""
    run = rewarded(
        "trainer.steps=40", "trainer.lr=2e-2", "trainer.batch=16", "trainer.report_steps=40", "trainer.beta=0"
    )
    base, task = parts(run)
    before = rloo.score(base.model, base, task.valid, run, Letters(), "x").scores["reward"]
    with model.adapted(base, run.lora, run.seed) as tuned:
        rloo.train(run, base, tuned, task.train, task.valid, checkpoints.store(tmp_path / "t", {}), lambda *_: None,
                   Control(), Letters())  # fmt: skip
        after = rloo.score(tuned, base, task.valid, run, Letters(), "x")
    assert after.scores["reward"] > before + 1
    assert after.scores["kl"] > 0


def test_trial_alone_equals_the_same_trial_after_others(rewarded, tmp_path):
    alone = experiment.execute(rewarded(), tmp_path / "alone", "x")
    for n, other in enumerate((["lora=none"], ["lora=pissa", "seed=3"], ["trainer.beta=0.5"])):
        experiment.execute(rewarded(*other), tmp_path / str(n), "x")
    after = experiment.execute(rewarded(), tmp_path / "after", "x")
    free = ("cost/seconds", "cost/memory_gib")
    assert {k: v for k, v in alone.items() if k not in free} == {k: v for k, v in after.items() if k not in free}
    assert find(str(tmp_path / "alone")).weights() == find(str(tmp_path / "after")).weights()


def test_numbers_are_known_and_the_table_tells_them(rewarded, tmp_path):
    scores = experiment.execute(rewarded("data.test=9"), tmp_path / "a", "x", opened=1)
    counts = {f"{split}/{name}" for name in metrics.COUNTS for split in ("valid", "test")}
    assert {name for name in scores if not name.startswith("plan")} <= {*metrics.METRICS, *counts}
    table = compare.read_table(tmp_path / "a" / "examples.parquet")
    for name in ("loss", "reward", "win_rate", "kl", "length", "exact_match"):
        assert compare.column(table, f"valid/{name}").value == pytest.approx(scores[f"valid/{name}"], rel=1e-9)
    assert {"base_reward", "base_prediction", "reference_reward"} <= {*table}
    assert sum(table["base_reward"]) / 12 == pytest.approx(scores["base/reward"])
    assert (scores["base/kl"], scores["base/win_rate"]) == (0.0, 0.5)
    assert scores["test/rows"] == 9
    assert 0 <= scores["test/win_rate"] <= 1
    named = {name for p in find(str(tmp_path / "a")).points() for name in p}
    assert {"train/reward", "train/kl", "train/length"} <= named


def test_a_rung_is_reported_with_its_reward_and_judged_by_its_loss(rewarded, tmp_path):
    asked, told = [], []
    run = rewarded("trainer.report_steps=1")
    base, task = parts(run)
    with model.adapted(base, run.lora, run.seed) as tuned:
        rloo.train(run, base, tuned, task.train, task.valid, checkpoints.store(tmp_path / "t", {}),
                   lambda v, s: told.append(v) if "valid/loss" in v else None,
                   Control(judge=lambda rung, step: asked.append((rung.loss, step))), task.more["rewarder"])  # fmt: skip
    assert [loss for loss, _ in asked] == [v["valid/loss"] for v in told]
    assert all({"valid/reward", "valid/kl", "valid/length"} <= v.keys() for v in told)


def test_a_reward_that_is_no_number_ends_the_trial(rewarded, tmp_path):
    run = rewarded()
    base, task = parts(run)
    with torch.no_grad():
        task.more["rewarder"].tuned.score.modules_to_save["default"].weight.fill_(float("nan"))
    try:
        with pytest.raises(Diverged, match="the reward model scores an answer to"):
            trained(run, tmp_path)
    finally:
        rewarder._kept = None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["trainer.batch=8", "trainer.generations=3"], r"trainer\.generations must be a divisor of .* = 8: .*, got 3"),
        (["lora.dropout=0.1"], r"lora\.dropout must be 0 with trainer\.kind=rloo"),
        (["eval.generate=false"], r"eval\.generate must be true with trainer\.kind=rloo"),
        (["trainer.neftune=5"], r"trainer\.neftune must be 0 with trainer\.kind=rloo"),
        (["trainer.reward=''"], r"trainer\.reward must be folder, name or id of a run"),
    ],
)
def test_what_does_not_go_with_it_is_refused(rewarded, given, message):
    with pytest.raises(ConfigError, match=message):
        rewarded(*given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["trainer.batch=64", "trainer.accumulation=64"], r"= 1024 prompts are a step, there are 108"),
        (["trainer.max_new_tokens=500"], r"trainer\.max_new_tokens must leave room for the prompt of"),
        (["++trainer.extra.use_vllm=true"], r"trainer\.extra\.use_vllm must not be set"),
        (["++trainer.extra.max_completion_length=9"], r"trainer\.max_new_tokens"),
        (["++trainer.extra.temprature=0.7"], r"refused by RLOOConfig"),
    ],
)
def test_what_the_rows_and_trl_do_not_take_is_refused_before_a_model_loads(rewarded, given, message):
    with pytest.raises(ConfigError, match=message):
        experiment.prepare(rewarded(*given))


def test_an_adapter_on_the_head_is_refused(rewarded, tmp_path):
    run = rewarded("lora.targets=[q_proj,lm_head]")
    with pytest.raises(ConfigError, match=r"lora\.targets names the output head"):
        experiment.execute(run, tmp_path / "a", "x")
