"""What `ftexp show data` prints: the rows as the model sees them, and what a run would be refused for."""

import io
import json
import sys

import pytest
from rich.console import Console

from ftexp import show
from ftexp.config import Data, Template
from ftexp.data import prompts
from ftexp.data.shapes import Row
from ftexp.model import tiny
from ftexp.train import answers

SMALL = ["model=tiny", "data.rows=120", "data.valid=12", "data.max_length=256"]


@pytest.fixture
def shown(monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["ftexp show", "data", *argv])
        code = show.main()
        return code, *capsys.readouterr()

    return run


def test_what_is_no_single_run_is_told_by_the_name_of_the_verb(shown):
    code, out, err = shown(*SMALL, "lora.r=2,4")
    assert (code, out) == (2, "")
    assert "lora.r=2,4 has several values: ftexp show takes the overrides of one run; a sweep is for ftexp run" in err
    assert "sweep=rank: ftexp show takes the overrides of one run" in shown(*SMALL, "sweep=rank")[2]


def example(completion="yo", prompt="Hi\t[b]", template=Template.model):
    return prompts.render((Row(prompt, completion, "t:1"),), tiny.tokenizer(), Data(template=template))[0]


def test_supervised_text_stands_in_brackets_where_there_are_no_colours():
    text = show.coloured(example(), tiny.tokenizer(), brackets=True)
    assert text.plain == "<|im_start|>user⏎\nHi⇥[b]<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦yo<|im_end|>⟧"


def test_supervised_text_is_coloured_on_a_terminal():
    made = example("naïve 한")
    text = show.coloured(made, tiny.tokenizer(), brackets=False)
    learned = "".join(text.plain[s.start : s.end] for s in text.spans if show.LEARNED in str(s.style))
    assert learned == "naïve 한<|im_end|>"
    special = [text.plain[s.start : s.end] for s in text.spans if show.SPECIAL in str(s.style)]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]


def test_nothing_of_a_row_is_lost():
    made = example("a\nb", template=Template.plain)
    assert "".join(part for part, *_ in show.spans(made, tiny.tokenizer())) == tiny.tokenizer().decode(made.ids)


def test_rows_counts_and_lengths_are_printed(shown):
    code, out, _ = shown(*SMALL, "--rows", "2")
    assert code == 0
    assert out.count("⟦") == out.count("⟧") == 2
    assert "rows: 120 read = 108 train + 12 valid + 0 test" in out
    assert "0 rows have more than data.max_length=256 tokens" in out
    counts = [int(line.rsplit(" ", 1)[1]) for line in out.splitlines() if "█" in line]
    assert sum(counts) == 120


def test_valid_rows_are_shown_and_sealed_ones_never(shown):
    from ftexp import data

    given = [*SMALL, "data.test=5"]
    _, out, _ = shown(*given, "--split", "valid", "--rows", "99")
    splits = data.load(show.compose(given).data)
    assert all(row.completion in out for row in splits.valid)
    assert not any(row.completion in out for row in splits.test)
    with pytest.raises(SystemExit):
        shown(*given, "--split", "test")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_sealed_rows_that_are_too_long_are_counted_and_not_shown(shown, tmp_path, kind):
    """They were counted alone, and `ftexp confirm` refused them when the sweep was over."""
    worse = {"sft": ("completion", "note"), "dpo": ("chosen", "rejected")}[kind]
    rows = [{"prompt": f"say {n} {n * n}", worse[0]: f"yes {n} {n * n}", worse[1]: f"no {n}"} for n in range(30)]
    sealed = [{"prompt": f"hidden {n}", worse[0]: f"hidden {n}", worse[1]: f"hide {n}"} for n in range(3)]
    sealed[1][worse[kind == "dpo"]] = "hidden " * 60
    for name, told in (("rows", rows), ("test", sealed)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    given = ["model=tiny", "data=jsonl", f"data.path={tmp_path}/rows.jsonl", f"data.test_path={tmp_path}/test.jsonl",
             f"trainer.kind={kind}", "data.valid=6", "data.max_length=200"]  # fmt: skip
    code, out, err = shown(*given, "--rows", "99")
    assert code == 0, err
    assert "1 of 3 sealed rows have more; by ftexp confirm they are refused" in out
    assert "hid" not in out + err
    code, out, _ = shown(*given, "--json", "--rows", "99")
    assert code == 0 and json.loads(out)["test"] == {"rows": 3, "too_long": 1} and "hid" not in out


def test_row_that_is_too_long_is_shown_and_then_refused(shown):
    code, out, err = shown(*SMALL, "data.max_length=60")
    assert code == 3
    assert "rows have more than data.max_length=60 tokens and are refused" in out
    assert "ftexp: yoda:0: a row must be at most data.max_length=60 tokens" in err


def test_mistake_is_told_in_a_line(shown):
    for given, code, message in (("data.typo=1", 2, "unknown key"), ("data.valid=0", 2, "data.valid must be"),
                                 ("data.dedup=fuzzy", 2, "data.dedup=fuzzy")):  # fmt: skip
        got, _, err = shown(given)
        assert got == code
        assert message in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_rows_below_none_are_refused(shown, more):
    """--rows=-1 showed all rows but one."""
    code, out, err = shown(*SMALL, "--rows=-1", *more)
    assert code == 2 and "--rows must be 0 or more, got -1" in err + out
    assert shown(*SMALL, "--rows=0", *more)[0] == 0


def test_picture_is_a_png(shown, tmp_path):
    code, _, err = shown(*SMALL, "--png", str(tmp_path / "a" / "lengths.png"))
    assert code == 0, err
    assert (tmp_path / "a" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_picture_needs_its_package(tmp_path, monkeypatch):
    from ftexp.errors import MachineError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MachineError, match="--png needs the package matplotlib"):
        show.picture([example()], Data(), tmp_path / "a.png")


def test_histogram_counts_every_length():
    lengths = [3, 3, 5, 900, 17, 17, 18]
    bins = show.histogram(lengths)
    assert len(bins) <= show.BINS
    assert sum(count for *_, count in bins) == len(lengths)
    assert all(count == sum(first <= n <= last for n in lengths) for first, last, count in bins)


def test_colours_are_written_to_a_terminal():
    out = io.StringIO()
    Console(file=out, force_terminal=True).print(show.coloured(example(), tiny.tokenizer(), brackets=False))
    assert "\x1b[1;32m" in out.getvalue()


def test_json_says_what_the_screen_says(shown):
    from ftexp import data

    given = [*SMALL, "data.test=5"]
    code, out, err = shown(*given, "--json", "--rows", "2", "--split", "valid")
    assert code == 0, err
    told, splits = json.loads(out), data.load(show.compose(given).data)
    assert (told["read"], told["train"]["rows"], told["valid"]["rows"], told["test"]) == (
        splits.read, len(splits.train), len(splits.valid), {"rows": 5, "too_long": 0})  # fmt: skip
    assert f"tokens: {told['train']['tokens'] + told['valid']['tokens']}," in shown(*given)[1]
    first = told["valid_rows"][0]
    assert len(told["valid_rows"]) == 2
    learned = "".join(s["text"] for s in first["spans"] if s["supervised"])
    assert splits.valid[0].completion in learned
    assert not any(row.completion in out for row in splits.test)
    code, out, err = shown(*SMALL, "data.max_length=60", "--json")
    assert (code, out) == (3, "") and "ftexp: yoda:0: a row must be at most" in err


def test_rows_of_a_classifier_are_texts_with_labels_beside_them(shown):
    """They were shown as a conversation, and refused for what `data.long=cut` left of it."""
    given = ["model=tiny", "data=genres", "trainer=classify", "data.rows=120", "data.valid=12", "--rows", "1"]
    code, out, err = shown(*given, "data.max_length=40", "data.long=cut")
    assert code == 0, err
    assert "im_start" not in out and "⟦" not in out
    assert "labels: " in out and "0 supervised tokens" in out and "% supervised" not in out
    assert "rows have more than data.max_length=40 tokens and are cut" in out
    code, _, err = shown(*given, "data.max_length=40")
    assert code == 3 and "a row must be at most data.max_length=40 tokens" in err


PAIRS = ["model=tiny", "data=preference", "data.rows=120", "data.valid=12"]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_both_answers_of_a_pair_are_shown_and_counted(shown, kind):
    """The rejected answer was neither."""

    from ftexp import data

    given = [*PAIRS, f"trainer={kind}", "--rows", "2"]
    code, out, err = shown(*given)
    assert code == 0, err
    run = show.compose(given[:-2])
    splits = data.load(run.data)
    pairs = [*splits.train, *splits.valid]
    assert out.count("\nrejected: ") == 2
    assert out.count("⟦") == out.count("⟧") == (4 if kind == "dpo" else 0)
    assert all(f"{text}<|im_end|>" in out for row in splits.train[:2] for text in (row.completion, row.rejected))
    told = answers.render(tuple(pairs), tiny.tokenizer(), run.data)
    lengths = [len(e.ids) for e in answers.sides(told)]
    assert f"tokens: {sum(lengths)}{', ' if kind == 'dpo' else ';'}" in out
    assert sum(int(line.rsplit(" ", 1)[1]) for line in out.splitlines() if "█" in line) == len(lengths) == 240
    code, out, err = shown(*given, "--json")
    assert code == 0, err
    counts = json.loads(out)
    assert counts["train"]["tokens"] + counts["valid"]["tokens"] == sum(lengths)
    assert max(counts["train"]["longest"], counts["valid"]["longest"]) == max(lengths)
    for entry, pair in zip(counts["train_rows"], told, strict=False):
        assert (entry["tokens"], entry["rejected"]["tokens"]) == (len(pair.chosen.ids), len(pair.rejected.ids))
        assert "".join(s["text"] for s in entry["rejected"]["spans"]) == tiny.tokenizer().decode(pair.rejected.ids)


@pytest.mark.parametrize("kind", ["dpo", "reward"])
@pytest.mark.parametrize("long", ["refuse", "drop"])
def test_a_rejected_answer_that_is_too_long_is_told(shown, tmp_path, kind, long):
    """As many rows as a run would refuse or leave out; of the rejected answers none was told."""

    rows = [{"prompt": f"say {n}", "chosen": f"yes {n} {n * n}", "rejected": "no " * (200 if n == 7 else 2)}
            for n in range(60)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["model=tiny", "data=jsonl", f"data.path={tmp_path / 'a.jsonl'}", "data.valid=6", "data.max_length=256",
             f"trainer={kind}", f"data.long={long}", "data.allow=[leaks]"]  # fmt: skip
    code, out, err = shown(*given)
    told = {"refuse": "refused", "drop": "dropped"}[long]
    assert f"1 rows have more than data.max_length=256 tokens and are {told}" in out
    assert code == (3 if long == "refuse" else 0), err
    assert "a.jsonl:8" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [([*SMALL, "trainer=dpo"], "trainer.kind=dpo learns from pairs of answers, yoda:0 has one"),
     ([*SMALL, "trainer=reward"], "trainer.kind=reward learns from pairs of answers"),
     (PAIRS, "trainer.kind=sft cannot learn from pairs of answers"),
     ([*PAIRS, "trainer=dpo", "data.long=cut"], "data.long must be refuse or drop with trainer.kind=dpo")],
)  # fmt: skip
@pytest.mark.parametrize("how", [[], ["--json"]])
def test_rows_that_the_method_cannot_use_are_refused_as_by_a_run(shown, given, message, how):
    code, out, err = shown(*given, *how)
    assert (code, out) == (2, "")
    assert message in err
