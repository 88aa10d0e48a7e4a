"""Token-exact loss and greedy completions: equal for every batch size, padding side and order."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from ftexp import evaluate, model
from ftexp.config import Data, Eval, Gate, Kind, Long, Lora, Model, Quant, Template
from ftexp.data import Row, load, prompts
from ftexp.model import prefix
from ftexp.model import tiny as toy


@pytest.fixture(scope="module")
def base():
    return model.load(Model(kind=Kind.tiny), Quant())


@pytest.fixture(scope="module")
def examples(base):
    return prompts.render(load(Data(rows=120, valid=37)).valid, base.tokenizer, Data(max_length=256))


def by_hand(base, example):
    """One row alone, without padding: log-softmax in float64 at each supervised position."""
    logits = base.model(torch.tensor([example.ids])).logits[0].double()
    start = len(example.prompt)
    picked = logits[start - 1 : len(example.ids) - 1].log_softmax(-1)
    return -picked.gather(1, torch.tensor(example.completion)[:, None]).sum().item()


@pytest.mark.parametrize("batch", [1, 4, 37])
def test_loss_is_the_same_for_every_batch_size_and_by_hand(base, examples, batch):
    table = evaluate.held_out(base.model, base.tokenizer, examples, Eval(batch=batch), "t")
    with torch.no_grad():
        expected = [by_hand(base, e) for e in examples]
    assert [e["nats"] for e in table] == pytest.approx(expected, rel=1e-6)
    assert [e["tokens"] for e in table] == [len(e.completion) for e in examples]
    assert evaluate.summary(table)["loss"] == pytest.approx(
        sum(expected) / sum(len(e.completion) for e in examples), rel=1e-6
    )


def test_sabotage_mean_of_batch_means_depends_on_batch_size(base, examples):
    """What a Trainer reports as eval_loss, on the same numbers: the guard above is not vacuous."""
    table = evaluate.held_out(base.model, base.tokenizer, examples, Eval(), "t")

    def mean_of_means(size):
        parts = [table[n : n + size] for n in range(0, len(table), size)]
        return sum(sum(e["nats"] for e in p) / sum(e["tokens"] for e in p) for p in parts) / len(parts)

    assert abs(mean_of_means(1) - mean_of_means(4)) > 1e-5


def test_loss_is_the_same_where_logits_must_be_split(base, examples, monkeypatch):
    whole = evaluate.held_out(base.model, base.tokenizer, examples, Eval(), "t")
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 4 * 259 * 60)  # room for some 60 tokens
    split = evaluate.held_out(base.model, base.tokenizer, examples, Eval(), "t")
    assert [e["nats"] for e in split] == pytest.approx([e["nats"] for e in whole], rel=1e-6)


def test_uniform_model_has_perplexity_of_its_vocabulary(base, examples):
    fresh = model._load(Model(kind=Kind.tiny), Quant(), "x")
    with torch.no_grad():
        for p in fresh.model.parameters():
            p.zero_()
    table = evaluate.held_out(fresh.model, fresh.tokenizer, examples, Eval(), "t")
    assert evaluate.summary(table)["perplexity"] == pytest.approx(259, rel=1e-6)


def test_supervised_logits_equal_the_full_forward_pass(base):
    hooks = model._hooks(base.model)
    ids, labels = torch.randint(3, 200, (3, 9)), torch.full((3, 9), -100)
    labels[0, 4:8], labels[1, 1:3], labels[2, 0] = ids[0, 4:8], ids[1, 1:3], ids[2, 0]
    logits, targets = evaluate.supervised_logits(base.model, ids, torch.ones_like(ids), labels)
    full = base.model(ids).logits
    expected = torch.cat([full[0, 3:7], full[1, 0:2]])  # position 0 predicts nothing
    torch.testing.assert_close(logits, expected)
    assert torch.equal(targets, torch.cat([ids[0, 4:8], ids[1, 1:3]]))
    assert model._hooks(base.model) == hooks


def test_hook_is_taken_off_after_an_error(base):
    hooks = model._hooks(base.model)
    with pytest.raises(IndexError):
        evaluate.supervised_logits(base.model, torch.tensor([[10**6, 1]]), torch.ones(1, 2), torch.ones(1, 2).long())
    assert model._hooks(base.model) == hooks


def test_completions_are_the_same_alone_and_in_a_batch(base, examples):
    made, settings = lively(base, "keys of all tokens")
    alone, batched = (
        evaluate.write(made, base.tokenizer, [e.prompt for e in examples[:8]], settings, b, "t") for b in (1, 8)
    )
    assert alone == batched
    assert len(set(alone)) == 8
    assert len({len(e.prompt) for e in examples[:8]}) > 1  # unequal prompts, so padding took part


def test_sabotage_right_padding_changes_completions(base, examples, monkeypatch):
    def right(rows, pad, begun):
        ids, mask = left(rows, pad)
        for n, row in enumerate(rows):
            ids[n], mask[n] = ids[n].roll(len(row) - ids.shape[1]), mask[n].roll(len(row) - ids.shape[1])
        return ids, mask

    how = Eval(batch=8, max_new_tokens=12)
    good, left = evaluate.generate(base.model, base.tokenizer, examples[:8], how, "t"), evaluate._left_padded
    monkeypatch.setattr(evaluate, "_left_padded", right)
    assert evaluate.generate(base.model, base.tokenizer, examples[:8], how, "t") != good


@pytest.fixture(scope="module")
def unplaced():
    """A model that is not told where tokens stand, in evaluation, and prompts of unequal length for it."""
    from transformers import MBartConfig, MBartForCausalLM

    torch.manual_seed(0)
    made = MBartForCausalLM(MBartConfig(
        vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64, is_decoder=True,
        max_position_embeddings=64, is_encoder_decoder=False, forced_eos_token_id=None, init_std=0.25,
    ))  # fmt: skip
    return made.eval(), [tuple(3 + (7 * n + 5 * k) % 61 for k in range(n)) for n in (5, 9, 9, 14, 20, 5)]


def test_prompts_of_a_model_without_places_are_never_padded(base, unplaced):
    made, asked = unplaced
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=[1])
    alone = [evaluate.continued(made, base.tokenizer, [a], settings, 1, "t")[0] for a in asked]
    assert evaluate.continued(made, base.tokenizer, asked, settings, 8, "t") == alone


def test_sabotage_padding_that_such_a_model_takes_for_text(base, unplaced, monkeypatch):
    monkeypatch.setattr(evaluate, "_sees_positions", lambda model: True)
    with pytest.raises(AssertionError):
        test_prompts_of_a_model_without_places_are_never_padded(base, unplaced)


def test_generation_stops_at_the_end_token(base, examples, monkeypatch):
    head = base.model.get_output_embeddings()

    def end_only(module, args, out):
        out = torch.full_like(out, -9.0)
        out[..., base.tokenizer.eos_token_id] = 9.0
        return out

    hook = head.register_forward_hook(end_only)
    try:
        assert evaluate.generate(base.model, base.tokenizer, examples[:3], Eval(), "t") == [""] * 3
    finally:
        hook.remove()


class Copied(TorchDispatchMode):
    """Products in which the weights of the head stand once for each row."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.found = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += "bmm" in str(func) and self.vocabulary in args[1].shape
        return func(*args, **(kwargs or {}))


def test_reading_prompts_copies_no_weights_of_the_head(base, examples):
    vocabulary = base.model.config.vocab_size
    with Copied(vocabulary) as ours:
        evaluate.generate(base.model, base.tokenizer, examples[:8], Eval(batch=8, max_new_tokens=2), "t")
    assert ours.found == 0
    head = base.model.get_output_embeddings()
    kept = dict(head._forward_pre_hooks)
    head._forward_pre_hooks.clear()
    try:
        with Copied(vocabulary) as plain:  # PyTorch does it, so the test can fail
            evaluate.generate(base.model, base.tokenizer, examples[:8], Eval(batch=8, max_new_tokens=2), "t")
    finally:
        head._forward_pre_hooks.update(kept)
    assert plain.found == 1


def test_planned_length_is_a_quarter_beyond_the_longest_reference(base, examples):
    longest = max(len(e.completion) for e in examples)
    settings = evaluate.greedy(base.model, base.tokenizer, examples, Eval())
    assert settings.max_new_tokens == longest + longest // 4 + 8
    assert not settings.do_sample
    (written,) = evaluate.continued(base.model, base.tokenizer, [examples[0].prompt], settings, 1, "t")
    assert len(written) == settings.max_new_tokens  # the untrained model never ends


KINDS = {
    "keys of all tokens": ("LlamaConfig", {}, True),
    "keys of a window": ("MistralConfig", {"sliding_window": 6}, True),
    "keys of a window in every other layer": (
        "Gemma2Config",
        {"sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 8, "initializer_range": 0.3},
        True,
    ),
    "a state in place of keys": ("MambaConfig", {"state_size": 4}, False),
    "a state inside of its layers": (
        "RecurrentGemmaConfig",
        {"lru_width": 16, "head_dim": 8, "num_hidden_layers": 3},
        False,
    ),
    "a state that is no cache": ("RwkvConfig", {"attention_hidden_size": 16}, False),
    "a state in every other layer": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, False),
}
"""What a model keeps of the tokens before: its class, and whether rows can leave it."""


def lively(base, kind):
    """Make a model of random weights so large that every prompt is continued otherwise."""
    import transformers

    name, more, _ = KINDS[kind]
    size = {"vocab_size": len(base.tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 1.0, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(2)
    config = getattr(transformers, name)(**{**size, **more})
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ends = list(range(0, len(base.tokenizer), 6))  # one token of six ends a completion
    settings = transformers.GenerationConfig(max_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=ends)
    return made.eval(), settings


def plainly(made, asked, settings):
    """Continue each prompt alone, by transformers' own loop."""
    told = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = made.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        told.append(tuple(out[0, len(prompt) :].tolist()))
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_leave_the_others_as_they_were(kind, base, examples, monkeypatch):
    made, settings = lively(base, kind)
    asked, sizes, real = [e.ids[: 12 + n % 9] for n, e in enumerate(examples)], [], made.generate
    expected = plainly(made, asked, settings)
    assert len({len(told) for told in expected}) > 5  # they end at many places
    assert any(len(told) == 14 for told in expected)  # and some do not
    monkeypatch.setattr(made, "generate", lambda **k: sizes.append(len(k["input_ids"])) or real(**k))
    assert (prefix.cache(made) is not None) == KINDS[kind][2]
    leaves, batch = KINDS[kind][2], 37 if KINDS[kind][2] else 1  # transformers pads no states
    assert evaluate.continued(made, base.tokenizer, asked, settings, batch, "t") == expected
    assert (sizes[0] == 37 and sizes[-1] < 37) if leaves else sizes == [1] * 37


def test_a_model_that_takes_no_cache_writes_as_it_does(base, examples):
    import transformers

    config = transformers.OpenAIGPTConfig(
        vocab_size=len(base.tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=1.0
    )
    made, settings = transformers.OpenAIGPTLMHeadModel(config).eval(), lively(base, "keys of all tokens")[1]
    asked = [e.ids[:12] for e in examples[:4]]
    assert prefix.cache(made) is None
    assert evaluate.continued(made, base.tokenizer, asked, settings, 4, "t") == plainly(made, asked, settings)


def test_a_model_that_takes_another_cache_in_place_of_ours_reads_its_rows_anew(base, examples, monkeypatch):
    from transformers import DynamicCache

    made, settings = lively(base, "keys of all tokens")
    asked, calls, real = [e.prompt for e in examples], [], made.generate
    expected = plainly(made, asked, settings)

    def swapped(**given):
        calls.append("past_key_values" in given)
        told = real(**given)
        told.past_key_values = DynamicCache()
        return told

    monkeypatch.setattr(made, "generate", swapped)
    assert evaluate.continued(made, base.tokenizer, asked, settings, 37, "t") == expected
    assert calls == [True, False]


def test_sabotage_keys_of_other_rows_change_completions(base, examples, monkeypatch):
    from transformers import DynamicCache

    made, settings = lively(base, "keys of all tokens")
    asked, real = [e.prompt for e in examples], DynamicCache.batch_select_indices
    good = evaluate.continued(made, base.tokenizer, asked, settings, 37, "t")
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda self, rows: real(self, rows.roll(1)))
    assert evaluate.continued(made, base.tokenizer, asked, settings, 37, "t") != good


@pytest.fixture
def narrow(base, monkeypatch):
    """A machine whose memory holds three rows."""
    asked = []

    def look(module, args, kwargs):
        asked.append(len(kwargs["input_ids"]))
        if asked[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = base.model.register_forward_pre_hook(look, with_kwargs=True)
    yield asked
    hook.remove()


def test_where_memory_runs_out_fewer_rows_are_scored_at_a_time(base, examples, request, capfd):
    how = Eval(max_new_tokens=6, batch=37)
    whole = evaluate.score(base.model, base.tokenizer, examples, how, "t")
    asked = request.getfixturevalue("narrow")
    cut = evaluate.score(base.model, base.tokenizer, examples, how, "t")
    assert [e["prediction"] for e in cut.table] == [e["prediction"] for e in whole.table]
    assert [e["nats"] for e in cut.table] == pytest.approx([e["nats"] for e in whole.table], rel=1e-6)
    assert max(asked) > 3  # it did run out
    assert "out of memory: at most 2 rows are scored at a time" in capfd.readouterr().err


def test_scoring_leaves_the_mode_as_it_was(base, examples):
    with model.adapted(base, Lora(r=2, dropout=0.5), 0) as tuned:
        tuned.train()
        one = evaluate.score(tuned, base.tokenizer, examples[:4], Eval(max_new_tokens=4), "t")
        assert tuned.training
        again = evaluate.score(tuned, base.tokenizer, examples[:4], Eval(max_new_tokens=4), "t")
    assert one == again  # dropout was off


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: empty thoughts stand before the answer once it is known."""


def test_what_the_template_writes_before_an_answer_is_no_part_of_it(base, monkeypatch):
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = THINKING
    how = Data(rows=120, valid=9, max_length=256, template=Template.model)
    examples = prompts.render(load(how).valid, tokenizer, how)
    learned = [tokenizer.decode(list(e.completion), skip_special_tokens=True) for e in examples]
    assert all(text.startswith("<think>\n\n</think>\n\n") for text in learned)  # and supervised
    monkeypatch.setattr(evaluate, "write", lambda *_, **__: learned)
    scored = evaluate.score(base.model, tokenizer, examples, Eval(), "t")
    assert scored.scores["exact_match"] == 1.0
    assert [e["prediction"].strip() for e in scored.table] == [e.row.completion.strip() for e in examples]


def test_thoughts_of_the_row_itself_are_a_part_of_it(base):
    row = Row("p", "<think>why</think>so", "t:1")
    [example] = prompts.render((row,), base.tokenizer, Data(max_length=256))
    assert evaluate.opening(base.tokenizer, example) == ""
    assert evaluate.answer("<think>no</think>so", "") == "<think>no</think>so"


def entry(prediction, reference, nats, tokens):
    known = evaluate.Seen(frozenset({"copied it is"}))
    size = len(reference.encode())
    table = {"nats": nats, "tokens": tokens, "cut": 2, "bytes": size, "reference": reference, "prediction": prediction}
    return table | evaluate.compare(prediction, reference, known, Eval())


def test_summary_by_hand():
    rows = [entry("ab", "ab", math.log(2) * 3, 3), entry("", "cd", math.log(4), 1)]
    scores = evaluate.summary(rows)
    assert scores["perplexity"] == pytest.approx(2**1.25)
    assert scores["bits_per_byte"] == pytest.approx(5 / 4)
    assert scores["exact_match"] == scores["chrf"] == scores["rouge_l"] == 0.5  # an empty answer is wrong, not left out
    assert (scores["unparsable"], scores["memorised"], scores["distinct_1"]) == (0.5, 0, 1)
    assert (scores["rows"], scores["tokens"], scores["tokens_cut"]) == (2, 4, 4)


def test_copies_of_training_completions_are_counted(base, examples):
    known, texts = evaluate.seen(examples, [], Eval()), (examples[3].row.completion.upper(), "new")
    scored = [evaluate.compare(text, "x", known, Eval())["memorised"] for text in texts]
    assert scored == [1, 0]


@pytest.mark.parametrize(("empty", "warned"), [(2, False), (3, True)])
def test_many_empty_completions_are_told(base, examples, monkeypatch, capfd, empty, warned):
    monkeypatch.setattr(evaluate, "generate", lambda *_: [" "] * empty + ["words"] * (10 - empty))
    scored = evaluate.score(base.model, base.tokenizer, examples[:10], Eval(), "valid")
    assert scored.scores["unparsable"] == empty / 10
    assert ("warning: 30% of the completions of valid" in capfd.readouterr().err) == warned


def test_completions_that_are_lists_of_labels(base, monkeypatch):
    """Four rows by hand: right in another order, one too many, one missing and an unknown one, nothing known."""
    references = ["comedy, drama", "drama", "comedy, drama", "horror"]
    written = ["Drama, comedy", "drama, comedy", "comedy, jazz", "I do not know"]
    rows = [Row("p", text, f"t:{n}") for n, text in enumerate(references)]
    examples = prompts.render(tuple(rows), base.tokenizer, Data(max_length=256))
    how = Eval(labels=", ")
    monkeypatch.setattr(evaluate, "generate", lambda *_: written)
    scored = evaluate.score(base.model, base.tokenizer, examples, how, "t", evaluate.seen([], examples, how))
    told = scored.scores
    assert told["unparsable"] == told["subset_accuracy"] == 1 / 4
    assert told["f1_samples"] == pytest.approx((1 + 2 / 3 + 1 / 2 + 0) / 4)
    assert told["jaccard_samples"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 0) / 4)
    assert told["f1_micro"] == pytest.approx(2 * 4 / (2 * 4 + 3 + 2))  # hits 2 1 1 0, extra 0 1 1 1, missed 0 0 1 1
    # comedy: 2 hits, 1 extra; drama: 2 hits, 1 missed; horror: 1 missed
    assert told["f1_macro"] == pytest.approx((4 / 5 + 4 / 5 + 0) / 3)
    assert (told["labels"], told["labels_undefined"]) == (3, 0)
    assert [row["label"] for row in scored.labels] == ["comedy", "drama", "horror"]


def test_tokens_that_were_cut_are_counted(base):
    how = Data(rows=120, valid=9, max_length=110, long=Long.cut, allow=[Gate.no_eos])
    whole = prompts.render(load(how).valid, base.tokenizer, Data(max_length=999))
    cut = prompts.render(load(how).valid, base.tokenizer, how)
    told = evaluate.summary(evaluate.held_out(base.model, base.tokenizer, cut, Eval(), "t"))
    assert told["tokens_cut"] == sum(e.supervised for e in whole) - told["tokens"] > 0
