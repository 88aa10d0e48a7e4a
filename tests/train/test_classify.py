"""Classification: known losses, padding, accumulation, thresholds from other rows, and the baseline beside it."""

import json
import math
import random

import encoders
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.utils.class_weight import compute_class_weight

from ftexp import data, experiment, labels, model
from ftexp import trained as trained_run
from ftexp.data import Row
from ftexp.errors import DataError, MachineError, Preempted
from ftexp.files import read_json
from ftexp.train import checkpoints, classify
from ftexp.train.control import Control

WORDS = {"space": ["rocket", "planet"], "love": ["kiss", "heart"], "crime": ["thief", "murder"]}


@pytest.fixture
def genres(tiny, tmp_path):
    """Return a function that composes a classifier of texts whose words give their genres away."""
    r, rows = random.Random(0), []
    for n in range(120):
        told = r.sample(list(WORDS), r.choice([1, 2]))
        rows.append(
            {"text": f"{n}: " + " and ".join(r.choice(WORDS[t]) for t in told), "many": ", ".join(told), "one": told[0]}
        )
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def build(*given, column="many"):
        return tiny("data=jsonl", f"data.path={tmp_path}/rows.jsonl", "data.prompt='{text}'",
                    f"data.completion='{{{column}}}'", "data.valid=40", "data.rows=120",
                    "data.allow=[leaks]", "trainer.kind=classify", *given)  # fmt: skip

    return build


def parts(run):
    train, valid, known = experiment.classified(run, data.load(run.data))
    return model.load(run.model, run.quant, len(known)), train, valid, known


def trained(run, folder, reports=None):
    base, train, valid, _ = parts(run)
    told = [] if reports is None else reports
    with model.adapted(base, run.lora, run.seed) as tuned:
        classify.train(
            run,
            base,
            tuned,
            train,
            valid,
            checkpoints.store(folder / "t", {}),
            lambda v, s: told.append((s, v)),
            Control(),
        )
        return {k: v.clone() for k, v in tuned.state_dict().items() if "lora_" in k or "modules_to_save" in k}


@pytest.mark.parametrize(("given", "column", "expected"), [((), "many", 2), (("trainer.multi_label=false",), "one", 3)])
def test_first_loss_is_known(genres, tmp_path, given, column, expected):
    """The head starts at zero: every label is a fair coin, or each of three labels has one third."""
    reports = []
    trained(genres("trainer.steps=1", *given, column=column), tmp_path, reports)
    assert reports[0][1]["train/loss"] == pytest.approx(math.log(expected), abs=1e-5)


def test_classifier_learns_and_its_files_say_so(genres, tmp_path):
    run = genres("trainer.steps=40", "trainer.batch=16", "objectives=[valid/roc_auc_macro]")
    experiment.check(run, None)
    experiment.prepare(run)
    scores = experiment.execute(run, tmp_path / "a", "x")
    assert scores["valid/loss"] < 0.55 < math.log(2)
    assert scores["valid/roc_auc_macro"] > 0.8
    assert scores["tfidf/f1_macro"] > 0.9  # the words give it away
    kept, rows = read_json(tmp_path / "a" / "trial.json"), read_json(tmp_path / "a" / "labels.json", of=list)
    assert kept["labels"] == sorted(WORDS) == [row["label"] for row in rows]
    assert kept["thresholds"] == {row["label"]: row["threshold"] for row in rows}
    assert all(0 < limit < 1 for limit in kept["thresholds"].values())


@pytest.mark.parametrize("given", [(), ("trainer.multi_label=false",)])
def test_saved_adapter_and_head_give_the_scores_that_were_reported(genres, tmp_path, given):
    from peft import PeftModel

    run = genres("trainer.steps=6", *given, column="one")
    scores = experiment.execute(run, tmp_path / "a", "x")
    _, _, valid, known = parts(run)
    fresh = model._load(run.model, run.quant, "fresh", len(known))
    loaded = PeftModel.from_pretrained(fresh.model, tmp_path / "a" / "adapter")
    told = classify.logits(loaded, fresh.tokenizer, valid, run.eval, "again")
    again, _ = classify.score(told, valid, known, run.trainer.multi_label)
    assert again.scores == {k.removeprefix("valid/"): v for k, v in scores.items() if k.startswith("valid/")}


def test_base_is_as_before_and_the_same_run_gives_the_same_bits(genres, tmp_path):
    run = genres("trainer.neftune=5", "lora.dropout=0.1")
    base = parts(run)[0]
    one = trained(run, tmp_path)
    assert parts(run)[0] is base  # the head was put back, or the weights would differ
    two = trained(run, tmp_path)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any("modules_to_save" in k and v.abs().max() > 0 for k, v in one.items())


SGD = ("trainer.steps=2", "trainer.optimizer=sgd", "trainer.lr=0.5", "trainer.max_grad_norm=0", "model.dtype=float32",
       "trainer.warmup=0", "trainer.class_weights=true")  # fmt: skip


def test_accumulation_changes_nothing(genres, tmp_path):
    whole = trained(genres(*SGD, "trainer.batch=8"), tmp_path)
    pieces = trained(genres(*SGD, "trainer.batch=2", "trainer.accumulation=4"), tmp_path)
    assert max(v.abs().max() for k, v in whole.items() if "modules_to_save" in k) > 1e-3
    assert max((whole[k] - pieces[k]).abs().max() for k in whole) < 1e-6


def test_sabotage_mean_over_each_piece_is_another_step(genres, tmp_path, monkeypatch):
    whole = trained(genres(*SGD, "trainer.batch=8"), tmp_path)
    honest = classify.decisions
    monkeypatch.setattr(classify, "decisions", lambda logits, *rest: honest(logits, *rest) * (8 / len(logits)))
    pieces = trained(genres(*SGD, "trainer.batch=2", "trainer.accumulation=4"), tmp_path)
    assert max((whole[k] - pieces[k]).abs().max() for k in whole) > 1e-4


def test_logits_are_the_same_alone_and_in_a_batch(genres):
    run = genres("model.dtype=float32", "eval.batch=1")
    base, _, valid, _ = parts(run)
    torch.nn.init.normal_(base.model.score.weight, generator=torch.Generator().manual_seed(0))
    try:
        alone = classify.logits(base.model, base.tokenizer, valid, run.eval, "t")
        run.eval.batch = 37
        batched = classify.logits(base.model, base.tokenizer, valid, run.eval, "t")
        first = base.model(torch.tensor([valid[0].ids])).logits[0]
    finally:
        torch.nn.init.zeros_(base.model.score.weight)
    assert len({len(e.ids) for e in valid}) > 1
    torch.testing.assert_close(alone, batched, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone[0], first.double(), rtol=1e-5, atol=1e-6)


def rows_of(*sets):
    return [classify.Example(Row("x", ", ".join(sorted(s)), f"t:{n}"), (5,), frozenset(s)) for n, s in enumerate(sets)]


def test_loss_equals_log_loss_of_sklearn():
    r = torch.Generator().manual_seed(0)
    told = torch.randn(20, 3, generator=r, dtype=torch.float64)
    known, draw = ["a", "b", "c"], random.Random(0)
    many = rows_of(*[{name for name in known if draw.random() < 0.4} for _ in range(20)])
    truth = np.array([[name in e.labels for name in known] for e in many])
    expected = log_loss(truth.ravel(), told.sigmoid().numpy().ravel())
    assert classify.loss(told, many, known, True) == pytest.approx(expected, abs=1e-9)
    one = rows_of(*[{draw.choice(known)} for _ in range(20)])
    expected = log_loss([next(iter(e.labels)) for e in one], told.softmax(-1).numpy(), labels=known)
    assert classify.loss(told, one, known, False) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("many", [True, False])
def test_roc_auc_ranks_by_logits_that_saturate(many):
    """A sure head's shares are all 1.0: rows tied at 0.5 that its logits order without a fault."""
    rows = rows_of(*[{"a"}] * 2, *[{"b"}] * 2)
    sure = torch.tensor([[50.0, 45.0, 40.0, 38.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64).T
    found, _ = classify.score(sure, rows, ["a", "b"], many, {"a": 0.5, "b": 0.5} if many else None)
    assert found.labels[0]["roc_auc"] == 1.0
    shares = sure.sigmoid() if many else sure.softmax(-1)
    assert labels.roc_auc([True, True, False, False], shares[:, 0].tolist()) == 0.5


@pytest.mark.parametrize("many", [True, False])
def test_roc_auc_equals_sklearn_on_shares_that_do_not_saturate(many):
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 60)
    logits = torch.tensor(rng.normal(0, 2, (60, 3)) + 1.5 * np.eye(3)[truth], dtype=torch.float64)
    known, limits = ["a", "b", "c"], dict.fromkeys("abc", 0.5)
    found, _ = classify.score(logits, rows_of(*({known[n]} for n in truth)), known, many, limits if many else None)
    shares = (logits.sigmoid() if many else logits.softmax(-1)).numpy()
    one_hot = np.eye(3, dtype=int)[truth]
    for name in ("macro", "micro"):
        assert found.scores[f"roc_auc_{name}"] == pytest.approx(roc_auc_score(one_hot, shares, average=name), abs=1e-12)
    for n, line in enumerate(found.labels):
        assert line["roc_auc"] == pytest.approx(roc_auc_score(one_hot[:, n], shares[:, n]), abs=1e-12)


def test_log_odds_are_those_of_the_shares():
    logits = torch.tensor(np.random.default_rng(0).normal(0, 3, (20, 4)))
    shares = logits.softmax(-1)
    assert torch.allclose(classify.odds(logits, many=False), shares.log() - (1 - shares).log(), atol=1e-9)
    endless = torch.tensor([[math.inf, -math.inf, 2.0]])
    assert classify.odds(endless, many=True).isfinite().all() and classify.odds(endless, many=True)[0, 2] == 2
    assert classify.odds(torch.tensor([[0.0, -math.inf, 2.0]]), many=False).isfinite().all()
    assert classify.odds(torch.tensor([[3.0]]), many=False).tolist() == [[3.0]]


def test_class_weights():
    one = rows_of({"a"}, {"a"}, {"a"}, {"b"})
    balanced = compute_class_weight("balanced", classes=np.array(["a", "b"]), y=["a", "a", "a", "b"])
    assert classify.class_weights(one, ["a", "b"], False).tolist() == pytest.approx(balanced.tolist())
    assert classify.class_weights(one, ["a", "b", "c"], True).tolist() == pytest.approx([1 / 3, 3, 1])


def test_thresholds_of_other_rows_are_used_as_they_are():
    rows, told = rows_of({"a"}, {"a"}, set()), torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    scored, limits = classify.score(told, rows, ["a"], True, {"a": 0.6})  # shares .5, .73, .88
    assert [row["prediction"] for row in scored.table] == ["", "a", "a"]
    assert limits == {"a": 0.6} and scored.labels[0]["threshold"] == 0.6


def chance(seed):
    r = random.Random(seed)
    known = [f"l{n}" for n in range(20)]
    return (
        [{n for n in known if r.random() < 0.1} for _ in range(200)],
        [[r.random() for _ in known] for _ in range(200)],
        known,
    )


def gain_of_cross_decisions():
    gains = []
    for seed in range(6):
        truth, shares, known = chance(seed)
        ways = (classify.cross_decided(truth, shares, known), labels.decide(shares, dict.fromkeys(known, 0.5)))
        crossed, half = (labels.macro(labels.f1, truth, way, known)[0] for way in ways)
        gains.append(crossed - half)
    return sum(gains) / len(gains)


def test_thresholds_from_other_rows_gain_nothing_from_chance():
    assert gain_of_cross_decisions() < 0.01


def test_sabotage_thresholds_from_the_same_rows_gain_from_chance(monkeypatch):
    monkeypatch.setattr(
        classify,
        "cross_decided",
        lambda truth, shares, known: labels.decide(shares, labels.thresholds(truth, shares, known)),
    )
    assert gain_of_cross_decisions() > 0.03


def test_baseline_knows_words_and_frequencies():
    texts = [
        ("red apple", {"fruit", "thing"}),
        ("red brick", {"thing"}),
        ("green apple", {"fruit", "thing"}),
        ("grey brick", {"thing"}),
    ] * 5
    rows = [classify.Example(Row(text, "", f"t:{n}"), (5,), frozenset(told)) for n, (text, told) in enumerate(texts)]
    told = classify.baseline(rows, rows[:2], ["fruit", "never", "thing"], True)
    assert told[0, 0] > 0 > told[1, 0]
    assert told[0].sigmoid()[1:].tolist() == pytest.approx([1 / 40, 39 / 40])  # never and always, half a row away
    one = [classify.Example(e.row, e.ids, e.labels & {"fruit"} or frozenset({"stone"})) for e in rows]
    shares = classify.baseline(one, one[:2], ["fruit", "stone", "unseen"], False).exp()
    assert shares.argmax(-1).tolist() == [0, 1]


@pytest.mark.parametrize("asked", ["\U0001f600", "a b", "", "two words"])
def test_baseline_of_texts_without_words_tells_frequencies(asked):
    texts = [("\U0001f600", {"a"}), ("b", {"a"}), ("!", {"a"}), ("c d", {"b"})] * 5
    rows = [classify.Example(Row(text, "", f"t:{n}"), (5,), frozenset(told)) for n, (text, told) in enumerate(texts)]
    valid = [classify.Example(Row(asked, "", "t:v"), (5,), frozenset({"a"}))]
    told = classify.baseline(rows, valid, ["a", "b", "c"], True)
    assert told.sigmoid().tolist() == [pytest.approx([0.75, 0.25, 1 / 40])]
    told = classify.baseline(rows, valid, ["a", "b", "c"], False)
    assert told.exp().tolist() == [pytest.approx([0.75, 0.25, 1 / 40])]


@pytest.mark.parametrize(
    ("text", "told", "given", "message"),
    [
        (
            "fine",
            "a, b",
            ("trainer.multi_label=false",),
            r"one label \(trainer.multi_label=false\), got 'a, b'; eval\.labels='\|' takes commas as part of a label$",
        ),
        ("fine", "a|b", ("trainer.multi_label=false", "eval.labels='|'"), r"got 'a\|b'$"),
        ("fine", " ,", (), r"x:1: the completion must name a label"),
        ("x" * 300, "a", (), r"x:1: a row must be at most data\.max_length=256 tokens, this one has 300"),
        ("stop <|endoftext|>", "a", (), "holds the padding token"),
    ],
)
def test_row_that_cannot_be_classified_is_refused(genres, text, told, given, message):
    with pytest.raises(DataError, match=message):
        classify.render([Row(text, told, "x:1")], model.tokenizer(genres().model), genres(*given))


def worded():
    """A tokenizer with a token at either end of a text, as BERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, **{f"w{n}": 4 + n for n in range(40)}},
                                      unk_token="[UNK]"))  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]")  # fmt: skip


@pytest.mark.parametrize("side", ["right", "left"])
def test_cut_text_keeps_its_first_tokens_and_those_around_it(genres, side, capsys):
    tokenizer, run = worded(), genres("data.long=cut", "data.max_length=10")
    tokenizer.truncation_side = side
    text = " ".join(f"w{n}" for n in range(30))
    rows = [Row("w1 w2", "a", "x:1"), Row(text, "b", "x:2"), Row(text[:-3], "b", "x:3")]
    short, long, other = classify.render(rows, tokenizer, run)
    assert (short.ids, short.over) == ((1, 5, 6, 2), 0)
    assert (long.ids, long.over, other.over) == ((1, *range(4, 12), 2), 22, 21)
    assert (tokenizer.truncation_side, tokenizer.backend_tokenizer.truncation) == (side, None)
    told = " ".join(capsys.readouterr().err.split())
    assert "cut: 2 of 3 rows have more than data.max_length=10 tokens, the first is x:2" in told


def test_dropped_texts_are_counted_and_more_than_a_twentieth_is_refused(genres, tmp_path, capsys):
    rows = [Row(f"w{n}", "a", f"x:{n}") for n in range(39)] + [Row("w1 [PAD] " * 9, "b", "x:39")]
    run = genres("data.long=drop", "data.max_length=10")
    assert [e.row for e in classify.render(rows, worded(), run)] == rows[:39]
    told = " ".join(capsys.readouterr().err.split())
    assert "left out: 1 of 40 rows have more than data.max_length=10 tokens, the first is x:39" in told
    with pytest.raises(
        DataError, match=r"x:39: 1 of 11 rows have more than .*; more than 5% may be lost with data\.allow"
    ):
        classify.render(rows[29:], worded(), run)


def test_run_of_cut_or_dropped_texts_has_what_its_facts_say(genres, tmp_path):
    """A token of this tokenizer is a byte: texts of two words are longer than those of one."""
    least = min(len(row.prompt) for row in data.load(genres().data).train if "and" in row.prompt)
    for long, counts in (("cut", (80, 40)), ("drop", None)):
        run = genres("trainer.steps=2", f"data.long={long}", f"data.max_length={least}", "data.allow=[leaks,lost]")
        experiment.execute(run, tmp_path / long, "x")
        told = read_json(tmp_path / long / "trial.json")["facts"]["rows"]
        splits = data.load(run.data)
        kept = tuple(sum(len(row.prompt) <= least for row in part) for part in (splits.train, splits.valid))
        assert 0 < kept[0] < 80 and 0 < kept[1] < 40
        assert (told["train"], told["valid"]) == (counts or kept)
        assert told["dropped"].get("length", 0) == 120 - told["train"] - told["valid"]


def test_tfidf_is_scored_again_where_other_rows_are_left(genres):
    told = []
    for most in (256, 20):
        run = genres("data.long=drop", f"data.max_length={most}", "data.allow=[leaks,lost]")
        splits = data.load(run.data)
        train, valid, known = experiment.classified(run, splits)
        told.append(experiment.tfidf_scores(run, train, valid, known, splits.digest()).scores["rows"])
        assert told[-1] == len(valid)
    assert told[0] > told[1]


def test_labels_of_a_list_are_parted_by_commas_alone(genres):
    run = genres("eval.labels=';'")
    row = Row("fine", "a, b", "x:1", listed=True)
    with pytest.raises(DataError, match=r"x:1: eval\.labels must be ', ' or null where labels are a list"):
        classify.render([row], model.tokenizer(run.model), run)
    assert classify.render([row], model.tokenizer(run.model), genres())[0].labels == {"a", "b"}
    with pytest.raises(DataError, match=r"one label \(trainer.multi_label=false\), got 'a, b'$"):
        classify.render([row], model.tokenizer(run.model), genres("trainer.multi_label=false"))


@pytest.mark.parametrize(("given", "between"), [("null", ", "), ("','", ", "), ("'|'", "|"), ("' / '", " / ")])
def test_labels_are_shown_as_the_rows_have_them(genres, given, between):
    run = genres(f"eval.labels={given}")
    rows = classify.render([Row("fine", f"b{between}a", "x:1")], model.tokenizer(run.model), run)
    scored, _ = classify.score(torch.ones(1, 2), rows, ["a", "b"], True, {"a": 0.5, "b": 0.5})
    assert (scored.table[0]["reference"], scored.table[0]["prediction"]) == (f"a{between}b", f"a{between}b")


def test_what_a_classifier_cannot_do_is_refused(genres):
    for given, message in (
        ("eval.forgetting=python-docs", "predicts no text"),
        ("objectives=[valid/perplexity]", "sft"),
    ):
        with pytest.raises(experiment.ConfigError, match=message):
            experiment.check(genres(given), None)


def test_encoder_with_a_hidden_layer_in_its_head(genres, tmp_path):
    """DistilBERT's head has two layers that no file has: both are trained and saved, the last starts at zero."""
    from safetensors.torch import load_file
    from transformers import DistilBertConfig, DistilBertModel

    from ftexp.model import tiny as made

    sizes = {
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 2,
        "vocab_size": 259,
        "max_position_embeddings": 256,
    }
    DistilBertModel(DistilBertConfig(pad_token_id=0, **sizes)).save_pretrained(tmp_path / "encoder")
    made.tokenizer().save_pretrained(tmp_path / "encoder")
    run = genres("model=hub", f"model.path={tmp_path}/encoder", "trainer.steps=3", "lora.targets=[q_lin,v_lin]")
    experiment.prepare(run)
    base = parts(run)[0]
    assert base.head == ("pre_classifier", "classifier")
    scores = experiment.execute(run, tmp_path / "a", "x")
    assert scores["valid/loss"] == pytest.approx(math.log(2), abs=0.05)  # a start is made
    saved = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for weight in saved.values())  # the head moved off zero, and LoRA B too
    assert {key.split(".")[-2] for key in saved if "lora" not in key} == {"pre_classifier", "classifier"}


@pytest.mark.parametrize("kind", ["roberta", "electra"])
def test_head_in_a_module_of_its_own_learns_and_is_loaded_again(kind, tiny, tmp_path):
    """peft wraps `classifier` unasked; the two layers in it must not be wrapped once more, where no pass goes."""
    run = tiny("data=genres", "trainer=classify", "model=hub", f"model.path={encoders.save(kind, tmp_path / kind)}",
               "trainer.steps=8")  # fmt: skip
    experiment.prepare(run)
    base, _, valid, known = parts(run)
    assert base.head == ("classifier.dense", "classifier.out_proj")
    before = base.model.classifier
    ids = torch.arange(3, 20)[None]
    with model.adapted(base, run.lora, run.seed) as tuned:
        head = {n: p for n, p in tuned.named_parameters() if "classifier" in n and p.requires_grad}
        assert sorted(n.split(".")[-2] for n in head) == ["dense", "dense", "out_proj", "out_proj"]
        head[next(n for n in head if "out_proj.weight" in n)].data += 1.0
        tuned(ids).logits.sum().backward()
        learning = {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in learning.values())
        assert all(grad.abs().max() > 0 for n, grad in learning.items() if n in head or "lora_B" in n)
    assert base.model.classifier is before
    assert model.load(run.model, run.quant, len(known)) is base
    scores = experiment.execute(run, tmp_path / "a", "x")
    assert scores["valid/loss"] < math.log(2) - 0.05
    told = read_json(tmp_path / "a" / "trial.json")["plan"]
    assert all(told[key]["planned"] == told[key]["real"] for key in ("trainable", "total", "steps"))
    with trained_run.load(trained_run.find(str(tmp_path / "a"))) as again:
        answers = classify.logits(again.tuned, again.tokenizer, valid, run.eval, "again")
    assert classify.loss(answers, valid, known, True) == pytest.approx(scores["valid/loss"], abs=1e-9)
    assert model._warm is not None  # the base came back as it was


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("kind", "head"),
    [("roberta", ("classifier.dense", "classifier.out_proj")), ("bert", ("bert.pooler.dense", "classifier")),
     ("distilbert", ("pre_classifier", "classifier"))],
)  # fmt: skip
def test_head_on_a_quantized_encoder_is_not_packed(kind, head, quant, tiny, tmp_path):
    """By itself transformers packs all of these, and a packed layer can be neither trained nor made float32."""
    run = tiny("data=genres", "trainer=classify", "model=hub", f"model.path={encoders.save(kind, tmp_path / kind)}",
               f"quant={quant}", "trainer.steps=3", "trainer.report_steps=0")  # fmt: skip
    experiment.prepare(run)
    scores = experiment.execute(run, tmp_path / "a", "x")
    base = parts(run)[0]
    assert base.head == head
    assert {type(base.model.get_submodule(name)) for name in head} == {torch.nn.Linear}
    packed = {name.split(".")[-1] for name, m in base.model.named_modules() if type(m) in (Linear4bit, Linear8bitLt)}
    assert packed >= ({"q_lin", "lin1"} if kind == "distilbert" else {"query", "dense"})
    assert scores["valid/loss"] < math.log(2) - 0.005


def test_left_classifier_goes_on_to_the_same_bits(genres, tmp_path):
    class After:
        """Set once it was looked at three times: leaves at that step."""

        looks = 0

        def is_set(self):
            self.looks += 1
            return self.looks >= 3

    def weights(folder):
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes()

    run = genres("trainer.steps=6", "lora.dropout=0.1")
    experiment.execute(run, tmp_path / "calm", "x")
    with pytest.raises(Preempted):
        experiment.execute(run, tmp_path / "left", "x", control=Control(leave=After()))
    experiment.execute(run, tmp_path / "left", "x")
    assert read_json(tmp_path / "left" / "trial.json")["resumed_at"] == [3]
    assert weights(tmp_path / "left") == weights(tmp_path / "calm")


def test_a_folder_with_a_head_of_as_many_labels_is_refused_in_one_line(genres, tmp_path):
    """Its outputs stand in another order, or for other labels; that it had no fresh weight was an IndexError."""
    from transformers import AutoModelForSequenceClassification

    run = genres("model=hub", f"model.path={encoders.save('bert', tmp_path / 'encoder')}")
    count = len(WORDS)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=count)
    whole.save_pretrained(tmp_path / "encoder")
    with pytest.raises(MachineError, match=f"holds a classifier of {count} outputs, and not which"):
        experiment.execute(run, tmp_path / "a", "x")
