"""Openings of sealed rows, read back and told."""

import math

import pytest
from made import by_label, confirmed, sweep

from ftexp import report, sealed
from ftexp.files import read_json, write_json
from ftexp.page import html


def test_no_opening_says_nothing(tmp_path):
    folder = sweep(tmp_path / "s")
    assert sealed.openings(folder) == [] and sealed.labels(folder) == []


def test_what_is_not_finished_says_so(tmp_path):
    (entry,) = sealed.openings(confirmed(sweep(tmp_path / "s"), finished=False))
    (line,) = sealed.lines(entry)
    assert line.endswith("sealed rows opened 1 time: not finished.")


@pytest.mark.parametrize(
    ("low", "value", "high", "told"),
    [(-0.01, 0.02, 0.05, "0.0200 (-0.0100 to 0.0500) better"), (-0.05, -0.02, 0.01, "0.0200 (-0.0100 to 0.0500) worse"),
     (None, -0.02, None, "0.0200 worse"), (None, 0.0, None, "0.0000 better")],
)  # fmt: skip
def test_optimism_below_zero_is_worse(low, value, high, told, tmp_path):
    (entry,) = sealed.openings(confirmed(sweep(tmp_path / "s")))
    entry["result"]["members"][0]["optimism"] = {"value": value, "low": low, "high": high}
    assert f"The winner looked {told} in the sweep" in sealed.lines(entry)[1]


def test_what_one_row_cannot_tell_of_equals_is_left_out(tmp_path):
    (entry,) = sealed.openings(confirmed(sweep(tmp_path / "s")))
    assert "better in the sweep than on sealed rows; were all 3 points equal, 0.0099 would" in sealed.lines(entry)[1]
    alone = {**entry, "result": entry["result"] | {"points": 1, "expected_optimism": 0.0}}  # of one point, nor equals
    assert sealed.lines(alone)[1].endswith(" better in the sweep than on sealed rows.")
    entry["result"]["expected_optimism"] = math.nan
    assert sealed.lines(entry)[1].endswith(" better in the sweep than on sealed rows.")


def test_groups_of_sealed_rows_are_told(tmp_path):
    (entry,) = sealed.openings(confirmed(sweep(tmp_path / "s")))
    assert "Confirmed on 24 sealed rows and 2 fresh seeds: " in sealed.line(entry)
    entry["result"]["groups"] = 6
    assert "Confirmed on 6 groups (24 sealed rows) and 2 fresh seeds: " in sealed.line(entry)
    del entry["result"]["groups"]  # of before they were kept
    assert "Confirmed on 24 sealed rows and " in sealed.line(entry)


def test_noise_between_seeds_is_missing_only_where_no_point_has_two(tmp_path):
    """It is pooled over winner and cheapest, so that one seed of the winner leaves it out of no interval."""
    (entry,) = sealed.openings(confirmed(sweep(tmp_path / "s")))
    winner = entry["result"]["members"][0]
    told = lambda *members: [  # noqa: E731
        line for line in sealed.lines(entry | {"result": entry["result"] | {"members": list(members)}})
        if line.startswith("One fresh seed")
    ]  # fmt: skip
    one, cheapest = winner | {"seeds": [7]}, winner | {"role": "cheapest"}
    assert told(winner) == told(winner, cheapest) == []
    alone = ["One fresh seed: the intervals are over rows alone."]
    assert told(one) == told(one, cheapest | {"seeds": [8]}) == alone
    told_of = "One fresh seed of the {}: the noise between seeds in its interval is that of the {}."
    assert told(one, cheapest) == [told_of.format("winner", "cheapest")]
    assert told(winner, cheapest | {"seeds": [7]}) == [told_of.format("cheapest", "winner")]


def test_seeds_that_diverged_are_told_wherever_the_score_is(tmp_path):
    folder = confirmed(sweep(tmp_path / "s"))
    kept = read_json(folder / sealed.FILE)
    kept["openings"][0]["result"]["members"][0] |= {"seeds": [7], "failed": 2}
    write_json(folder / sealed.FILE, kept)
    assert "sealed rows and 1 fresh seed (2 of 3 seeds diverged): " in sealed.line(sealed.openings(folder)[-1])
    assert "24 rows, 1 fresh seed (2 of 3 seeds diverged), opened 1 time" in html._sealed(report.gather(folder))


def test_a_large_score_is_written_in_short():
    assert sealed.ranged({"value": 1.234e34, "low": 12.5, "high": 2e300}) == "1.2e+34 (12.5000 to 2.0e+300)"


def test_labels_are_means_over_seeds_where_all_have_a_number(tmp_path):
    folder = confirmed(sweep(tmp_path / "s", kind="labels"), labels=True)
    drama, _, war = sealed.labels(folder)
    assert drama == by_label(f1=0.6)[0]  # 0.5 of one seed and 0.7 of the other
    assert war["f1"] is None and war["true"] == 0
    told = by_label()
    told[0]["f1"] = None
    write_json(folder / "confirm" / "1" / sealed.LABELS, told)
    assert sealed.labels(folder)[0]["f1"] is None


def test_labels_of_the_cheapest_member_have_no_part(tmp_path):
    folder = confirmed(sweep(tmp_path / "s", kind="labels"), labels=True)
    kept = read_json(folder / sealed.FILE)
    kept["openings"][0]["runs"][1]["member"] = 1
    write_json(folder / sealed.FILE, kept)
    assert sealed.labels(folder)[0]["f1"] == 0.5


def test_another_winner_than_the_confirmed_one_is_told(tmp_path):
    (entry,) = sealed.openings(confirmed(sweep(tmp_path / "s"), trials=(1,)))
    assert sealed.moved(entry, [1], "x", "valid/loss") is None
    was, told = f"Confirmed was {entry['plan'][0]['label']}", lambda e, by: sealed.moved(e, [0], "lora.r=2", by)
    assert told(entry, "valid/loss") == f"{was}; first now is lora.r=2."
    by = entry | {"by": "valid/f1"}
    assert told(by, "valid/f1") == f"{was}, first by valid/f1; first now is lora.r=2."
    assert told(by, "valid/loss") == f"{was}, first by valid/f1; first by valid/loss is lora.r=2."
