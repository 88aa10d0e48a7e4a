"""One run from start to end on the tiny model: files, repeatability, refusals, and what a failure leaves."""

import hashlib
import json
import math
import re

import pyarrow.parquet
import pytest
from conftest import TINY, UNWRITTEN

from ftexp import data, experiment, metrics, model
from ftexp.errors import ConfigError, DataError, Diverged, MachineError
from ftexp.files import read_json, write_json


def adapter_hash(folder):
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_the_model_for_dry_runs_takes_the_default_rows(composed):
    run = composed("model=tiny")
    assert len(experiment.tokenised(run, data.load(run.data))[0]) > 2000


def test_run_leaves_scores_table_and_adapter(tiny, tmp_path):
    scores = experiment.execute(tiny(), tmp_path / "a", "mine")
    kept = read_json(tmp_path / "a" / "trial.json")
    assert kept["state"] == "complete"
    assert kept["scores"] == scores
    assert kept["facts"]["rows"]["train"] == 108
    assert len(kept["facts"]["weights_sha256"]) == 64
    assert scores["base/loss"] > scores["valid/loss"] > 0
    assert scores["cost/trainable"] == 16 * 2 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
    table = pyarrow.parquet.read_table(tmp_path / "a" / "examples.parquet").to_pylist()
    assert len(table) == 12
    assert sum(r["nats"] for r in table) / sum(r["tokens"] for r in table) == pytest.approx(scores["valid/loss"])
    assert sum(r["base_nats"] for r in table) / sum(r["tokens"] for r in table) == pytest.approx(scores["base/loss"])
    assert all(r["where"].startswith("yoda:") for r in table)


def test_every_number_of_a_run_has_a_direction_or_is_a_count(tiny, rewarded, tmp_path):
    """A new score without a row in METRICS fails here, and so does a row that no run reports."""
    counts = {f"{split}/{name}" for name in metrics.COUNTS for split in ("valid", "test")}
    table = {name: metric for name, metric in metrics.METRICS.items() if not metric.afterwards}
    reported = set()
    runs = [
        tiny(*given, "data.test=9")
        for given in (
            ["eval.labels=' '"],
            ["eval=loss", "eval.forgetting=python-docs"],
            ["trainer.kind=classify"],
            ["data=preference", "trainer.kind=reward"],
            ["data=preference", "trainer.kind=dpo"],
        )
    ]
    for n, run in enumerate([*runs, rewarded("data.test=9")]):
        scores = experiment.execute(run, tmp_path / str(n), "x", opened=1)
        on = experiment.switched_on(run)
        expected = {name for name, metric in table.items() if not metric.needs or {*metric.needs} & on}
        assert set(scores) - counts == expected - {"cost/gpu_memory_gib"}
        reported |= set(scores)
    assert reported == (set(table) | counts) - {"cost/gpu_memory_gib"}
    assert not counts & set(metrics.METRICS)


def test_means_over_rows_are_those_of_the_table(tiny, tmp_path):
    scores = experiment.execute(tiny(), tmp_path / "a", "x")
    table = pyarrow.parquet.read_table(tmp_path / "a" / "examples.parquet").to_pylist()
    assert scores["valid/rows"] == len(table) == 12
    assert scores["valid/tokens"] == sum(row["tokens"] for row in table)
    told = {f"valid/{name}" for name in table[0] if f"valid/{name}" in scores} - {"valid/tokens"}
    assert told == {
        f"valid/{n}" for n in ("exact_match", "jaccard", "f1", "chrf", "rouge_l", "memorised", "unparsable")
    }
    for name in told:
        assert scores[name] == pytest.approx(sum(row[name.removeprefix("valid/")] for row in table) / 12)


def test_loss_of_the_last_step_can_rank(tiny, tmp_path):
    run = tiny("objectives=[train/loss]")
    experiment.check(run, None)
    scores = experiment.execute(run, tmp_path / "a", "x")
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert scores["train/loss"] == [line["train/loss"] for line in lines if "train/loss" in line][-1]
    assert len([line for line in lines if "train/loss" in line]) == 4  # the curve, not the single values


def test_same_run_twice_gives_the_same_bits(tiny, tmp_path):
    one = experiment.execute(tiny(), tmp_path / "a", "x")
    two = experiment.execute(tiny(), tmp_path / "b", "x")
    assert adapter_hash(tmp_path / "a") == adapter_hash(tmp_path / "b")
    assert {k: v for k, v in one.items() if not k.startswith("cost/")} == {
        k: v for k, v in two.items() if not k.startswith("cost/")
    }


def test_saved_adapter_gives_the_scores_that_were_reported(tiny, tmp_path):
    from peft import PeftModel

    from ftexp import data, evaluate, model

    run = tiny("lora.r=4")
    scores = experiment.execute(run, tmp_path / "a", "x")
    _, valid = experiment.tokenised(run, data.load(run.data))
    fresh = model._load(run.model, run.quant, "fresh")
    loaded = PeftModel.from_pretrained(fresh.model, tmp_path / "a" / "adapter")
    again = evaluate.score(loaded, fresh.tokenizer, valid, run.eval, "again").scores
    assert again == {k.removeprefix("valid/"): v for k, v in scores.items() if k.startswith("valid/")}


def test_complete_run_is_kept_and_not_run_again(tiny, tmp_path, monkeypatch):
    scores = experiment.execute(tiny(), tmp_path / "a", "x")
    monkeypatch.setattr(experiment, "_execute", lambda *_: pytest.fail("was run again"))
    assert experiment.execute(tiny(), tmp_path / "a", "x") == scores


def test_complete_run_of_other_code_or_versions_is_kept_and_called_stale(tiny, tmp_path, capfd):
    experiment.execute(tiny(), tmp_path / "a", "x")
    experiment.execute(tiny(), tmp_path / "a", "x")
    assert "stale" not in capfd.readouterr().err
    kept = read_json(tmp_path / "a" / "trial.json")
    kept["facts"]["versions"]["trl"] = "0.1"
    kept["facts"]["code_sha256"] = "0" * 64
    write_json(tmp_path / "a" / "trial.json", kept)
    experiment.execute(tiny(), tmp_path / "a", "x")
    told = capfd.readouterr().err
    assert "x: stale, it was made with other trl (0.1 -> " in told
    assert "code (000000000000 -> " in told


def test_complete_run_of_an_ftexp_with_fewer_keys_is_kept(tiny, tmp_path, monkeypatch, capfd):
    """As 011d5ae left it: no `data.packing` or `trainer.engine`, and no version of tokenizers on record."""
    scores = experiment.execute(tiny(), tmp_path / "a", "x")
    kept = read_json(tmp_path / "a" / "trial.json")
    del kept["config"]["data.packing"], kept["config"]["trainer.engine"], kept["facts"]["versions"]["tokenizers"]
    kept["facts"]["code_sha256"] = "0" * 64
    write_json(tmp_path / "a" / "trial.json", kept)
    monkeypatch.setattr(experiment, "_execute", lambda *_: pytest.fail("was run again"))
    experiment.check(tiny(), tmp_path / "a")
    assert experiment.execute(tiny(), tmp_path / "a", "x") == scores
    told = capfd.readouterr().err
    assert "x: stale, it was made with other code (000000000000 -> " in told
    assert "tokenizers" not in told
    with pytest.raises(ConfigError, match=r"another run in .*: data\.packing None -> 'bfd'; choose"):
        experiment.check(tiny("data.packing=bfd"), tmp_path / "a")


def test_unfinished_run_is_run_again(tiny, tmp_path):
    run = tiny()
    write_json(tmp_path / "a" / "trial.json", {"state": "running", "config": experiment.identity(run)})
    experiment.check(run, tmp_path / "a")
    experiment.execute(run, tmp_path / "a", "x")
    assert read_json(tmp_path / "a" / "trial.json")["state"] == "complete"


def test_folder_of_another_run_is_refused_with_the_difference(tiny, tmp_path):
    write_json(tmp_path / "trial.json", {"state": "complete", "config": experiment.identity(tiny("lora.r=8"))})
    with pytest.raises(ConfigError, match=r"is taken by another run .*lora\.r 8 -> 4"):
        experiment.check(tiny("lora.r=4"), tmp_path)


def test_base_is_scored_once_for_several_trials(tiny, tmp_path, monkeypatch):
    experiment._base_scores.clear()
    labels, honest = [], experiment.evaluate.score
    monkeypatch.setattr(experiment.evaluate, "score", lambda *a: labels.append(a[4]) or honest(*a))
    for r in (2, 4):
        experiment.execute(tiny(f"lora.r={r}"), tmp_path / str(r), "x")
    assert labels == ["base", "valid", "valid"]


@pytest.fixture
def scoring(tiny, tmp_path, monkeypatch):
    """A run in what is a process of its own each time; tells what was scored, and the scores of the base."""
    labels, honest = [], experiment.evaluate.score
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(experiment, "KEPT_SECONDS", 0.0)
    monkeypatch.setattr(experiment.evaluate, "score", lambda *a: labels.append(a[4]) or honest(*a))

    def run(name, *given):
        experiment._base_scores.clear()
        labels.clear()
        scores = experiment.execute(tiny(*given), tmp_path / name, "x")
        table = pyarrow.parquet.read_table(tmp_path / name / "examples.parquet").to_pylist()
        return list(labels), {k: v for k, v in scores.items() if k.startswith("base/")}, table

    yield run
    experiment._base_scores.clear()


def test_scores_of_the_base_are_kept_for_later_runs(scoring, tmp_path, capfd):
    labels, scores, table = scoring("a")
    assert labels == ["base", "valid"]
    [kept] = (tmp_path / "cache" / "base").glob("*.json")
    capfd.readouterr()
    assert scoring("b") == (["valid"], scores, table)  # each number and text as it was
    assert f"scores of the base: kept from an earlier run, {kept}" in capfd.readouterr().err
    assert scoring("c", "lora.r=2")[0] == ["valid"]
    kept.write_text(kept.read_text()[:100])
    assert scoring("d") == (["base", "valid"], scores, table)  # a damaged file is written again
    assert scoring("e")[0] == ["valid"]
    kept.unlink()
    kept.mkdir()  # cannot be read
    assert scoring("f") == (["base", "valid"], scores, table)


@pytest.mark.parametrize(
    "given",
    [("eval.max_new_tokens=3",), ("data.valid=5",), ("data.seed=3",), ("model.attention=sdpa",), ("trainer.lr=1e-3",)],
)
def test_what_decides_the_scores_of_a_base_is_in_their_name(scoring, given):
    scoring("a")
    assert scoring("b", *given)[0] == (["valid"] if given == ("trainer.lr=1e-3",) else ["base", "valid"])


@pytest.mark.parametrize("what", ["template_digest", "tokenizer_digest"])
def test_another_template_or_tokenizer_of_the_same_weights_scores_the_base_again(scoring, monkeypatch, what):
    scoring("a")
    real = getattr(experiment.prompts, what)
    monkeypatch.setattr(experiment.prompts, what, lambda *given: real(*given)[::-1])
    assert scoring("b")[0] == ["base", "valid"]


def test_another_config_or_end_token_of_the_same_weights_scores_the_base_again(scoring, tiny, monkeypatch):
    scoring("a")
    base = model.load(tiny().model, tiny().quant)
    monkeypatch.setattr(base.model.config, "rope_note", "changed", raising=False)
    assert scoring("b")[0] == ["base", "valid"]
    assert scoring("c")[0] == ["valid"]
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", [2, 7])
    assert scoring("d")[0] == ["base", "valid"]


@pytest.mark.parametrize("what", ["code", "versions"])
def test_other_code_or_libraries_score_the_base_again(scoring, monkeypatch, what):
    scoring("a")
    monkeypatch.setattr(experiment.facts, what, lambda: {"torch": "0"} if what == "versions" else "other")
    assert scoring("b")[0] == ["base", "valid"]


def test_a_base_that_is_scored_at_once_is_not_kept(scoring, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "KEPT_SECONDS", 3600.0)
    scoring("a")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_loses_nothing(scoring, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    assert scoring("a")[0] == ["base", "valid"]


def test_failure_is_recorded_and_raised(tiny, tmp_path, monkeypatch):
    def diverge(*_):
        raise Diverged("diverged at step 3: train/loss is nan")

    monkeypatch.setitem(experiment.TRAINERS, tiny().trainer.kind, diverge)
    with pytest.raises(Diverged):
        experiment.execute(tiny(), tmp_path / "a", "x")
    kept = read_json(tmp_path / "a" / "trial.json")
    assert (kept["state"], kept["error"]) == ("failed", "diverged at step 3: train/loss is nan")
    assert not (tmp_path / "a" / "adapter").exists()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["objectives=[valid/los]"], ConfigError, "objectives must be among"),
        (["objectives=[valid/f1]", "eval=loss"], ConfigError, "needs eval.generate, which is off"),
        (["quant=nf4"], ConfigError, "quant.kind=nf4 needs stored weights"),
        (["data=jsonl", "data.path=none.jsonl"], DataError, "none.jsonl: data.path must be a file"),
        (["model=hub", "model.path=./none"], MachineError, "model.path must be a folder"),
        (
            ["eval.labels='.'", "data=jsonl", "data.path=dots.jsonl"],
            DataError,
            r"dots\.jsonl:2: .*must name a label, got '\.'",
        ),
        (
            ["eval.labels=';'", "data=jsonl", "data.path=listed.jsonl", "eval.generate=true"],
            DataError,
            r"listed\.jsonl:1: eval\.labels must be ', ' or null where labels are a list",
        ),
        (["eval.forgetting=none.txt"], DataError, "none.txt: eval.forgetting must be python-docs or a text file"),
        (["data.valid=500"], DataError, "data.valid=500 rows cannot be held out"),
    ],
)
def test_check_refuses_before_anything_runs(tiny, tmp_path, monkeypatch, given, error, message):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"p{n}", "completion": "." if n == 1 else "a. b"}) for n in range(120)]
    (tmp_path / "dots.jsonl").write_text("\n".join(rows))
    listed = [json.dumps({"text": f"p{n}", "labels": ["a", "b"]}) for n in range(120)]
    (tmp_path / "listed.jsonl").write_text("\n".join(listed))
    with pytest.raises(error, match=message):
        experiment.check(tiny(*given), tmp_path)


def test_label_run_writes_a_table_of_labels(tiny, tmp_path):
    """Yoda's words as labels, which the tiny model gets wrong: what counts is that each label has its row."""
    scores = experiment.execute(tiny("eval.labels=' '", "objectives=[valid/f1_macro]"), tmp_path / "a", "x")
    rows = read_json(tmp_path / "a" / "labels.json", of=list)
    assert len(rows) == scores["valid/labels"] > 50
    assert sum(row["f1"] is None for row in rows) == scores["valid/labels_undefined"]
    assert set(rows[0]) == {"label", "true", "predicted", "precision", "recall", "f1", "base_f1"}


def test_forgetting_is_the_loss_on_general_text_after_less_before(tiny, tmp_path):
    run = tiny("eval.forgetting=python-docs", "objectives=[forgetting/loss]", "eval=loss", "trainer.lr=0.5")
    experiment.check(run, None)
    scores = experiment.execute(run, tmp_path / "a", "x")
    assert {metrics.METRICS[n].needs for n in scores if n.startswith("forgetting/")} == {("eval.forgetting",)}
    before, after = scores["forgetting/before"], scores["forgetting/after"]
    assert before == pytest.approx(math.log(259), abs=0.2)  # random weights know nothing of English
    assert scores["forgetting/loss"] == after - before < -0.01  # and have nothing to forget
    assert len(read_json(tmp_path / "a" / "trial.json")["facts"]["general_sha256"]) == 64


def test_base_is_scored_on_general_text_once(tiny, tmp_path, monkeypatch):
    (tmp_path / "general.txt").write_text("Rain fell on the town.\n\nNobody knew why.")
    experiment._general.clear()
    labels, honest = [], experiment.general_loss
    monkeypatch.setattr(experiment, "general_loss", lambda *a: labels.append(a[-1]) or honest(*a))
    for r in (2, 4):
        experiment.execute(tiny(f"lora.r={r}", f"eval.forgetting={tmp_path}/general.txt"), tmp_path / str(r), "x")
    assert labels == ["base general text", "general text", "general text"]


def write(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return ["data=file", f"data.path={path}", "data.valid=2"]


def test_rows_that_sft_cannot_learn_from_are_refused(tiny, tmp_path):
    pairs = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(9)]
    given = write(tmp_path / "p.jsonl", *pairs)
    with pytest.raises(ConfigError, match=r"trainer\.kind=sft cannot learn from pairs of answers, as in .*p\.jsonl:\d"):
        experiment.check(tiny(*given), None)
    experiment.check(tiny(*given, "data.completion='{chosen}'"), None)


def test_text_without_prompts_is_scored_by_its_loss(tiny, tmp_path):
    given = write(
        tmp_path / "t.jsonl", *[{"text": word * 3} for word in ("one", "two", "three", "four", "five", "six", "seven")]
    )
    with pytest.raises(ConfigError, match=r"eval\.generate must be false, .*t\.jsonl:\d has no prompt"):
        experiment.check(tiny(*given), None)
    scores = experiment.execute(tiny(*given, "eval=loss"), tmp_path / "run", "x")
    assert scores["valid/loss"] > 0


def test_conversations_are_trained_and_scored_on_every_answer(tiny, tmp_path):
    talks = [
        {
            "messages": [
                {"role": role, "content": f"{role} {n} {turn}"} for turn in range(2) for role in ("user", "assistant")
            ]
        }
        for n in range(9)
    ]
    given = write(tmp_path / "t.jsonl", *talks)
    scores = experiment.execute(tiny(*given), tmp_path / "run", "x")
    table = pyarrow.parquet.read_table(tmp_path / "run" / "examples.parquet").to_pylist()
    assert [row["tokens"] for row in table] == [row["bytes"] + 2 for row in table]  # bytes are tokens, and two ends
    assert table[0]["reference"].endswith(" 1")
    bits = sum(r["nats"] for r in table) / sum(r["bytes"] for r in table) / math.log(2)
    assert scores["valid/bits_per_byte"] == pytest.approx(bits)


def test_rows_add_up_in_the_facts(tiny, tmp_path):
    rows = [{"prompt": f"p{n}", "completion": "x" * (5 if n else 250)} for n in range(30)]
    given = write(tmp_path / "t.jsonl", *rows, rows[3], rows[4])
    experiment.execute(tiny(*given, "data.long=drop", "data.seed=1"), tmp_path / "run", "x")
    told = read_json(tmp_path / "run" / "trial.json")["facts"]["rows"]
    assert told["dropped"] == {"exact": 2, "length": 1}
    assert told["read"] == 32 == told["train"] + told["valid"] + told["test"] + sum(told["dropped"].values())


def leaked(folder, cli, monkeypatch, *given):
    """Run a sweep and a single run whose sealed rows each hold a word of their own.

    Gives where such words came to light: in a text that was tokenised, in output, in a file, or in the tracking store.
    """
    import transformers

    def write(name, word, rows):
        told = [{"prompt": f"{word}{n:03} is asked", "completion": f"of {'ab'[n % 2]}{word}"} for n in range(rows)]
        (folder / name).write_text("\n".join(map(json.dumps, told)))

    write("train.jsonl", "plain", 60)
    write("test.jsonl", "sealed", 9)
    experiment._tokens = None
    seen, base = [], transformers.PreTrainedTokenizerBase
    for name in ("__call__", "apply_chat_template"):
        honest = getattr(base, name)
        monkeypatch.setattr(
            base, name, lambda self, text, *a, _f=honest, **k: seen.append(str(text)) or _f(self, text, *a, **k)
        )
    shared = [*(UNWRITTEN if given else TINY), "data=jsonl", "data.path=train.jsonl", "data.test_path=test.jsonl", "data.allow=[leaks]", "name=s", "trainer.steps=2",
              f"track.uri=sqlite:///{folder}/ml.db", *given]  # fmt: skip
    shared = [t for t in shared if not t.startswith("data.rows")]
    printed = ""
    for argv in (["lora.r=2,4", "-m"], []):
        code, out, err = cli(*argv, *shared)
        assert code == 0, err
        printed += out + err
    assert any("plain000" in text for text in seen)
    places = {"tokenizer": "sealed0" in "".join(seen), "output": "sealed0" in printed}
    for path in (p for p in folder.rglob("*") if p.is_file() and p.name != "test.jsonl"):
        whole = (
            str(pyarrow.parquet.read_table(path).to_pylist())
            if path.suffix == ".parquet"
            else path.read_text(errors="replace")
        )
        places[path.name] = places.get(path.name, False) or "sealed0" in whole
    assert {"examples.parquet", "trial.json", "ml.db", "study.journal"} <= set(places)
    return {name for name, found in places.items() if found}


METHODS = pytest.mark.parametrize("given", [[], ["trainer.kind=classify"]], ids=["sft", "classify"])


@METHODS
def test_sealed_rows_reach_no_tokenizer_no_output_and_no_file(cli, tmp_path, monkeypatch, given):
    assert not leaked(tmp_path, cli, monkeypatch, *given)


@pytest.mark.slow
@METHODS
def test_sabotage_opened_rows_come_to_light(cli, tmp_path, monkeypatch, given):
    honest = experiment._execute
    monkeypatch.setattr(experiment, "_execute", lambda *args: honest(*args[:-1], 1))
    assert {"tokenizer", "test.parquet"} <= leaked(tmp_path, cli, monkeypatch, *given)


def test_sealed_rows_are_not_among_those_that_are_scored(tiny, tmp_path, monkeypatch):
    from ftexp import data

    run = tiny("data.test=9", "data.seed=5")
    sealed = data.load(run.data).test
    seen, honest = [], experiment.prompts.render
    monkeypatch.setattr(experiment.prompts, "render", lambda rows, *more: seen.extend(rows) or honest(rows, *more))
    experiment._tokens = None
    experiment.prepare(run)
    experiment.execute(run, tmp_path / "run", "x")
    assert len(sealed) == 9
    assert len(seen) == 111 and not set(seen) & set(sealed)
    kept = read_json(tmp_path / "run" / "trial.json")
    assert "opened" not in kept and not [name for name in kept["scores"] if name.startswith("test/")]


def test_opened_rows_that_do_not_fit_are_refused_before_training(tiny, tmp_path, monkeypatch):
    given = write(tmp_path / "t.jsonl", *[{"prompt": f"p{n}", "completion": "x"} for n in range(9)])
    write(tmp_path / "sealed.jsonl", {"prompt": "long", "completion": "x" * 600})
    monkeypatch.setattr(experiment, "track", None)  # what comes after the rows is not reached
    run = tiny(*given, f"data.test_path={tmp_path}/sealed.jsonl", "data.max_length=1024", "eval=loss")
    with pytest.raises(DataError, match=r"sealed\.jsonl:1: the model takes at most 512 tokens"):
        next(experiment._execute(run, tmp_path / "run", "x", None, {}, None, 1))


def test_opened_row_of_a_class_nobody_knows_is_refused(tiny, tmp_path):
    rows = [{"prompt": f"p{n}", "completion": "ab"[n % 2]} for n in range(20)]
    given = write(tmp_path / "t.jsonl", *rows)
    write(tmp_path / "sealed.jsonl", {"prompt": "q1", "completion": "a"}, {"prompt": "q2", "completion": "c"})
    given += [f"data.test_path={tmp_path}/sealed.jsonl", "trainer.kind=classify", "data.allow=[leaks]"]
    with pytest.raises(DataError, match=r"sealed\.jsonl:2: no training or held-out row has the label 'c'"):
        experiment.execute(tiny(*given, "trainer.multi_label=false"), tmp_path / "one", "x", opened=1)
    assert experiment.execute(tiny(*given), tmp_path / "many", "x", opened=1)["test/subset_accuracy"] <= 0.5


def test_loss_only_run_writes_no_completions(tiny, tmp_path):
    scores = experiment.execute(tiny("eval=loss"), tmp_path / "a", "x")
    assert "valid/exact_match" not in scores
    assert "prediction" not in pyarrow.parquet.read_table(tmp_path / "a" / "examples.parquet").column_names


def test_a_trial_after_one_of_the_whole_model_is_as_alone(tiny, tmp_path, monkeypatch):
    """The base is the same object and has its bytes back: a training without an adapter is seen by nobody after it."""
    monkeypatch.setattr(experiment, "_base_scores", {})
    alone = experiment.execute(tiny("eval=loss"), tmp_path / "alone", "x")
    base = model.load(tiny().model, tiny().quant)
    whole = experiment.execute(tiny("eval=loss", "lora=none"), tmp_path / "whole", "x")
    assert model.load(tiny().model, tiny().quant) is base
    after = experiment.execute(tiny("eval=loss"), tmp_path / "after", "x")
    assert whole["valid/loss"] < whole["base/loss"] == alone["base/loss"]
    assert alone["valid/loss"] == after["valid/loss"] != whole["valid/loss"]
    files = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("alone", "after")]
    assert files[0] == files[1]


def test_saved_model_gives_the_scores_that_were_reported(tiny, tmp_path):
    """And goes on as the base of another run, by its folder."""
    first = experiment.execute(tiny("lora=none", "eval=loss"), tmp_path / "a", "x")
    again = tiny("model=hub", f"model.path={tmp_path}/a/model", "eval=loss", "model.attention=eager")
    second = experiment.execute(again, tmp_path / "b", "x")
    assert second["base/loss"] == pytest.approx(first["valid/loss"], rel=1e-6)
    assert second["valid/loss"] < second["base/loss"]


def test_forgetting_of_a_whole_model_is_told_beside_the_untouched_base(tiny, tmp_path):
    text = tmp_path / "general.txt"
    text.write_text("\n\n".join(f"Passage {n} of some general text." for n in range(4)))
    given = (f"eval.forgetting={text}", "eval=loss")
    kept = [
        experiment.execute(tiny(*given, *more), tmp_path / str(n), "x") for n, more in enumerate([[], ["lora=none"]])
    ]
    assert kept[0]["forgetting/before"] == kept[1]["forgetting/before"] != kept[1]["forgetting/after"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["trainer=reward"], r"trainer\.kind=reward learns from pairs of answers, yoda:\d+ has one"),
        (["trainer=dpo"], r"trainer\.kind=dpo learns from pairs of answers"),
        (["trainer=dpo", "data=preference", "eval.labels='|'"], r"eval\.labels must be null with trainer\.kind=dpo"),
        (
            ["trainer=dpo", "data=preference", "data.long=cut"],
            r"data\.long must be refuse or drop with trainer\.kind=dpo",
        ),
        (["trainer=reward", "data=preference", "data.packing=bfd"], r"data\.packing must be none with .*reward"),
        (["trainer=reward", "data=preference", "eval.forgetting=python-docs"], "such a model predicts no text"),
        (
            ["trainer=reward", "data=preference", "objectives=[valid/exact_match]"],
            r"needs eval\.generate, which is off",
        ),
        (["trainer=dpo", "data=preference", "objectives=[valid/roc_auc]"], r"needs trainer\.kind=reward"),
    ],
)
def test_what_does_not_go_with_pairs_is_refused(tiny, given, message):
    with pytest.raises(ConfigError, match=message):
        experiment.check(tiny(*given), None)


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_format_strings_are_refused_with_pairs_and_the_advice_is_taken(tiny, tmp_path, kind):
    """The advice was to set both, which makes one answer a row, and that was refused in turn."""
    renamed = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in PAIRS]
    given = [*write(tmp_path / "p.jsonl", *renamed), f"trainer={kind}", "data.rows=null"]
    with pytest.raises(DataError, match=r"'prompt' is missing, .*; data\.columns\.prompt tells which"):
        experiment.check(tiny(*given), None)
    for key, value in (("prompt", "{question}"), ("completion", "{chosen}")):
        told = rf"data\.{key} must be left out with trainer\.kind={kind}, got '{value}'.*data\.columns says"
        with pytest.raises(ConfigError, match=told):
            experiment.check(tiny(*given, f"data.{key}='{value}'"), None)
        with pytest.raises(
            ConfigError, match=rf"data\.{key} must be left out with data\.shape=preference: data\.columns"
        ):
            tiny(*given, f"data.{key}='{value}'", "data.shape=preference")
    experiment.check(tiny(*given, "+data.columns.prompt=question"), None)


@pytest.mark.parametrize("kind", ["reward", "dpo"])
@pytest.mark.parametrize("long", ["chosen", "rejected"])
def test_a_pair_that_is_too_long_is_advised_what_pairs_take(tiny, tmp_path, kind, long):
    """It was advised data.long=cut, which is refused with pairs."""
    pair = {"prompt": "p", "chosen": "yes", "rejected": "no"} | {long: "word " * 70}
    given = [*write(tmp_path / "p.jsonl", *PAIRS, pair), f"trainer={kind}", "data.rows=null", "data.allow=[lost]"]
    with pytest.raises(DataError, match="data.long=") as told:
        experiment.prepare(tiny(*given))
    advised = re.findall(r"data\.(?:max_length|long)=\w+(?: or \w+)?", str(told.value))[1:]
    assert advised[1:] == ["data.long=drop"] and len(advised) == 2
    for way in advised:
        experiment.prepare(tiny(*given, way))


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_numbers_of_pairs_are_known_and_their_tables_tell_them(kind, tiny, tmp_path):
    from ftexp import compare

    run = tiny("data=preference", f"trainer={kind}", "trainer.steps=2")
    scores = experiment.execute(run, tmp_path / "a", "x", opened=0)
    counts = {f"valid/{name}" for name in metrics.COUNTS}
    assert {name for name in scores if not name.startswith("plan")} <= {*metrics.METRICS, *counts}
    table = compare.read_table(tmp_path / "a" / "examples.parquet")
    for name in ("loss", "accuracy", "margin", *(["chosen_loss", "chosen_likelier"] if kind == "dpo" else [])):
        assert compare.column(table, f"valid/{name}").value == pytest.approx(scores[f"valid/{name}"], rel=1e-9)


def test_sealed_pairs_are_scored_when_they_are_opened(tiny, tmp_path):
    for kind in ("reward", "dpo"):
        run = tiny("data=preference", f"trainer={kind}", "trainer.steps=2", "data.test=9", "eval.generate=false")
        scores = experiment.execute(run, tmp_path / kind, "x", opened=1)
        assert scores["test/rows"] == 9
        assert 0 <= scores["test/accuracy"] <= 1


@pytest.mark.parametrize(
    ("completion", "more", "told"),
    [
        (
            lambda n: ["cat", "dog"][n % 2],
            [],
            "each row has one label, and trainer.multi_label=true decides each label",
        ),
        (lambda n: ["cat", "dog"][n % 2], ["trainer.multi_label=false"], None),
        (lambda n: ["cat", "dog, cat"][n % 2], [], None),
        (
            lambda n: f"Over the hill went {n}",
            [],
            "40 of 40 labels are of one row alone, of 40 rows; trainer.kind=classify",
        ),
    ],
)
def test_labels_that_are_most_likely_meant_otherwise_are_told_once(tiny, tmp_path, capsys, completion, more, told):
    rows = [{"prompt": f"what of {n}?", "completion": completion(n)} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for lora in ("lora.r=2", "lora.r=4"):
        run = tiny("data=jsonl", f"data.path={path}", "data.valid=8", "trainer=classify", lora, *more)
        experiment.prepare(run)
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("label") == 0 if told is None else err.count(told) == 1


PAIRS = [{"prompt": f"q {n} about {n * n}", "chosen": f"yes {n} it is", "rejected": f"no {n} never"} for n in range(40)]
TEXTS = [{"prompt": f"q {n} about {n * n}", "completion": f"answer {n}, which is {n * 7}"} for n in range(40)]
NAMED = [{"text": f"words {n} of {n * n}", "label": "ab"[n % 2]} for n in range(40)]
LONG = "word " * 400


@pytest.mark.parametrize(
    ("given", "rows", "sealed", "told"),
    [
        ([], TEXTS, {"prompt": "p", "chosen": "yes", "rejected": "no"}, "sft cannot learn from pairs of answers, as in test"),
        ([], TEXTS, {"text": "no prompt at all"}, "eval.generate must be false, test.jsonl:1 has no prompt to complete"),
        (["trainer=dpo"], PAIRS, {"prompt": "p", "completion": "lone"}, "dpo learns from pairs of answers, test.jsonl:1 has"),
        (["trainer=reward"], PAIRS, {"prompt": "p", "completion": "lone"}, "reward learns from pairs of answers, test.jsonl"),
        (["eval.labels=', '"], TEXTS, {"prompt": "p", "completion": ", "}, "test.jsonl:1: .*label"),
    ],
)  # fmt: skip
def test_sealed_rows_of_another_shape_are_refused_at_the_launch(tiny, tmp_path, monkeypatch, given, rows, sealed, told):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", *rows)
    write(tmp_path / "test.jsonl", sealed)
    words = ["data=jsonl", "data.path=rows.jsonl", "data.test_path=test.jsonl", "data.rows=null", *given]
    with pytest.raises((ConfigError, DataError), match=told):
        experiment.check(tiny(*words), None)


@pytest.mark.parametrize(
    ("given", "rows", "sealed", "told"),
    [
        ([], TEXTS, {"prompt": "p", "completion": LONG}, "test.jsonl:1: a row must be at most data.max_length=256"),
        (["data.long=drop", "data.allow=[lost]"], TEXTS, {"prompt": "p", "completion": LONG}, "test.jsonl:1: no row is left of 1"),
        (["trainer=reward"], PAIRS, {"prompt": "p", "chosen": LONG, "rejected": "no"}, "test.jsonl:1: .* at most data.max_le"),
        (["trainer=dpo"], PAIRS, {"prompt": "p", "chosen": "no", "rejected": LONG}, "test.jsonl:1: .* at most data.max_le"),
        (["trainer=classify", "trainer.multi_label=false", "data.shape=labels"], NAMED, {"text": "words of zz", "label": "zz"},
         "test.jsonl:1: no training or held-out row has the label 'zz'"),
    ],
)  # fmt: skip
def test_sealed_rows_that_could_not_be_scored_are_told_without_a_model(
    tiny, tmp_path, monkeypatch, given, rows, sealed, told
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", *rows)
    words = ["data=jsonl", "data.path=rows.jsonl", "data.test_path=test.jsonl", "data.rows=null", *given]
    write(tmp_path / "test.jsonl", sealed)
    with pytest.raises((ConfigError, DataError), match=told):
        experiment.check_sealed(tiny(*words))
    write(tmp_path / "test.jsonl", {k: v if k == "label" else f"{v} anew" for k, v in rows[0].items()})
    experiment.check_sealed(tiny(*words))
