"""Several adapters in one pass: against separate peft models, and bit for bit against each of them alone."""

import copy
import importlib
import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ftexp.errors import ConfigError
from ftexp.model import attention, block, linear, packed
from ftexp.model.packed import Adapter, Pack

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 12},
    "Phi3": {"sliding_window": 5},
    "Gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 9, "final_logit_softcapping": 3.0,
               "attn_logit_softcapping": 2.0},
}  # fmt: skip
MEMBERS = [(2, 8, False), (4, 16, False), (3, 8, True), (2, 1, False)]
"""Rank, alpha and whether it is rsLoRA, of each member."""


def exact(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **_):
    """Attention by the book, with a softmax in the format of its inputs: transformers' own rounds to float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return (torch.softmax(scores + attention_mask, -1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("exact", exact)
AttentionMaskInterface.register("exact", eager_mask)


def made(name: str, dtype: torch.dtype, **more):
    """Make a random model of an architecture."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config")
    config = kind(**{**SMALL, **ARCHITECTURES[name], **more}, attn_implementation="exact")
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    return model.requires_grad_(False)


@pytest.fixture
def precise(monkeypatch):
    """Norms in the format of their inputs, as the packed engine takes them: transformers' own round to float32."""

    def normed(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for name in ("Llama", "Mistral", "Qwen2"):
        kind = getattr(
            importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}"), f"{name}RMSNorm"
        )
        monkeypatch.setattr(kind, "forward", normed)


def adapters(base, dropout=0.0, targets="all-linear"):
    """Put each member's adapter on a copy of the base, B drawn too, and take it for the pack."""
    tuned, taken = [], []
    for n, (r, alpha, rs) in enumerate(MEMBERS):
        torch.manual_seed(n)
        lora = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rs, target_modules=targets, task_type="CAUSAL_LM")
        one = get_peft_model(copy.deepcopy(base), lora).to(base.dtype)
        for key, weight in one.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.1)
        weights, scales = packed.taken(one)
        weights = {k: (a.requires_grad_(), b.requires_grad_()) for k, (a, b) in weights.items()}
        tuned.append(one.eval())
        taken.append(Adapter(weights, scales, dropout, torch.Generator().manual_seed(n)))
    return tuned, taken


def rows(count: int, seed: int = 0) -> list[list[list[int]]]:
    """Draw rows of unequal length for each member; some lengths are shared."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [[7, 12, 7], [12, 3], [16], [9, 7, 5, 12]]
    return [[torch.randint(1, 97, (n,), generator=draw).tolist() for n in lengths[m % 4]] for m in range(count)]


def gradients(model, members, texts, training=True):
    """Run one pass and return each member's nats and gradients, as the packed engine does."""
    pack = Pack(model, len(members))
    names = {name for m in members for name in m.weights}
    for m in members:
        for weight in (w for pair in m.weights.values() for w in pair):
            weight.grad = None
    with pack.on(names):
        layout = packed.lay_out(list(zip(members, texts, strict=True)), 0, "cpu", training)
        hidden = pack.hidden(layout, {})
        slope, told = torch.zeros_like(hidden), []
        for mine, begins in zip(texts, layout.begins, strict=True):
            where = torch.tensor([b + n for t, b in zip(mine, begins, strict=True) for n in range(len(t) - 1)])
            goal = torch.tensor([token for t in mine for token in t[1:]])
            nats, slope[0, where] = packed.learned(model, hidden[0, where].detach(), goal, len(goal))
            told.append(nats)
        hidden.backward(slope)
    return told, [{k: (a.grad.clone(), b.grad.clone()) for k, (a, b) in m.weights.items()} for m in members]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("short", "shared"), [(4, [9, 9, 9, 3]), (64, [9, 9, 9, 9])])
def test_attention_equals_that_of_each_row_alone(monkeypatch, window, short, shared):
    """Rows of 9, 7, 8 and 3 tokens, of which three or all are filled up to one length; all tokens have gradients."""
    torch.manual_seed(0)
    monkeypatch.setattr(packed, "SHORT", short)
    lengths, module = [9, 7, 8, 3], torch.nn.Module()
    layout = packed.lay_out([(Adapter({}, {}, 0.0, torch.Generator()), [[1] * n for n in lengths])], 0, "cpu", True)
    assert [(length, filled) for _, length, filled in layout.rows] == list(zip(lengths, shared, strict=True))
    q, k, v = (torch.randn(1, h, 27, 16, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    out, _ = attention.attend(module, q, k, v, None, sliding_window=window, layout=layout)
    g = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), g)
    assert [b.length for b in layout.attended(4, 16, False)] == sorted(set(shared), reverse=True)
    begin, parts = 0, []
    for n in lengths:
        mine = slice(begin, begin := begin + n)
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        parts.append(torch.nn.functional.scaled_dot_product_attention(
            q[:, :, mine], k[:, :, mine], v[:, :, mine], attn_mask=seen, enable_gqa=True))  # fmt: skip
    whole = torch.cat(parts, 2).transpose(1, 2)
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    for mine, wanted in zip(found, torch.autograd.grad(whole, (q, k, v), g), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_those_of_separate_peft_models(name, precise):
    base = made(name, torch.float64)
    tuned, members = adapters(base)
    texts = rows(4)
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


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_as_one_function_is_the_layer_step_by_step(monkeypatch, precise, name, training):
    """Against transformers' own layer with stand-ins for its linear layers; members with dropout and without, with
    adapters on different layers, and with other scales on some."""
    more = {} if name == "Qwen2" else {"rms_norm_eps": 1e-3}
    base = made(name, torch.float64, **more)
    for weight in (w for n, w in base.named_parameters() if "norm" in n or "bias" in n):
        torch.nn.init.normal_(weight, 0.5)
    _, members = adapters(base)
    members[1].weights = {k: w for k, w in members[1].weights.items() if "k_proj" not in k and "down" not in k}
    members[2].weights = {k: w for k, w in members[2].weights.items() if "up_proj" in k}
    members[3].scales = {k: 3.0 if "gate" in k or "v_proj" in k else s for k, s in members[3].scales.items()}
    members[0].dropout = members[2].dropout = 0.4
    states, texts = [m.draw.get_state() for m in members], rows(4)
    told, found = gradients(base, members, texts, training)
    for member, state in zip(members, states, strict=True):
        member.draw.set_state(state)
    whole = []
    monkeypatch.setattr(packed, "fits", lambda module: whole.append(block.fits(module)))
    nats, wanted = gradients(base, members, texts, training)
    assert sum(map(bool, whole)) == 2  # both layers were taken as one function before
    for mine, theirs in zip([*told, *(w for f in found for p in f.values() for w in p)],
                            [*nats, *(w for f in wanted for p in f.values() for w in p)], strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
    assert [set(f) for f in found] == [set(m.weights) for m in members]


@pytest.mark.parametrize(("name", "more", "taken"), [
    ("Llama", {}, True), ("Mistral", {}, True), ("Qwen2", {}, True), ("Llama", {"hidden_act": "gelu"}, False),
    ("Gemma2", {}, False), ("Qwen3", {}, False), ("Phi3", {}, False),
])  # fmt: skip
def test_layers_that_are_taken_as_one_function(name, more, taken):
    base = made(name, torch.float32, **more)
    assert block.fits(base.model.layers[0]) is taken
    packed.check_alike(base, [[3, 4, 5], [7, 8, 9, 10, 11]], 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "threads"), [("Llama", 1), ("Gemma2", 1), ("Gemma2", 2)])
def test_a_member_has_the_same_bits_alone_and_among_sixteen(name, dtype, threads):
    """Widths that are no multiple of a vector, dropout, and rows so short that libraries change their kernel."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        base = made(name, dtype)
        _, members = adapters(base, dropout=0.3)
        texts = rows(4)
        crowd = [copy.copy(members[n % 4]) for n in range(12)]  # sixteen in all
        for n, one in enumerate(crowd):
            one.draw = torch.Generator().manual_seed(100 + n)
            one.weights = {k: tuple(w.detach().clone().requires_grad_() for w in p) for k, p in one.weights.items()}
        states = [m.draw.get_state() for m in members]
        told, found = gradients(base, [*members, *crowd], [*texts, *rows(12, seed=1)])
        for n, member in enumerate(members):
            member.draw.set_state(states[n])
            (nats,), (grads,) = gradients(base, [member], [texts[n]])
            assert torch.equal(nats, told[n])
            assert all(torch.equal(x, y) for k, p in grads.items() for x, y in zip(p, found[n][k], strict=True))
    finally:
        torch.set_num_threads(before)


def changed(base, members, texts) -> bool:
    """Tell whether the first member's gradients differ between alone and together."""
    _, together = gradients(base, members, texts)
    _, alone = gradients(base, members[:1], texts[:1])
    return not all(torch.equal(x, y) for k, p in alone[0].items() for x, y in zip(p, together[0][k], strict=True))


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


def test_dropout_is_that_of_the_formula():
    """The product with dropout, and its gradients, against autograd on the same mask."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((9, 6), (2, 6), (5, 2)))
    draw = torch.Generator().manual_seed(3)
    y = linear._Product.apply(x, layer, [9], [(2, 7, 1.5, 0.4, draw)], a, b)
    kept = torch.rand(5, 6, generator=torch.Generator().manual_seed(3)) >= 0.4
    assert 0 < kept.sum() < 30
    more = 1.5 * (x[2:7] * kept / 0.6) @ a.T @ b.T
    expected = layer(x) + functional.pad(more, (0, 0, 2, 2))
    assert torch.allclose(y, expected, rtol=1e-12)
    slope = torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, (x, a, b), slope), torch.autograd.grad(expected, (x, a, b), slope),
                           strict=True):  # fmt: skip
        assert torch.allclose(got, wanted, rtol=1e-12)


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
