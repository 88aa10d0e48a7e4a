"""Random models of an architecture, and adapters on them for a pack; no tests of its own."""

import copy
import importlib

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ftexp.model import packed
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


def exact_norms(monkeypatch):
    """Norms in the format of their inputs, as the packed engine takes them: transformers' own round to float32."""

    def normed(self, x):
        if not hasattr(self, "variance_epsilon"):  # Gemma's
            return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for name in ARCHITECTURES:
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


def rows(count: int, seed: int = 0, prefix: int = 0) -> list[list[list[int]]]:
    """Draw rows of unequal length for each member, behind a prefix of so many tokens; some lengths are shared."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [[7, 12, 7], [12, 3], [16], [9, 7, 5, 12]]
    first = torch.randint(1, 97, (prefix,), generator=draw).tolist()
    own = [[torch.randint(1, 97, (n,), generator=draw).tolist() for n in lengths[m % 4]] for m in range(count)]
    return [[first + row for row in mine] for mine in own]


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
        for mine, places in zip(texts, layout.own, strict=True):
            where = torch.tensor([row.place(n) for t, row in zip(mine, places, strict=True) for n in range(len(t) - 1)])
            goal = torch.tensor([token for t in mine for token in t[1:]])
            nats, found = packed.learned(model, hidden[0, where].detach(), goal, len(goal))
            slope[0].index_add_(0, where, found)
            told.append(nats)
        hidden.backward(slope)
    return told, [{k: (a.grad.clone(), b.grad.clone()) for k, (a, b) in m.weights.items()} for m in members]


def changed(base, members, texts) -> bool:
    """Tell whether the first member's gradients differ between alone and together."""
    _, together = gradients(base, members, texts)
    _, alone = gradients(base, members[:1], texts[:1])
    return not all(torch.equal(x, y) for k, p in alone[0].items() for x, y in zip(p, together[0][k], strict=True))
