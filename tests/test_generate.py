"""What a run writes for a prompt: as it did on its held-out rows, beside its base, drawn or greedy, and for classifiers."""

import io
import json
import math
import sys
from dataclasses import replace

import pyarrow.parquet
import pytest
import torch
from conftest import UNWRITTEN

from ftexp import data, evaluate, generate, model, trained
from ftexp import run as command
from ftexp.config import Data, Kind, Long, Model, Quant, Shape
from ftexp.data import prompts
from ftexp.errors import ConfigError, DataError
from ftexp.generate import How


@pytest.fixture
def run(at, monkeypatch, capsys):
    """Return a function that runs `ftexp generate`; gives exit code, stdout and stderr."""

    def call(*argv, stdin=""):
        monkeypatch.setattr(sys, "argv", ["ftexp generate", *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = generate.main()
        return code, *capsys.readouterr()

    return call


def recorded(kept):
    return pyarrow.parquet.read_table(kept.folder / "examples.parquet").to_pylist()


def test_answers_are_those_of_the_run_itself(run):
    """The run wrote these completions for its held-out rows when it was scored; base and tuned must come again."""
    rows = recorded(trained.find("s"))[:4]
    code, out, err = run("s", *(row["prompt"] for row in rows), "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["run"] == "outputs/sweeps/s/1"
    assert told["how"] == {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0, "samples": 1}
    assert [a["tuned"] for a in told["answers"]] == [row["prediction"] for row in rows]
    assert [a["base"] for a in told["answers"]] == [row["base_prediction"] for row in rows]
    assert any(a["tuned"] != a["base"] for a in told["answers"])  # or one could stand for the other


def test_sabotage_another_template_gives_other_ids(at):
    row = recorded(trained.find("s"))[0]
    plain = generate.encode

    def bare(rows, tokenizer, run, texts):
        from ftexp.config import Template

        return plain(rows, tokenizer, replace(run, data=replace(run.data, template=Template.plain)), texts)

    with trained.load(trained.find("s")) as loaded:
        asked = plain([generate.typed(row["prompt"], "x")], loaded.tokenizer, loaded.run, False)
        other = bare([generate.typed(row["prompt"], "x")], loaded.tokenizer, loaded.run, False)
    assert asked != other


def test_prompts_are_rendered_as_the_rows_of_training(at):
    """Each way to give a prompt has the ids that the run's own render gives the row."""
    kept = trained.find("s")
    run, tokenizer = kept.config(), model.tokenizer(Model(kind=Kind.tiny))
    rows = data.load(run.data).valid[:5]
    wanted = [e.prompt for e in prompts.render(rows, tokenizer, run.data)]
    typed = [generate.typed(row.prompt, row.where) for row in rows]
    assert generate.encode(typed, tokenizer, run, False) == wanted


def test_no_row_of_the_run_is_read(run, monkeypatch):
    def refuse(*_):
        raise AssertionError("rows were read")

    monkeypatch.setattr(data, "load", refuse)
    assert run("s", "hello")[0] == 0
    assert run("c", "hello")[0] == 0


def test_draws_come_again_whatever_stands_beside(run):
    alone = json.loads(run("s", "b", "--json", "--temperature", "1", "--top-p", "0.9", "--seed", "3")[1])["answers"]
    beside = json.loads(run("s", "a", "b", "--json", "--temperature", "1", "--top-p", "0.9", "--seed", "3")[1])[
        "answers"
    ]
    assert beside[1] == alone[0]
    other = json.loads(run("s", "b", "--json", "--temperature", "1", "--top-p", "0.9", "--seed", "4")[1])["answers"]
    assert other != alone
    greedy = json.loads(run("s", "b", "--json")[1])["answers"]
    assert json.loads(run("s", "b", "--json", "--seed", "9")[1])["answers"] == greedy


def test_each_of_several_samples_is_the_draw_of_its_seed(run, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    drawn = ("--json", "--temperature", "1", "--seed", "3")
    told = json.loads(run("s", "--file", tmp_path / "p.txt", *drawn, "--samples", "3")[1])
    assert told["how"]["samples"] == 3
    assert [(a["prompt"], a["seed"]) for a in told["answers"]] == [(p, s) for p in "ab" for s in (3, 4, 5)]
    for n, answer in enumerate(told["answers"][3:]):
        alone = json.loads(run("s", "b", *drawn[:-1], 3 + n)[1])["answers"]
        assert alone == [{key: value for key, value in answer.items() if key != "seed"}]
    assert len({answer["tuned"] for answer in told["answers"][3:]}) > 1
    out = run("s", "b", "--temperature", "1", "--seed", "3", "--samples", "2", "--no-base")[1]
    lines = [line.split() for line in out.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["seed"]] == ["3", "4"]


def test_tokens_are_drawn_as_often_as_the_softmax_says():
    """A model of one position: drawn shares against softmax(logits / 2), within four standard errors."""
    base = model.load(Model(kind=Kind.tiny), Quant())
    logits = torch.full((259,), -100.0)
    logits[10:14] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    head = base.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda m, given, out: logits.expand_as(out))
    try:
        wanted = torch.softmax(logits / 2, -1)[10:14]
        drawn = [
            ord(generate.complete(base.model, base.tokenizer, [(5,)], How(1, 2.0, 1.0, seed), 1, "t")[0][0])
            for seed in range(300)
        ]
        counts = [drawn.count(ord(base.tokenizer.decode([n]))) for n in range(10, 14)]
        narrow = {
            generate.complete(base.model, base.tokenizer, [(5,)], How(1, 2.0, 0.3, seed), 1, "t")[0]
            for seed in range(20)
        }
    finally:
        hook.remove()
    for count, share in zip(counts, wanted.tolist(), strict=True):
        assert abs(count / 300 - share) < 4 * math.sqrt(share * (1 - share) / 300)
    assert narrow == {base.tokenizer.decode([13])}  # its share alone, 0.46, is above 0.3


def test_probabilities_are_those_the_run_was_scored_with(run):
    """The nats of each held-out row in the run's file are the sum over labels of -ln of these probabilities."""
    kept = trained.find("c")
    rows = recorded(kept)[:3]
    code, out, err = run("c", *(row["prompt"] for row in rows), "--json")
    assert code == 0, err
    for row, answer in zip(rows, json.loads(out)["answers"], strict=True):
        true = set(row["reference"].split(", "))
        shares = answer["probabilities"]
        nats = -sum(math.log(p if name in true else 1 - p) for name, p in shares.items())
        assert nats == pytest.approx(row["nats"], rel=1e-6)
        assert set(answer["labels"]) == {n for n, p in shares.items() if p >= kept.trial["thresholds"][n]}
        assert list(shares) == kept.trial["labels"]


def test_long_text_is_taken_as_the_run_takes_its_rows(at):
    """A token of this tokenizer is a byte; a run that left long texts out is asked about none."""
    with trained.load(trained.find("c")) as loaded:

        def asked(text, long):
            how = replace(loaded.run.data, long=long, max_length=16)
            return generate.classified(
                replace(loaded, run=replace(loaded.run, data=how)), [generate.typed(text, "t:1")]
            )

        long, short = (asked(text, Long.cut)[0] for text in ("a lonely pilot in space", "a lonely pilot i"))
        assert long["text"] == "a lonely pilot in space"
        assert long["probabilities"] == short["probabilities"]
        for way in (Long.refuse, Long.drop):
            with pytest.raises(
                DataError, match=r"t:1: a row must be at most data\.max_length=16 tokens, this one has 23"
            ):
                asked("a lonely pilot in space", way)


def test_labels_are_printed_with_their_thresholds(run):
    kept = trained.find("c")
    _, out, _ = run("c", "a lonely pilot")
    assert out.startswith("text           a lonely pilot\nlabels ")
    name = kept.trial["labels"][0]
    assert "(from " in out and out.count("\n") > 5
    assert f"and {len(kept.trial['labels']) - generate.SHOWN} more" in out or name in out


def test_files_of_prompts(at, tmp_path, composed):
    told = composed().data
    text = tmp_path / "a.txt"
    text.write_text("one\n\ntwo\n")
    assert [(r.prompt, r.where) for r in generate.read_file(text, told)] == [("one", f"{text}:1"), ("two", f"{text}:3")]

    assert generate.read_file(text, replace(told, prompt="About {topic}:"))[0].prompt == "one"
    text.write_bytes("\ufeffone\u2028more\r\ntwo\n".encode())
    assert [r.prompt for r in generate.read_file(text, told)] == ["one\u2028more", "two"]

    def read(record, **keys):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(record))
        return generate.read_file(path, replace(told, **keys))[0]

    assert read({"prompt": "p"}).prompt == "p"
    assert read({"prompt": "p", "completion": "c"}).prompt == "p"
    assert read({"topic": "t"}, prompt="About {topic}:", completion="{quote}").prompt == "About t:"
    assert read({"q": "p"}, columns={"prompt": "q", "completion": "a"}).prompt == "p"
    assert read({"instruction": "do", "input": "this"}).prompt == "do\n\nthis"
    assert read({"text": "label me"}).prompt == "label me"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert read({"messages": turns}).turns[:-1] == (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert read({"conversations": [{"from": "human", "value": "a"}]}).prompt == "a"
    for answers in ({}, {"completion": [{"role": "assistant", "content": "d"}]}):
        assert read({"prompt": turns} | answers).turns[:-1] == (("user", "a"), ("assistant", "b"), ("user", "c"))
        assert read({"prompt": turns[:1]} | answers).prompt == "a"
    pair = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    for answers in ({}, pair):
        assert read({"q": turns[:1]} | answers, columns={"prompt": "q"}).prompt == "a"
    for answers in ({}, {"g": "war"}):
        assert read({"text": "label me"} | answers, columns={"label": "g"}).prompt == "label me"
    for answers in ({}, {"c": "good"}, {"c": "good", "r": "bad"}):
        assert read({"prompt": "p"} | answers, columns={"chosen": "c", "rejected": "r"}).prompt == "p"
    assert read({"body": "a text"}, shape=Shape.text, completion="{body}").prompt == "a text"
    assert read({"b": "a text"}, shape=Shape.text, columns={"text": "b"}).prompt == "a text"
    with pytest.raises(DataError, match=r"a\.jsonl:1: column 'body' is missing"):
        read({"prompt": "p"}, shape=Shape.text, completion="{body}")
    with pytest.raises(DataError, match=r"a\.jsonl:1: column 'topic' is missing, the row has prompt;"):
        read({"prompt": "p"}, prompt="{topic}")
    with pytest.raises(DataError, match=r"a\.jsonl:1: column 'q' is missing, the row has a, b; data\.columns\.prompt"):
        read({"a": "p", "b": "p"}, columns={"prompt": "q", "completion": "c"})
    with pytest.raises(DataError, match=r"the row has question(;|$)"):
        read({"question": "p"})
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(DataError, match=r"e\.txt: must have prompts, got none"):
        generate.read_file(tmp_path / "e.txt", told)
    with pytest.raises(DataError, match="cannot be read as text"):
        generate.read_file(tmp_path / "none.txt", told)


def test_texts_without_prompts_are_gone_on_with(tmp_path, monkeypatch):
    """Of a run on plain texts, a prompt has the first ids of a training text and is not closed."""
    monkeypatch.chdir(tmp_path)
    lines = [{"text": f"once there was number {n} of many"} for n in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    own = [t for t in UNWRITTEN if not t.startswith("data.rows")]
    monkeypatch.setattr(sys, "argv", ["ftexp.run", *own, "data=jsonl", "data.path=t.jsonl", "eval=loss", "track=none",
                                      "data.valid=4", "name=t"])  # fmt: skip
    assert command.main() == 0
    kept = trained.find("t")
    assert generate._texts(kept)
    run, tokenizer = kept.config(), model.tokenizer(Model(kind=Kind.tiny))
    asked = generate.encode([generate.typed("once there", "x")], tokenizer, run, True)[0]
    row = prompts.render(data.load(run.data).valid[:1], tokenizer, run.data)[0]
    assert asked == tuple(row.ids[: len(asked)])
    assert tokenizer.eos_token_id not in asked
    monkeypatch.setattr(sys, "argv", ["ftexp generate", "t", "once there", "--max-new-tokens", "3"])
    assert generate.main() == 0


def test_prompts_come_from_stdin_and_the_base_can_be_left_out(run):
    code, out, _ = run("s", "--no-base", stdin="first\n\nsecond\n")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("prompt")] == ["prompt  first", "prompt  second"]
    assert "base" not in out


def test_control_characters_are_spelled_out(capsys):
    from rich.console import Console

    generate.show([{"prompt": "a\x1b[31m", "tuned": "[bold]x\ny"}], Console())
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out and "\\u001b[31m" in out
    assert "tuned   [bold]x\n        y\n" in out


def test_a_terminal_is_asked_for_prompts(run, monkeypatch, capsys):
    lines = iter(["hello", "", "x" * 600, "bye"])
    calls = []

    def ask(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def write(model, tokenizer, asked, settings, batch, label, streamer=None):
        calls.append(label)
        if len(calls) == 3:  # the base's answer to the last prompt
            raise KeyboardInterrupt
        return ["x"]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(evaluate, "write", write)
    monkeypatch.setattr(sys, "argv", ["ftexp generate", "s"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert generate.main() == 0
    out = capsys.readouterr().out
    assert calls == ["base", "tuned", "base"]
    assert "--max-new-tokens must leave room for the prompt of the prompt" in out.replace("\n", " ")
    assert "stopped" in out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["s"], "PROMPT must be given"),
        (["s", " "], "prompt 1 must be a text"),
        (["s", "x", "abc\udcff"], "prompt 2 must be text in UTF-8, letter 4 is not"),
        (["s", "x", "--temperature", "-1"], "--temperature must be between 0 (greedy) and 100"),
        (["s", "x", "--temperature", "nan"], "--temperature must be between 0 (greedy) and 100"),
        (["s", "x", "--top-p", "0.5"], "--top-p must be 1 where --temperature is 0"),
        (["s", "x", "--top-p", "0", "--temperature", "1"], "--top-p must be above 0 and at most 1"),
        (["s", "x", "--max-new-tokens", "0"], "--max-new-tokens must be between 1"),
        (["s", "x", "--seed", "-1"], "--seed must be between 0"),
        (["s", "x", "--samples", "0"], "--samples must be between 1 and 10000, got 0"),
        (["s", "x", "--samples", "2"], "--samples must be 1 where --temperature is 0, all are the same, got 2"),
        (
            ["s", "x", "--temperature", "1", "--samples", "2", "--seed", str(2**32 - 1)],
            "--seed + --samples must be at most 4294967296, got 4294967297",
        ),
        (
            ["c", "x", "--samples", "2"],
            "--samples must be left out with a classifier, which writes no text, got 2",
        ),
        (["s", "x", "--max-new-tokens", "500"], "the model takes at most 512 tokens, the prompt has 20 and 500 may be"),
        (["s", "x", "--file", "y.txt"], "--file=y.txt must be left out where prompts stand"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(argv, told, run, monkeypatch):
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("a model was loaded"))
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert told in err.replace("\n", " ")


def test_bytes_of_stdin_that_are_no_text_are_refused(run, monkeypatch):
    class Bytes:
        isatty, read = staticmethod(lambda: False), staticmethod(lambda: b"abc\xff\n".decode())

    code, _, err = run("s", stdin="abc\udcff\n")
    assert code == 2 and err.endswith("ftexp: prompt 1 must be text in UTF-8, letter 4 is not\n")
    monkeypatch.setattr(sys, "stdin", Bytes())
    with pytest.raises(ConfigError, match=r"^stdin must be text in UTF-8, byte 3 is not$"):
        generate._rows(generate.parser().parse_args(["s"]), Data())


def test_how_takes_its_limits():
    assert How(1, 100, 1, 2**32 - 1).seed == 2**32 - 1
    with pytest.raises(ConfigError):
        How(1, 1.0, 1.1)


def test_whole_model_writes_beside_its_base(stages, run, monkeypatch):
    monkeypatch.chdir(stages.parent.parent)  # `run` stands elsewhere
    rows = recorded(trained.find("whole"))[:4]
    code, out, err = run("whole", *(row["prompt"] for row in rows), "--json")
    assert code == 0, err
    answers = json.loads(out)["answers"]
    assert [a["tuned"] for a in answers] == [row["prediction"] for row in rows]
    assert [a["base"] for a in answers] == [row["base_prediction"] for row in rows]
    assert any(a["tuned"] != a["base"] for a in answers)


def test_base_of_a_whole_model_is_not_loaded_where_it_is_left_out(stages, run, monkeypatch):
    monkeypatch.chdir(stages.parent.parent)
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("loaded the base"))
    assert run("whole", "hello", "--no-base")[0] == 0
    code, out, err = run("sorter_whole", "hello", "--json")
    assert code == 0, err
    assert len(json.loads(out)["answers"][0]["probabilities"]) > 2


def test_reward_model_is_refused_before_it_is_loaded(stages, run, monkeypatch):
    monkeypatch.chdir(stages.parent.parent)
    monkeypatch.setattr(trained, "load", lambda *_: pytest.fail("loaded a model"))
    code, _, err = run("judge", "hello")
    assert code == 2
    assert "judge is a reward model and writes no text; trainer.reward=judge takes it" in err


@pytest.mark.parametrize("given", ["--temperature 0.8", "--top-p 0.9", "--seed 3", "--samples 2", "--max-new-tokens 9"])
def test_options_of_writing_are_refused_with_a_classifier(run, monkeypatch, given):
    """All but --samples were taken and did nothing."""
    monkeypatch.setattr(trained, "load", None)
    option, value = given.split()
    code, _, err = run("c", "x", option, value)
    assert code == 2 and f"{option} must be left out with a classifier" in " ".join(err.split())
    assert f"got {value}" in " ".join(err.split())
