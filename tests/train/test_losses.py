"""Losses: known answers, other implementations, accumulation, and functions of a person."""

import math

import pytest
import torch
from test_sft import HEAD, trained

from ftexp import api, data, experiment, model
from ftexp.config import STRENGTHS, Loss, Trainer
from ftexp.errors import ConfigError
from ftexp.files import read_json
from ftexp.train import losses, sft

STEP = ("trainer.steps=1", "trainer.optimizer=sgd", "trainer.lr=0.5", "trainer.max_grad_norm=0", "trainer.warmup=0",
        "trainer.scheduler=constant", "lora.dropout=0")  # fmt: skip
NAMES = [loss.value for loss in losses.LOSSES]


def of(name, logits, targets, strength=None):
    return losses.chosen(Trainer(loss=Loss(name), loss_strength=strength))(logits, targets)


def test_every_loss_of_the_config_has_a_function():
    assert {*losses.LOSSES, Loss.own} == set(Loss)
    assert set(STRENGTHS) < set(losses.LOSSES)


@pytest.mark.parametrize(
    ("name", "strength", "by_hand"),
    [
        ("nll", None, math.log(4)),
        ("dft", None, math.log(4) / 4),
        ("focal", 2.0, 9 / 16 * math.log(4)),
        ("label_smoothing", 0.3, 0.7 * math.log(4) + 0.3 * (math.log(4) + math.log(4 / 3)) / 2),
        ("z_loss", 0.5, math.log(4) + 0.5 * math.log(4) ** 2),
        ("confidence_penalty", 0.5, math.log(4) - 0.5 * (math.log(4) / 4 + 0.75 * math.log(4 / 3))),
    ],
)
def test_a_token_of_probability_one_quarter_by_hand(name, strength, by_hand):
    logits = torch.tensor([[0.0, math.log(3)]])  # the softmax is 1/4 and 3/4, its sum 4
    assert of(name, logits, torch.tensor([0]), strength).tolist() == pytest.approx([by_hand], rel=1e-6)


def slope(function):
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(1)).requires_grad_()
    function(logits, torch.arange(30)).sum().backward()
    return logits.grad


@pytest.mark.parametrize("name", ["focal", "label_smoothing", "z_loss", "confidence_penalty"])
def test_strength_of_0_is_nll(name):
    plain = slope(lambda *given: of("nll", *given))
    assert torch.allclose(slope(lambda *given: of(name, *given, 0.0)), plain, atol=1e-7)
    assert not torch.allclose(slope(lambda *given: of(name, *given)), plain, atol=1e-7)


def test_label_smoothing_is_that_of_pytorch():
    theirs = torch.nn.functional.cross_entropy
    expected = slope(lambda logits, targets: theirs(logits, targets, reduction="none", label_smoothing=0.2))
    assert torch.allclose(slope(lambda *given: of("label_smoothing", *given, 0.2)), expected, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_focal_keeps_a_slope_for_tokens_that_are_known(gamma):
    logits = torch.tensor([[60.0, 0.0], [0.0, 60.0]], requires_grad=True)
    of("focal", logits, torch.tensor([0, 0]), gamma).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1].tolist() == pytest.approx([-1, 1])  # what is wrong counts in full


def theirs(run, folder, monkeypatch, **given):
    """Train with the loss of SFTTrainer itself."""
    from trl import SFTTrainer

    real = sft._trainer

    def plain(run, base, tuned, settings, *rest):
        for key, value in given.items():
            setattr(settings, key, value)
        trainer = real(run, base, tuned, settings, *rest)
        trainer.compute_loss = SFTTrainer.compute_loss.__get__(trainer)
        return trainer

    told = []
    with monkeypatch.context() as patch:
        patch.setattr(sft, "_trainer", plain)
        return trained(run, folder, told), told


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("ours", "other"),
    [
        (("trainer.loss=dft",), {"loss_type": "dft"}),
        (("trainer.loss=label_smoothing", "trainer.loss_strength=0.3"), {"label_smoothing_factor": 0.3}),
    ],
)
def test_training_equals_that_with_the_loss_of_trl(tiny, tmp_path, monkeypatch, ours, other):
    told = []
    shape = ("trainer.steps=3", "trainer.batch=4", "trainer.accumulation=2")
    mine = trained(tiny(*shape, *ours), tmp_path, told)
    weights, reports = theirs(tiny(*shape), tmp_path, monkeypatch, **other)
    first, second = ([v["train/loss"] for _, v in r if "train/loss" in v] for r in (told, reports))
    assert first == pytest.approx(second, rel=1e-5)
    learned = [k for k in mine if "lora_B" in k]  # from zero
    off, size = (torch.cat([w.flatten() for w in ws]).norm() for ws in (
        [mine[k] - weights[k] for k in learned], [weights[k] for k in learned]))  # fmt: skip
    assert off / size < 3e-4  # not each weight alone: Adam makes a step of a gradient that is all rounding


def apart(tiny, folder, shapes=((4, 2), (1, 8)), name="nll"):
    """Greatest difference of weights after a step of plain SGD on 8 rows, at once or in pieces."""
    given = (*STEP, f"trainer.loss={name}")
    whole = trained(tiny(*given, "trainer.batch=8"), folder)
    assert max(w.abs().max() for n, w in whole.items() if "lora_B" in n) > 1e-4  # a step was taken; B began at 0
    pieces = [trained(tiny(*given, f"trainer.batch={b}", f"trainer.accumulation={a}"), folder) for b, a in shapes]
    return max(float((whole[k] - part[k]).abs().max()) for part in pieces for k in whole)


@pytest.mark.parametrize("name", NAMES)
def test_accumulation_changes_nothing_whatever_the_loss(tiny, tmp_path, name):
    assert apart(tiny, tmp_path, ((4, 2), (2, 4), (1, 8)), name) < 1e-6


def test_sabotage_a_loss_that_takes_its_own_mean_is_another_step(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, Loss.nll, lambda logits, targets, _: losses.nll(logits, targets) / len(targets))
    assert apart(tiny, tmp_path) > 1e-5


@pytest.mark.parametrize("name", ["dft", "z_loss"])
def test_an_adapter_on_the_head_learns_from_any_loss(tiny, tmp_path, name):
    run = tiny(*HEAD, f"trainer.loss={name}")
    found = trained(run, tmp_path)
    train, _ = experiment.tokenised(run, data.load(run.data))
    base = model.load(run.model, run.quant)
    with model.adapted(base, run.lora, run.seed) as tuned:
        total = 0
        for e in train:
            logits, wanted = tuned(input_ids=torch.tensor([e.ids])).logits[0, :-1], torch.tensor(e.labels[1:])
            logs = logits[wanted != -100].log_softmax(-1)
            nats = -logs.gather(1, wanted[wanted != -100][:, None])[:, 0]
            if name == "dft":
                total = total + (nats * (-nats).exp().detach()).sum()
            else:
                total = total + (nats + 1e-4 * logits[wanted != -100].exp().sum(-1).log() ** 2).sum()
        (total / sum(e.supervised for e in train)).backward()
        weights = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if p.requires_grad}
        expected = {n: (p - 0.5 * p.grad).detach() for n, p in weights.items()}
    assert all(torch.allclose(w, expected[n.replace(".default", "")], atol=1e-6) for n, w in found.items())


def test_held_out_loss_stays_nats_a_token(tiny, tmp_path):
    """Before it has learned, every training scores its base alike; only what is learned differs."""
    scores = {}
    for name in ("nll", "dft"):
        run = tiny("eval.generate=false", "trainer.lr=1e-12", "trainer.warmup=0", f"trainer.loss={name}")
        scores[name] = experiment.execute(run, tmp_path / name, name)
    assert scores["dft"]["valid/loss"] == pytest.approx(scores["nll"]["valid/loss"], rel=1e-6)
    assert scores["dft"]["valid/loss"] == pytest.approx(scores["dft"]["base/loss"], rel=1e-5)
    assert scores["dft"]["train/loss"] < 0.1 * scores["nll"]["train/loss"]


def test_losses_are_swept(cli, tmp_path):
    from conftest import UNWRITTEN

    code, out, err = cli(*UNWRITTEN, "track=none", "eval=loss", "trainer.loss=nll,dft,focal", "name=s", "-m")
    assert code == 0, err
    told = [read_json(tmp_path / "outputs/sweeps/s" / str(n) / "trial.json") for n in range(3)]
    assert [t["config"]["trainer.loss"] for t in told] == ["nll", "dft", "focal"]
    assert len({t["scores"]["valid/loss"] for t in told}) == 3


# functions of a person


def half(logits, targets):
    """Half of nll, in words of its own."""
    import torch

    return 0.5 * torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def mean(logits, targets):
    import torch

    return torch.nn.functional.cross_entropy(logits, targets)


def own_count(logits, targets):
    import torch

    return torch.nn.functional.cross_entropy(logits, targets, reduction="none") / len(targets)


def without_gradient(logits, targets):
    return logits.detach()[:, 0]


def infinite(logits, targets):
    return logits[:, 0] / 0


SCALE = 2.0


def around(logits, targets):
    import torch

    return SCALE * torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def within(logits, targets):
    import torch

    def terms():
        return SCALE * torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    return terms()


def listed(logits, targets, scales=[1.0]):  # noqa: B006
    return scales[0] * logits[:, 0]


two = [lambda logits, targets: logits[:, 0], lambda logits, targets: logits[:, 1]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (within, r"loss=within must hold all it uses, it takes SCALE from around it"),
        (listed, r"loss=listed: the default of scales must be a plain value, got \[1.0\]"),
        (two[0], r"loss must be alone on its line, this one holds another lambda"),
        (mean, r"loss=mean must return a term for each of 12 tokens, shape \(12,\), got \(\): no mean, no sum"),
        (own_count, r"loss=own_count must give a token the same term beside any others, it changes by \d+\.\d% of"),
        (without_gradient, r"loss=without_gradient must return finite terms with a gradient"),
        (infinite, r"loss=infinite must return finite terms"),
        (around, r"loss=around must hold all it uses, it takes SCALE from around it"),
        (len, r"loss must be a function of logits and targets, got <built-in function len>"),
        (eval("lambda logits, targets: logits[:, 0]"), r"loss=<lambda> must be written in a file or notebook"),
    ],
)
def test_a_function_that_would_break_training_is_refused(function, message):
    with pytest.raises(ConfigError, match=message):
        losses.give(function)


def attributes(logits, targets):
    import torch

    return -torch.log_softmax(logits, -1).exp().log().gather(1, targets[:, None]).sum(-1)


def test_attributes_are_nothing_from_around(monkeypatch):
    for name in ("log", "sum", "log_softmax"):
        monkeypatch.setitem(attributes.__globals__, name, 3)
    losses.give(attributes)


def test_another_default_is_another_loss():
    def made(scale):
        def loss(logits, targets, scale=scale):
            return scale * logits[:, 0]

        return loss

    assert losses.give(made(1.0)) != losses.give(made(2.0)) != losses.give(made(2.0 + 1e-9))
    assert losses.given(Trainer(loss=Loss.own, loss_sha256=losses.give(made(2.0)))).endswith("# defaults: scale=2.0\n")


def test_sabotage_without_the_check_accumulation_changes_the_step(monkeypatch):
    monkeypatch.setattr(losses, "check", lambda function: None)
    digest = losses.give(own_count)
    terms = losses.chosen(Trainer(loss=Loss.own, loss_sha256=digest))
    logits, targets = torch.randn(8, 5), torch.arange(8) % 5
    whole = terms(logits, targets).sum()
    pieces = sum(terms(logits[at : at + 4], targets[at : at + 4]).sum() for at in (0, 4))
    assert float(pieces) == pytest.approx(2 * float(whole), rel=1e-5)


KEYS = ["model=tiny", "model.dtype=float32", "track=none", "trainer.steps=2", "trainer.lr=1e-3", "data.rows=60",
        "data.valid=8", "data.max_length=256", "eval=loss"]  # fmt: skip


def test_a_function_of_a_person_trains_and_is_part_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores, plain = api.run(*KEYS, loss=half), api.run(*KEYS, "name=plain")
    assert scores["train/loss"] == pytest.approx(plain["train/loss"] / 2, rel=1e-3)
    assert scores["base/loss"] == plain["base/loss"]
    (folder,) = (p for p in (tmp_path / "outputs/runs").iterdir() if p.name != "plain")
    told = read_json(folder / "trial.json")
    assert told["loss_source"].startswith("def half(logits, targets):\n")
    assert told["config"]["trainer.loss_sha256"] == losses.give(half)
    monkeypatch.setattr(api.experiment, "_execute", None)
    assert api.run(*KEYS, loss=half) == scores  # the same function, the same folder


def test_another_function_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    api.run(*KEYS, loss=half, folder=tmp_path / "run")

    def whole(logits, targets):
        import torch

        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    with pytest.raises(ConfigError, match=r"trainer\.loss_sha256 '\w+' -> '\w+'"):
        api.run(*KEYS, loss=whole, folder=tmp_path / "run")


def test_a_run_whose_function_is_not_here_is_refused_in_one_line(cli, tmp_path):
    code, _, err = cli(*KEYS, "trainer.loss=own", f"trainer.loss_sha256={'0' * 64}", "name=x")
    assert code == 2
    assert "trainer.loss=own needs the function, which no config holds: ftexp.api.run(loss=function)" in err
    assert not (tmp_path / "outputs").exists()
