"""What is drawn of a sweep."""

import pytest
from made import sweep

from ftexp import compare, report
from ftexp.files import read_json, write_json
from ftexp.page import figures


@pytest.fixture
def few(tmp_path):
    return report.gather(sweep(tmp_path / "few", 6, pruned=1, failed=1))


def test_every_trial_has_a_curve_and_the_best_lies_on_top(few):
    drawn = figures.curves(few)
    assert drawn.count('class="run ') == 6
    assert drawn.rfind('class="run best"') == drawn.rfind('class="run ')
    assert f"base {few.winner.scores['base/loss']:.4f}" in drawn


def test_looks_are_told_apart(few):
    looks = figures.look(few)
    assert looks[5] == "pruned" and looks[4] == "failed"
    assert len(set(looks.values())) == 6


def test_front_is_what_no_other_beats(few):
    points = [(p.scores["cost/trainable"], p.scores["valid/loss"]) for p in few.complete]
    by_hand = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert {
        (p.scores["cost/trainable"], p.scores["valid/loss"]) for p in figures.front(few, "cost/trainable")
    } == by_hand


def test_no_front_of_a_cost_that_is_the_same(tmp_path):
    folder = sweep(tmp_path / "s", 3)
    for n in range(3):
        told = read_json(folder / str(n) / "trial.json")
        told["scores"]["cost/trainable"] = 5.0
        write_json(folder / str(n) / "trial.json", told)
    assert figures.pareto(report.gather(folder), "cost/trainable") is None
    assert figures.pareto(report.gather(folder), "cost/seconds") is not None


@pytest.mark.parametrize(
    ("label", "wanted"),
    [("lora=rslora lora.r=4", "rslora"), ("lora.r=4 lora=dora seed+1", "dora"), ("lora.r=4", None),
     ("lora=a b lora.r=4", "a b"), ("lora.r=4 +lora=x", "x")],
)  # fmt: skip
def test_choice_of_a_file_is_read_from_the_overrides(label, wanted):
    assert compare.value_of({"config": {"lora.r": 4}, "label": label}, "lora", ("lora", "lora.r")) == wanted


def test_a_key_of_many_numbers_is_drawn(tmp_path):
    found = report.gather(sweep(tmp_path / "s", 12))
    assert figures.spread(found, "trainer.lr").count('class="dot') == 12
    assert figures.spread(found, "lora.r") is None
    assert list(figures.effects(found)) == ["lora.r", "trainer.lr"]


def test_a_key_is_drawn_where_it_is_searched(tmp_path):
    """Two points of a condition have the config's rate and no part in ranges of it."""
    folder = sweep(tmp_path / "s", 14)
    for n in (3, 7):
        told = read_json(folder / str(n) / "trial.json")
        told["label"] = told["label"].split(" trainer.lr")[0]
        write_json(folder / str(n) / "trial.json", told)
    found = report.gather(folder)
    assert figures.spread(found, "trainer.lr").count('class="dot') == 12
    *ranges, rest = figures.effects(found)["trainer.lr"]
    assert [b.trials for b in ranges] == [3, 3, 3, 3]
    assert (rest.low, rest.trials) == ("(not searched)", 2)
