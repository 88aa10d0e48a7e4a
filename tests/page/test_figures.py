"""What is drawn of a sweep."""

import re
import shutil

import pytest
from made import sweep

from ftexp import board as boards
from ftexp import compare, report
from ftexp.files import read_json, write_json
from ftexp.page import figures
from ftexp.page import html as page


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


def edited(folder, scores):
    """Give trials scores of their own."""
    for n, own in enumerate(scores):
        told = read_json(folder / str(n) / "trial.json")
        told["scores"] |= own
        write_json(folder / str(n) / "trial.json", told)
    return folder


def test_the_objective_is_drawn_against_each_further_one(tmp_path):
    """Memory and a score that is to be large, once each; seconds are drawn anyway."""
    names = ["valid/loss", "cost/memory_gib", "cost/seconds", "valid/exact_match"]
    told = [(0.1, 3.0, 0.2), (0.2, 2.0, 0.5), (0.3, 1.0, 0.4), (0.4, 3.0, 0.9)]
    folder = edited(sweep(tmp_path / "s", 4, objectives=names), [
        {"valid/loss": loss, "cost/memory_gib": gib, "valid/exact_match": share} for loss, gib, share in told
    ])  # fmt: skip
    found = report.gather(folder)
    assert list(figures.against(found)) == ["cost/trainable", "cost/seconds", "cost/memory_gib", "valid/exact_match"]
    assert [p.numbers for p in figures.front(found, "cost/memory_gib")] == ["2", "1", "0"]
    assert [p.numbers for p in figures.front(found, "valid/exact_match")] == ["3", "1", "0"]
    steps = re.search(r'class="line front" d="M([\d.]+) [\d.]+H([\d.]+)V', figures.pareto(found, "valid/exact_match"))
    assert float(steps[1]) > float(steps[2])  # from the largest share to lower ones
    drawn = page.cost(found)
    assert (
        drawn.count("valid/loss against cost/seconds") == 0 and drawn.count("seconds of training and scoring, 4") == 1
    )
    for name, both in (("cost/memory_gib", "both cheaper in cost/memory_gib and better"),
                       ("valid/exact_match", "better in both valid/loss and valid/exact_match")):  # fmt: skip
        assert drawn.count(f"valid/loss against {name}, 4 points") == 1
        assert f"On the front, no other is {both}: " in drawn
    assert "Quality against cost and other objectives" in page.page(found)
    assert "and other objectives" not in page.page(report.gather(sweep(tmp_path / "one", 4)))


def test_points_above_a_bound_are_on_no_front(tmp_path):
    """The first beats both others and may not be chosen: the terminal's front has those two, and so has the page's."""
    told = [(0.1, 10.0, 3.0), (0.2, 20.0, 2.0), (0.3, 15.0, 2.0)]
    scores = [{"valid/loss": loss, "cost/seconds": s, "cost/memory_gib": gib} for loss, s, gib in told]
    names, options = ["valid/loss", "cost/seconds"], {"replicates": 1, "at_most": {"cost/memory_gib": 2.5}}
    folder = edited(sweep(tmp_path / "s", 3, objectives=names, options=options), scores)
    found = report.gather(folder)
    assert [p.numbers for p in figures.front(found, "cost/seconds")] == ["2", "1"]
    assert {boards.label(p) for p in figures.front(found, "cost/seconds")} == set(found.verdict.front)
    assert figures.pareto(found, "cost/seconds").count('class="dot ') == 3
    assert "Points above a bound of sweep.at_most are on none." in page.cost(found)
    free = report.gather(edited(sweep(tmp_path / "free", 3, objectives=names), scores))
    assert [p.numbers for p in figures.front(free, "cost/seconds")] == ["0"]
    assert "at_most" not in page.cost(free)


def test_points_without_a_further_score_are_left_out(tmp_path):
    folder = edited(
        sweep(tmp_path / "s", 3, objectives=["valid/loss", "valid/f1"]), [{"valid/f1": 0.5}, {"valid/f1": 0.6}]
    )
    assert "valid/loss against valid/f1, 2 points" in figures.pareto(report.gather(folder), "valid/f1")
    edited(folder, [{}, {"valid/f1": float("nan")}])
    assert figures.pareto(report.gather(folder), "valid/f1") is None


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


def test_scores_of_different_kinds_have_no_means(tmp_path):
    """The page says why; a point above a bound counts too, since it stands in the means."""
    scores = [{"cost/memory_gib": gib} for gib in (1.0, 3.0, 1.0)]
    options = {"replicates": 1, "at_most": {"cost/memory_gib": 2.5}}
    folder = edited(sweep(tmp_path / "s", 3, options=options), scores)
    assert figures.effects(report.gather(folder))
    told = read_json(folder / "1" / "trial.json")
    write_json(folder / "1" / "trial.json", told | {"config": told["config"] | {"trainer.kind": "dpo"}})
    found = report.gather(folder)
    assert figures.effects(found) == {} and found.board.unlike is None
    assert page.effects(found) == (
        "<p>No mean over values of a key is drawn: trials 0 and 1 were scored by different trainer.kind, whose "
        "valid/loss is of another kind.</p>"
    )


def test_a_point_that_was_drawn_again_counts_once_in_the_means(tmp_path):
    folder = sweep(tmp_path / "s", 4)
    before = figures.effects(report.gather(folder))
    first = read_json(folder / "0" / "trial.json")
    for n in range(4, 8):
        shutil.copytree(folder / "0", folder / str(n))
        write_json(folder / str(n) / "trial.json", first)
    assert figures.effects(report.gather(folder)) == before
    assert len(report.gather(folder).complete) == 4
