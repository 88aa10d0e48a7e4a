"""Several adapters in one pass: against separate peft models, and bit for bit against each of them alone."""

import copy
import math

import pytest
import torch
from members import ARCHITECTURES, adapters, changed, exact_norms, gradients, made, rows
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ftexp.errors import ConfigError
from ftexp.model import block, linear, packed
from ftexp.model.packed import Pack


@pytest.mark.parametrize("prefix", [0, 10])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_those_of_separate_peft_models(name, prefix, monkeypatch):
    """Also where a member's rows begin alike, which is computed once and supervised in each of them."""
    exact_norms(monkeypatch)
    base = made(name, torch.float64)
    tuned, members = adapters(base)
    texts = rows(4, prefix=prefix)
    told, found = gradients(base, members, texts)
    worst = 0.0
    for one, mine, nats, grads in zip(tuned, texts, told, found, strict=True):
        losses = []
        for text in mine:
            logits = one(input_ids=torch.tensor([text])).logits[0, :-1]
            losses.append(functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="sum"))
        total = torch.stack(losses).sum() / sum(len(t) - 1 for t in mine)
        total.backward()
        assert nats.mean().item() == pytest.approx(total.item(), rel=1e-13)
        layers = dict(one.base_model.model.named_modules())
        for key, pair in grads.items():
            theirs = (layers[key].lora_A["default"].weight.grad, layers[key].lora_B["default"].weight.grad)
            worst = max(worst, *((a - b).norm().item() / b.norm().item() for a, b in zip(pair, theirs, strict=True)))
        assert len(grads) == sum(hasattr(layer, "lora_A") for layer in layers.values())
    assert worst < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dropout", "prefix"), [(0.3, 0), (0.0, 11)])
@pytest.mark.parametrize(("name", "threads"), [("Llama", 1), ("Gemma2", 1), ("Gemma2", 2)])
def test_a_member_has_the_same_bits_alone_and_among_sixteen(name, dtype, threads, dropout, prefix):
    """Widths that are no multiple of a vector, dropout, and rows so short that libraries change their kernel.

    And rows that begin alike: those of a member add up what they ask of it in the same order.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        base = made(name, dtype)
        _, members = adapters(base, dropout=dropout)
        texts = rows(4, prefix=prefix)
        crowd = [copy.copy(members[n % 4]) for n in range(12)]  # sixteen in all
        for n, one in enumerate(crowd):
            one.draw = torch.Generator().manual_seed(100 + n)
            one.weights = {k: tuple(w.detach().clone().requires_grad_() for w in p) for k, p in one.weights.items()}
        states = [m.draw.get_state() for m in members]
        told, found = gradients(base, [*members, *crowd], [*texts, *rows(12, seed=1, prefix=prefix)])
        for n, member in enumerate(members):
            member.draw.set_state(states[n])
            (nats,), (grads,) = gradients(base, [member], [texts[n]])
            assert torch.equal(nats, told[n])
            assert all(torch.equal(x, y) for k, p in grads.items() for x, y in zip(p, found[n][k], strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_are_the_same_at_the_widths_of_a_real_model(dtype, threads):
    """Libraries choose their kernels by size: what holds for 32 columns need not hold for 576, nor on another chip."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        base = made("Llama", dtype, hidden_size=576, intermediate_size=1536, num_hidden_layers=1, head_dim=64)
        _, members = adapters(base)
        texts = [[list(range(1, 1 + n)) for n in lengths] for lengths in ((40, 33, 35), (31, 62), (90,), (45, 46, 47))]
        assert not changed(base, members, texts)
    finally:
        torch.set_num_threads(before)


class Unsteady(TorchDispatchMode):
    """A matrix library whose rounding depends on how many rows there are, as on chips with AMX."""

    def __init__(self, back_alone=False):
        super().__init__()
        self.back_alone = back_alone

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        forth = not args[1].is_contiguous() if len(args) > 1 and isinstance(args[1], torch.Tensor) else True
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out) and not (self.back_alone and forth):
            made.mul_(1 + len(args[0]) * 1e-4)
        return made


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_where_bits_depend_on_the_number_of_rows_each_member_is_multiplied_by_itself(monkeypatch, targets):
    base = made("Llama", torch.float32)
    _, members = adapters(base, targets=targets)
    packed._steady.cache_clear()
    try:
        with Unsteady(back_alone=True):  # of the gradients alone
            assert not packed.steady(base)
        packed._steady.cache_clear()
        with Unsteady():
            assert not packed.steady(base)
            assert not changed(base, members, rows(4))
            assert not Pack(base, 1).apart  # one alone is not asked about
            monkeypatch.setattr(packed, "steady", lambda _: True)  # sabotage
            assert changed(base, members, rows(4))
    finally:
        packed._steady.cache_clear()


def test_functions_are_taken_of_each_member():
    """The last values of a tensor go through another formula than the others; without the stand-in this is seen."""
    torch.manual_seed(0)
    pack, kernel = Pack(made("Llama", torch.float32), 4), torch.nn.SiLU()
    members = adapters(pack.model)[1]
    pack.layout = packed.lay_out(list(zip(members, [[[1] * 17]] * 4, strict=True)), 0, "cpu", True)
    x = 3 * torch.randn(1, 4 * 17, 37)
    alone = [kernel(part) for part in x.split(17, 1)]
    assert torch.equal(packed.Elementwise(kernel, pack)(x), torch.cat(alone, 1))
    assert torch.equal(block._each(kernel, pack.layout, x[0]), torch.cat(alone, 1)[0])
    assert not torch.equal(kernel(x), torch.cat(alone, 1))  # sabotage: all at once


def test_sabotage_few_tokens_are_seen(monkeypatch):
    """A product of one row is another kernel's than a product of many."""
    base = made("Llama", torch.float32, hidden_size=64)
    _, members = adapters(base)
    texts = [[[5, 6]], *rows(3)]
    assert not changed(base, members, texts)
    monkeypatch.setattr(packed, "FEWEST", 0)
    assert changed(base, members, texts)


def test_sabotage_a_shared_generator_is_seen():
    base = made("Llama", torch.float32)
    _, members = adapters(base, dropout=0.3)
    shared = torch.Generator()
    for member in members:
        member.draw = shared
    texts = rows(4)
    shared.manual_seed(0)
    _, together = gradients(base, members, texts)
    shared.manual_seed(0)
    _, alone = gradients(base, members[:1], texts[:1])
    assert not all(torch.equal(x, y) for k, p in alone[0].items() for x, y in zip(p, together[0][k], strict=True))


def test_the_base_is_as_it_was_after_a_pack():
    base = made("Gemma2", torch.float32)
    _, members = adapters(base)
    before = {name: type(m) for name, m in base.named_modules()}
    pack = Pack(base, 2)
    with pytest.raises(RuntimeError, match="stop"), pack.on(set(members[0].weights)):
        assert any(isinstance(m, linear.Linear) for m in base.modules())
        raise RuntimeError("stop")
    assert {name: type(m) for name, m in base.named_modules()} == before
    assert base.config._attn_implementation == "exact"


def test_trained_weights_come_back_into_peft():
    base = made("Phi3", torch.float32)
    tuned, members = adapters(base)
    weights = {k: (a.detach() + 1, b.detach() - 1) for k, (a, b) in members[0].weights.items()}
    packed.put(tuned[0], weights)
    again, scales = packed.taken(tuned[0])
    assert all(torch.equal(x, y) for k, pair in weights.items() for x, y in zip(pair, again[k], strict=True))
    assert set(scales.values()) == {4.0}


def test_scale_of_rslora_is_by_the_root_of_the_rank():
    _, members = adapters(made("Llama", torch.float32))
    assert [*members[2].scales.values()] == pytest.approx([8 / math.sqrt(3)] * len(members[2].scales))


def test_layers_that_are_not_linear_are_refused():
    base = made("Llama", torch.float32)
    one = get_peft_model(base, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match=r"lora.targets must name linear layers .*: model.embed_tokens is Embedding"):
        packed.taken(one)


def test_an_adapter_of_the_head_is_refused():
    base = made("Llama", torch.float32)
    one = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match=r"lora.targets must leave the output head out .* got lm_head"):
        packed.taken(one)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_that_is_computed_alike_is_taken(name):
    packed.check_alike(made(name, torch.float32), [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13]], 0, 1)


def test_a_model_that_does_something_else_behind_its_head_is_refused():
    base = made("Gemma2", torch.float32)
    base.config.final_logit_softcapping = None
    head = base.lm_head.forward
    base.lm_head.forward = lambda h: head(h) * 2
    with pytest.raises(ConfigError, match=r"trainer.engine must be trl: Gemma2ForCausalLM computes something"):
        packed.check_alike(base, [[3, 4, 5], [7, 8, 9, 10]], 0, 1)


def test_a_model_with_dropout_of_its_own_is_refused():
    base = made("Phi3", torch.float32, resid_pdrop=0.1)
    with pytest.raises(ConfigError, match=r"trainer.engine must be trl: the model has dropout of its own, at model"):
        packed.check_alike(base, [[3, 4, 5]], 0, 1)
