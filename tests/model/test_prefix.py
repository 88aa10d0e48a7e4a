"""The prefix that rows share is read once, and changes neither their losses nor what is written after them."""

import pytest
import torch
from members import made
from torch.nn import functional

from ftexp import evaluate
from ftexp.config import Eval
from ftexp.data.prompts import Example
from ftexp.data.shapes import Row
from ftexp.model import prefix

FIRST = tuple(range(40, 60))
"""Twenty tokens in front of all rows."""


def example(prompt, completion, earlier=()):
    return Example(Row("", "", "test:0"), prompt, completion, earlier)


def rows(count: int = 9) -> list[Example]:
    """Draw rows of unequal length behind the same tokens."""
    draw = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 97, (2 + n % 4,), generator=draw).tolist() for n in range(2 * count)]
    return [example((*FIRST, *a), tuple(b)) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]


class Tokenizer:
    pad_token_id, eos_token_id = 0, 2


def losses(model, examples):
    return [e["nats"] for e in evaluate.held_out(model, Tokenizer(), examples, Eval(), "t")]  # type: ignore


def by_hand(model, one):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one.ids])).logits[0, :-1].double()
    return functional.cross_entropy(logits, torch.tensor(one.labels[1:]), reduction="sum", ignore_index=-100).item()


@pytest.fixture
def read():
    """Return a function that counts the tokens which a model reads from then on."""

    def counted(model):
        told = []
        model.get_input_embeddings().register_forward_hook(lambda m, given, out: told.append(given[0].numel()))
        return told

    return counted


TINY = {
    "vocab_size": 97, "hidden_size": 32, "n_embd": 32, "word_embed_proj_dim": 32, "d_model": 32, "intermediate_size": 48,
    "n_inner": 48, "ffn_dim": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "max_position_embeddings": 128, "n_positions": 128,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.5, "init_std": 0.5, "hidden_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
"""Sizes by the names that configs of transformers give them."""


def small(kind: str, **more):
    """Make a small random model of a kind, lively enough that tokens before matter."""
    import transformers

    usual = transformers.AutoConfig.for_model(kind)
    names = {*vars(usual), *type(usual).attribute_map}
    config = transformers.AutoConfig.for_model(kind, **{**{k: v for k, v in TINY.items() if k in names}, **more})
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for weight in model.parameters():
        if weight.dim() > 1 and weight.std() < 0.1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.requires_grad_(False)


def settings():
    from transformers import GenerationConfig

    ends = list(range(1, 97, 5))
    return GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=ends)


def written(model, asked, batch):
    return evaluate.continued(model, Tokenizer(), asked, settings(), batch, "t")  # type: ignore


@pytest.mark.parametrize("kind", sorted(prefix.KNOWN))
def test_losses_and_completions_are_those_of_whole_rows(kind, read):
    """Prompts of unequal length, whose padding stands behind the prefix; rows end at different places."""
    more = {"sliding_window": None} if kind in ("mistral", "mixtral", "phi3", "starcoder2", "phimoe") else {}
    model, examples = small(kind, **more), rows()
    asked = [
        *(e.prompt for e in examples),
        examples[0].prompt,
        examples[0].prompt[:-1],
    ]  # alike, and one within another
    expected, alone = [by_hand(model, e) for e in examples], [written(model, [a], 1)[0] for a in asked]
    assert len({len(told) for told in alone}) > 1 or len(set(alone)) > 1
    told = read(model)
    assert losses(model, examples) == pytest.approx(expected, rel=1e-5)
    assert told[0] == len(FIRST)
    padded = max(len(e.ids) for e in examples) * len(examples)
    assert sum(told) < padded / 2  # a quarter of a row is its own
    del told[:]
    assert written(model, asked, len(asked)) == alone
    assert told[0] == len(FIRST)


OTHERS = {
    "tokens see what follows": ("bert", {"is_decoder": False}),
    "and so where a config says it": ("llama", {"is_causal": False}),
    "positions that begin elsewhere": ("roberta", {"is_decoder": True}),
    "a window of places": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "a window of keys": ("mistral", {"sliding_window": 6}),
    "windows in every other layer": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "positions that move in longer rows": ("llama", {"max_position_embeddings": 16, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "and others of that kind": ("phi3", {"original_max_position_embeddings": 22, "sliding_window": None,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
                            "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
                            "original_max_position_embeddings": 22}}),
    "what is kept is no key": ("mamba", {"state_size": 4}),
}  # fmt: skip


@pytest.mark.parametrize("why", OTHERS)
def test_other_models_read_whole_rows(why, read, monkeypatch):
    """And where they did not, losses or completions would be others: each of these has a reason to be here."""
    kind, more = OTHERS[why]
    model, examples = small(kind, **more), rows()
    expected, told = [by_hand(model, e) for e in examples], read(model)
    assert prefix.shared(model, [e.ids for e in examples], 99, 30) == 0
    if "longer rows" not in why and "of that kind" not in why:  # whose own batches differ from rows alone
        assert losses(model, examples) == pytest.approx(expected, rel=1e-4)
        assert min(told) > len(FIRST)


def test_sabotage_places_that_begin_anew_behind_what_was_read(monkeypatch):
    model, examples = made("Llama", torch.float32, initializer_range=1.0), rows()
    real = evaluate.supervised_logits

    def shifted(scored, ids, mask, labels, positions=None, past=None):
        positions = None if past is None else torch.arange(ids.shape[1]).expand(*ids.shape)
        return real(scored, ids, mask, labels, positions, past)

    expected = [by_hand(model, e) for e in examples]
    monkeypatch.setattr(evaluate, "supervised_logits", shifted)
    assert losses(model, examples) != pytest.approx(expected, rel=1e-3)


def test_what_is_supervised_is_read_in_each_row(read):
    """Answers of earlier turns that rows share are predicted in each of them, the first token too."""
    model = made("Llama", torch.float32)
    examples = [example(e.prompt, e.completion, ((15, 18),)) for e in rows()]
    expected, told = [by_hand(model, e) for e in examples], read(model)
    assert losses(model, examples) == pytest.approx(expected, rel=1e-5)
    assert told[0] == 14
    assert all(e.labels[15:18] == list(FIRST[15:18]) for e in examples)


def test_where_it_is_not_worth_it_or_depends_on_what_follows_rows_are_read_whole():
    llama, texts = made("Llama", torch.float32), [e.ids for e in rows()]
    width = max(map(len, texts))
    assert prefix.shared(llama, texts, 99, width) == 20
    assert prefix.shared(llama, texts, 12, width) == 12
    assert prefix.shared(llama, texts, 3, width) == 0  # a tenth of what is read
    assert prefix.shared(llama, texts[:1], 99, width) == 0
    assert prefix.shared(llama, [*texts, [1, 2, 3]], 99, width) == 0


def test_code_of_ones_own_under_a_known_name_reads_whole_rows():
    from transformers import LlamaForCausalLM

    class Own(LlamaForCausalLM):
        pass

    texts = [e.ids for e in rows()]
    own = Own(small("llama").config).eval()
    assert own.config.model_type == "llama"
    assert prefix.shared(own, texts, 99, max(map(len, texts))) == 0


def test_what_shares_a_model_out_to_devices_is_seen_through():
    llama, texts = made("Llama", torch.float32), [e.ids for e in rows()]
    outer = torch.nn.Module()
    outer.module = llama
    assert prefix.shared(outer, texts, 99, max(map(len, texts))) == 20  # type: ignore


def test_no_logits_are_kept_of_what_is_read(monkeypatch):
    llama, seen = made("Llama", torch.float32), []
    llama.get_output_embeddings().register_forward_hook(lambda m, given, out: seen.append(out.shape[1]))
    prefix.read(llama, torch.tensor(FIRST))
    assert seen == [1]


def test_each_prompt_keeps_a_token_of_its_own(read):
    """One that is the prefix itself, and prompts that are all the same."""
    model = small("llama")
    for asked in ([FIRST, *(e.prompt for e in rows(3))], [FIRST] * 3):
        alone = [written(model, [a], 1)[0] for a in asked]
        told = read(model)
        assert written(model, asked, 4) == alone
        assert told[0] == len(FIRST) - 1
