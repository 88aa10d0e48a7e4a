"""A decoder layer as one function, against the layer step by step."""

import pytest
import torch
from members import adapters, exact_norms, gradients, made, rows

from ftexp.model import block, packed
from ftexp.model.packed import Adapter, Pack


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_as_one_function_is_the_layer_step_by_step(monkeypatch, name, training):
    """Against transformers' own layer with stand-ins for its linear layers; members with dropout and without, with
    adapters on different layers, and with other scales on some."""
    exact_norms(monkeypatch)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_a_layer_as_one_function_rounds_as_the_layer_does(monkeypatch, dtype, name):
    """So the check of a model against its own logits stays as sharp in 16 bits, where other roundings are percents."""
    base = made(name, dtype, num_hidden_layers=4)
    for weight in (w for n, w in base.named_parameters() if "norm" in n):
        torch.nn.init.normal_(weight, 1, 0.3)
    pack = Pack(base, 1)

    def hidden():
        with torch.no_grad(), pack.on(set()):
            layout = packed.lay_out([(Adapter({}, {}, 0.0, torch.Generator()), rows(4)[3])], 0, "cpu", False)
            return pack.hidden(layout, {})

    mine = hidden()
    monkeypatch.setattr(packed, "fits", lambda module: False)
    assert torch.equal(mine, hidden())


@pytest.mark.parametrize(("name", "more", "taken"), [
    ("Llama", {}, True), ("Mistral", {}, True), ("Qwen2", {}, True), ("Llama", {"hidden_act": "gelu"}, False),
    ("Gemma2", {}, False), ("Qwen3", {}, False), ("Phi3", {}, False),
])  # fmt: skip
def test_layers_that_are_taken_as_one_function(name, more, taken):
    base = made(name, torch.float32, **more)
    assert block.fits(base.model.layers[0]) is taken
    packed.check_alike(base, [[3, 4, 5], [7, 8, 9, 10, 11]], 0, 1)
