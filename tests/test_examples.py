"""Rows side by side: who did better."""

import pyarrow
import pyarrow.parquet
import pytest
from made import sweep

from ftexp import compare, examples, report
from ftexp.files import read_json, write_json


def row(reference, before, after, nats=(1.0, 1.0), **keys):
    texts = {} if before is None else {"base_prediction": [before], "prediction": [after]}
    return examples.of({"prompt": ["p"], "reference": [reference], "tokens": [2], "base_nats": [nats[0]],
                        "nats": [nats[1]]} | texts | keys)[0]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        ("x", "Ready I am.", "win"),
        ("Ready I am.", "x", "loss"),
        ("am I ready", "I am ready", "win"),  # neither is exact; more of the order is right
        ("Ready I am.", "Ready I am.", "same"),
        ("", "", "same"),
    ],
)
def test_exact_match_decides_then_order(before, after, outcome):
    assert row("Ready I am.", before, after).outcome == outcome


def test_a_lower_loss_alone_is_no_win_where_text_is_judged():
    assert row("yes", "no", "no", nats=(4.0, 1.0)).outcome == "same"
    assert row("yes", None, None, nats=(4.0, 1.0)).outcome == "win"
    assert row("yes", None, None, nats=(1.0, 4.0)).outcome == "loss"


def test_nats_are_per_token():
    nats = row("yes", "no", "no", nats=(4.0, 1.0)).nats
    assert (nats.before, nats.after, nats.name) == (2.0, 0.5, "nats a token")


def test_labels_are_sets(tmp_path):
    found = examples.of(compare.read_table(sweep(tmp_path / "s", 1, "labels") / "0" / "examples.parquet"))
    assert examples.rule(found) == "labels right, then F1"
    by_hand = []
    for n in range(24):
        truth = {("drama", "comedy", "war")[n % 3], "war"}
        now = truth if n % 4 else {"comedy"}
        was = {"war"} if n % 5 else truth
        score = lambda said, truth=truth: (said == truth, 2 * len(said & truth) / (len(said) + len(truth)))  # noqa: E731
        by_hand.append("win" if score(now) > score(was) else "loss" if score(now) < score(was) else "same")
    assert [e.outcome for e in found] == by_hand
    assert set(by_hand) == {"win", "loss", "same"}


def test_what_broke_is_kept_first():
    rows = [row("a", "b", "a"), row("a", "b", "b"), row("a", "a", "b"), row("a", "b", "a")]
    assert examples.count(rows) == {"win": 2, "loss": 1, "same": 1}
    assert [e.outcome for e in examples.chosen(rows, 2)] == ["win", "loss"]
    assert examples.chosen(rows, 9) == rows


def test_labels_are_parted_by_what_the_run_says():
    told = {"prompt": ["p"], "reference": ["x|y"], "tfidf_prediction": ["q"], "prediction": ["x|z"],
            "tfidf_nats": [2.0], "nats": [1.0], "decisions": [3]}  # fmt: skip
    f1 = lambda separator: [(m.before, m.after) for m in examples.of(told, separator)[0].measures][1]  # noqa: E731
    assert f1("|") == (0.0, 0.5)
    assert f1(",") == (0.0, 0.0)


def test_page_parts_labels_by_what_the_run_says(tmp_path):
    folder = sweep(tmp_path / "s", 2, "labels")
    for n in range(2):
        table = compare.read_table(folder / str(n) / "examples.parquet")
        parted = {k: [v.replace(", ", "|") for v in told] if told and isinstance(told[0], str) else told
                  for k, told in table.items()}  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(parted), folder / str(n) / "examples.parquet")
        trial = read_json(folder / str(n) / "trial.json")
        trial["config"]["eval.labels"] = "|"
        write_json(folder / str(n) / "trial.json", trial)
    by_commas = sweep(tmp_path / "commas", 2, "labels")
    outcomes = [[e.outcome for e in report.gather(f).rows] for f in (folder, by_commas)]
    assert outcomes[0] == outcomes[1] and len({*outcomes[0]}) == 3
