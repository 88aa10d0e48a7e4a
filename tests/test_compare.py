"""The comparison of a sweep from its folder alone: made tables with known answers, and a real sweep."""

import json
import math
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import UNWRITTEN

from ftexp import board as boards
from ftexp import compare, metrics, power, report
from ftexp.errors import MachineError
from ftexp.files import read_json, write_json
from ftexp.page import figures
from ftexp.page import html as page
from ftexp.stats import explain

TEXT = [f"row {n} é" for n in range(40)]


@pytest.fixture
def sweep(tmp_path):
    """Return a function that writes a sweep: for each trial rank, shift of its nats, and keys of trial.json."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 20, len(TEXT))
    hard = tokens * rng.gamma(2, 0.2, len(TEXT))

    def make(*trials, replicates=1, objectives=("valid/loss",), prompts=None, axes=(), columns=(), **options):
        folder = tmp_path / "sweep"
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "sweep.json", {"objectives": list(objectives), "axes": list(axes),
                                           "options": {"replicates": replicates, "at_most": {}} | options})  # fmt: skip
        for number, (rank, shift, keys) in enumerate(trials):
            nats = hard + tokens * (shift + rng.normal(0, 0.02, len(TEXT)))
            right = (np.arange(len(TEXT)) < 40 - rank // 2).astype(float)
            loss = nats.sum() / tokens.sum()
            octets = sum(len(t.encode()) for t in TEXT)
            scores = {"valid/loss": loss, "valid/perplexity": math.exp(loss), "cost/trainable": rank * 1e6,
                      "valid/bits_per_byte": nats.sum() / math.log(2) / octets, "valid/f1": right.mean(),
                      "cost/memory_gib": 2.0, "cost/seconds": 60.0 + number}  # fmt: skip
            seed = f" seed+{number % replicates}" if replicates > 1 else ""
            write_json(folder / str(number) / "trial.json",
                       {"label": f"lora.r={rank}{seed}", "state": "complete", "scores": scores,
                        "config": {"lora.r": rank, "trainer.lr": 1e-3 + shift, "objectives": list(objectives)}} | keys)  # fmt: skip
            rows = {
                "prompt": prompts or TEXT,
                "reference": TEXT,
                "nats": nats,
                "tokens": tokens,
                "bytes": [len(text.encode()) for text in TEXT],
                "f1": right,
            }
            rows |= columns[number] if columns else {}
            pyarrow.parquet.write_table(pyarrow.table(rows), folder / str(number) / "examples.parquet")
        return folder

    return make


def chosen(told, **config):
    """Return the keys of a trial at which these were searched; others of its config were not."""
    label = " ".join(f"{key}={value}" for key, value in told.items())
    return {"label": label, "config": {"objectives": ["valid/loss"]} | config | told}


def read(folder):
    board = report.read(folder)
    return compare.read(folder, board.trials, board.objective)


def test_cheapest_of_those_that_cannot_be_told_apart(sweep):
    found = read(sweep((64, 0, {}), (16, 0.006, {}), (8, 0.5, {})))
    assert [found.points[n].label for n in found.same] == ["lora.r=64", "lora.r=16"]
    assert found.points[found.cheapest].label == "lora.r=16"
    assert found.cost == "cost/trainable"
    assert found.points[2].p < 0.001
    told = compare.lines(found)
    assert told[0].startswith(f"lora.r=64 is best (loss {found.points[0].score.value:.4f}, 95 % interval ")
    assert "not told apart from it: lora.r=16 (p=" in told[0]
    assert told[1] == "Cheapest of these 2 by trainable: lora.r=16."
    assert any("p is about these adapters, not about training again" in line for line in told)


@pytest.mark.parametrize(
    ("costs", "cheapest", "told"),
    [
        ([(1e6, 1.001), (1e6, 1.0), (1e6, 1.5)], None, None),  # of those that are the same, memory differs by chance
        ([(1e6, 2.0), (1e6, 1.0), (4e6, 3.0)], "lora.r=16", "cost/memory_gib"),  # weights set the loser apart, no other
        ([(1e6, 1.0), (1e6, 1.5), (1e6, 9.0)], "lora.r=64", "cost/memory_gib"),
        ([(1e6, 1.01), (1e6, 1.0), (2e6, 9.0)], None, None),
    ],
)
def test_cheapest_goes_by_what_sets_the_same_points_apart(sweep, costs, cheapest, told):
    folder = sweep((64, 0, {}), (16, 0.006, {}), (8, 0.5, {}))
    for number, (weights, memory) in enumerate(costs):
        trial = read_json(folder / str(number) / "trial.json")
        trial["scores"] |= {"cost/trainable": weights, "cost/memory_gib": memory}
        write_json(folder / str(number) / "trial.json", trial)
    found = read(folder)
    assert found.same == (0, 1)
    assert (None if found.cheapest is None else found.points[found.cheapest].label) == cheapest
    assert found.cost == told


def test_a_loser_without_the_cost_that_counts_is_no_hindrance(sweep):
    """It ran on a machine without a GPU, and what was measured there sets the others apart."""
    folder = sweep((64, 0, {}), (16, 0.006, {}), (8, 0.5, {}))
    for number, memory in enumerate((3.0, 2.0, None)):
        trial = read_json(folder / str(number) / "trial.json")
        gpu = {} if memory is None else {"cost/gpu_memory_gib": memory}
        write_json(
            folder / str(number) / "trial.json", trial | {"scores": trial["scores"] | {"cost/trainable": 1e6} | gpu}
        )
    found = read(folder)
    assert (found.cost, found.points[found.cheapest].label) == ("cost/gpu_memory_gib", "lora.r=16")


def test_a_cost_within_chance_of_the_best_is_not_cheaper(sweep):
    folder = sweep((64, 0, {}), (16, 0.006, {}), (8, 0.003, {}))
    best = read(folder).best
    for number in range(3):
        memory = 1.01 if number == best else 1.0 if number == (best + 1) % 3 else 1.5
        trial = read_json(folder / str(number) / "trial.json")
        trial["scores"] |= {"cost/trainable": 1e6, "cost/memory_gib": memory}
        write_json(folder / str(number) / "trial.json", trial)
    found = read(folder)
    assert (found.same, found.cost, found.cheapest) == ((0, 1, 2), "cost/memory_gib", best)


def test_optimism_is_of_all_points(sweep, monkeypatch):
    folder = sweep(*((2 * n, 0.01 * n, {}) for n in range(1, 9)))
    whole = read(folder).comparison.optimism
    monkeypatch.setattr(compare, "MOST_POINTS", 4)
    found = read(folder)
    assert found.behind == 4
    best = read(sweep(*((2 * n, 0.01 * n, {}) for n in range(1, 5)))).comparison.optimism
    ratio = 1.4236 / 1.0294  # expected maxima of 8 and 4 standard normal numbers (Tippett 1925)
    assert found.comparison.optimism == pytest.approx(ratio * best, rel=0.2)
    assert found.comparison.optimism == pytest.approx(whole, rel=0.3)
    assert found.comparison.optimism > 1.2 * best


def test_clear_winner_is_called_one(sweep):
    found = read(sweep((64, 0, {}), (16, 0.4, {}), (8, 0.5, {})))
    assert found.same == (0,)
    assert found.cheapest is None
    assert compare.lines(found)[0].endswith("told apart from all others (p <0.001).")


def test_replicates_are_one_point(sweep):
    """Ranks 64 and 16 at two seeds each: noise between seeds of 0.1 hides a difference of 0.02."""
    trials = [(64, 0, {}), (64, 0.14, {}), (16, 0.02, {}), (16, 0.16, {})]
    found = read(sweep(*trials, replicates=2))
    assert [(p.trials, p.label) for p in found.points] == [((0, 1), "lora.r=64"), ((2, 3), "lora.r=16")]
    assert found.same == (0, 1)
    assert found.comparison.seeds.sd == pytest.approx(0.14 / math.sqrt(2), rel=0.1)
    assert any(line.startswith("Between seeds: standard deviation 0.") for line in compare.lines(found))
    as_single = read(sweep(*trials))  # the twin: each run its own point, and noise passes for a winner
    assert len(as_single.same) < 4


def test_point_of_unstable_training_is_named(sweep):
    trials = [(64, 0, {}), (64, 0.01, {}), (64, 0.02, {}), (16, 0.4, {}), (16, 0.41, {}), (16, 0.42, {})]
    calm = read(sweep(*trials, replicates=3))
    assert compare.noisier(calm) == ""
    folder = sweep(*trials, (8, 2, {}), (8, 4, {}), (8, 9, {}), replicates=3)
    line = "Seeds of lora.r=8 scatter more than those of the others: it is judged by noise of its own."
    assert compare.lines(read(folder))[-1] == line
    assert line in page._noise(report.gather(folder))
    assert read(folder).points[1].p < 0.01  # told from the best as without the third


def test_points_that_failed_are_left_out_and_counted(sweep):
    failed = {"state": "failed", "error": "diverged"}
    folder = sweep((64, 0, {}), (64, 0, {}), (16, 0, {}), (16, 0, failed), (8, 0, {}), (8, 0, {}), replicates=2)
    found = read(folder)
    assert [p.trials for p in found.points] == [(0, 1), (4, 5)]
    assert found.left_out == 1
    assert "Left out of the comparison: 1 point" in compare.lines(found)[-1]
    nan = read_json(folder / "4" / "trial.json")
    nan["scores"]["valid/loss"] = math.nan
    write_json(folder / "4" / "trial.json", nan)
    assert read(folder).left_out == 2


def overflown(folder, number, loss=805.6):
    """Give a trial a loss whose exp no float holds; files have null for it."""
    told = read_json(folder / str(number) / "trial.json")
    told["scores"] |= {"valid/loss": loss, "valid/perplexity": None}
    write_json(folder / str(number) / "trial.json", told)


def test_perplexity_that_is_too_large_is_told_as_that(sweep, capsys):
    """It was "not complete" on one line and told as undefined of the rows on another."""
    folder = sweep((64, 0, {}), (16, 0.1, {}), (8, 0.2, {}))
    overflown(folder, 2)
    large = "valid/perplexity is too large for a number: e to a loss above 709"
    report.show(folder, by="valid/perplexity")
    out = " ".join(capsys.readouterr().out.split())
    assert f"Left out of the comparison: 1 point, whose {large}." in out and "│ 805.6000 │ inf │" in out
    own = sweep((64, 0, {}), (16, 0.1, {}), (8, 0.2, {}), objectives=["valid/perplexity"])
    overflown(own, 2)
    report.show(own)
    out = " ".join(capsys.readouterr().out.split())
    assert f"trial 2 failed: {large}" in out and "not complete" in out
    folder = sweep((64, 0, {}), (16, 0.1, {"state": "failed"}), (8, 0.2, {}))
    for number in (0, 2):
        overflown(folder, number)
    board, verdict = report.judge(folder, "valid/perplexity")
    assert compare.lines(verdict) == [f"No point that is complete can be ranked, {large}."] and board.best is None
    overflown(folder, 0, math.log(2.0))
    assert metrics.why_not("valid/perplexity", {"valid/loss": 709.0, "valid/perplexity": math.nan}) == "is not finite"
    told = read_json(folder / "0" / "trial.json")
    write_json(folder / "0" / "trial.json", told | {"scores": told["scores"] | {"valid/perplexity": 2.0}})
    assert compare.lines(report.judge(folder, "valid/perplexity")[1])[-1] == (
        f"Left out of the comparison: 1 point, not complete; 1 point, whose {large}."
    )


def test_large_perplexities_are_written_in_short(sweep, capsys):
    """Thirty digits of one left no room for the other columns."""
    folder = sweep(
        (64, 0, {}), (64, 0.1, {}), (16, 60, {}), (16, 60.1, {}), replicates=2, objectives=["valid/perplexity"]
    )
    report.show(folder)
    out, text = capsys.readouterr().out, (folder / "report.html").read_text(encoding="utf-8")
    (line,) = [line for line in out.splitlines() if "│ lora.r=16" in line]
    loss, perplexity, between = (cell.strip() for cell in np.array(line.split("│"))[[5, 6, 8]])
    first, second = (read_json(folder / str(n) / "trial.json")["scores"]["valid/perplexity"] for n in (2, 3))
    assert float(loss) == pytest.approx(math.log(float(perplexity)), abs=0.05)
    assert re.fullmatch(r"\d\.\de\+26", perplexity) and re.fullmatch(r"\d\.\de\+25", between)
    assert float(between) == pytest.approx(abs(first - second) / math.sqrt(2), rel=0.06)
    assert not re.search(r"\d{12}\.\d", text) and not re.search(r"\d{12}\.\d", report.export(folder, "md"))
    assert perplexity in text and perplexity in report.export(folder, "md")


def test_point_above_a_bound_is_never_best(sweep):
    found = read(sweep((64, 0, {}), (8, 0.5, {}), at_most={"cost/trainable": 20e6}))
    assert [p.label for p in found.points] == ["lora.r=8"]


@pytest.mark.parametrize("objective", ["valid/loss", "valid/perplexity", "valid/bits_per_byte", "valid/f1"])
def test_score_of_rows_is_the_score_of_the_trial(sweep, objective):
    folder = sweep((64, 0.5, {}), (16, 0, {}), objectives=[objective])
    found = read(folder)
    for number, point in enumerate(found.points):
        assert point.score.value == pytest.approx(read_json(folder / str(number) / "trial.json")["scores"][objective])
        assert point.score.low < point.score.value < point.score.high
    assert found.best == 1
    assert found.best == report.read(folder).best


def test_rows_that_do_not_add_up_are_not_tested(sweep):
    folder = sweep((64, 0, {}), (16, 0, {}))
    trial = read_json(folder / "1" / "trial.json")
    trial["scores"]["valid/loss"] += 0.01
    write_json(folder / "1" / "trial.json", trial)
    assert "examples.parquet of trial 1 gives valid/loss" in read(folder).untested


def test_other_rows_are_not_compared(sweep):
    folder = sweep((64, 0, {}), (16, 0, {}))
    path = folder / "1" / "examples.parquet"
    table = pyarrow.parquet.read_table(path).to_pydict()
    table["prompt"][0] = "another"
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    found = read(folder)
    assert found.untested == "trials 0 and 1 were scored on other rows"
    told = ["not tested: trials 0 and 1 were scored on other rows",
            "So the leaderboard's order is no ranking, and no point is best."]  # fmt: skip
    assert compare.lines(found) == told


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_table_that_cannot_be_read_leaves_the_ranking(sweep, damage, capsys):
    folder = sweep((64, 0, {}), (16, 0.3, {}))
    path = folder / "1" / "examples.parquet"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:100])
    report.show(folder)
    out = capsys.readouterr().out
    assert "0 best" in out
    assert "not tested: trial 1 has no examples.parquet that can be read" in out


def test_cost_as_objective_has_no_test(sweep):
    found = read(sweep((64, 0, {}), (16, 0, {}), objectives=["cost/memory_gib", "valid/loss"]))
    assert found.untested.startswith("cost/memory_gib is one number a trial")
    assert found.comparison is None
    assert found.front == ("lora.r=16",)  # equal memory: the loss decides


def test_front_of_two_objectives(sweep):
    found = read(sweep((64, 0, {}), (16, 0.5, {}), (32, 0.9, {}), objectives=["valid/loss", "cost/trainable"]))
    assert found.front == ("lora.r=64", "lora.r=16")
    assert "On the Pareto front: lora.r=64; lora.r=16." in compare.lines(found)


def test_scores_of_different_kinds_have_no_front(sweep):
    of = [{"facts": {"tokenizer_sha256": name}} for name in "ab"]
    folder = sweep((64, 0, of[0]), (16, 0.5, of[1]), objectives=["valid/loss", "cost/trainable"])
    assert read(folder).front == ()
    assert figures.front(report.gather(folder), "cost/trainable") == []
    assert "No point is on the front." in page.cost(report.gather(folder))


def test_of_many_points_the_best_are_compared(sweep, monkeypatch):
    monkeypatch.setattr(compare, "MOST_POINTS", 3)
    folder = sweep((64, 0.5, {}), (32, 0, {}), (16, 0.9, {}), (8, 0.3, {}), (4, 0.7, {}))
    found = read(folder)
    assert [p.label for p in found.points] == ["lora.r=64", "lora.r=32", "lora.r=8"]
    assert "Compared are the best 3 points; 2 score below them." in compare.lines(found)
    assert "told apart from the 2 others compared (p <0.001)." in compare.lines(found)[0]
    assert page._same(report.gather(folder)) == "None of the other 2 points that were compared."
    monkeypatch.setattr(compare, "MOST_POINTS", 5)
    assert "told apart from all others (p " in compare.lines(read(folder))[0]
    assert page._same(report.gather(folder)) == "None of the other 4 points."


def test_memory_that_moves_by_chance_is_no_cost(sweep):
    found = read(sweep((16, 0, {}), (16, 0, {})))
    assert (found.cost, found.cheapest) == (None, None)


def test_rows_with_one_prompt_are_one_unit(sweep):
    found = read(sweep((64, 0, {}), (16, 0, {}), prompts=[f"prompt {n // 4}" for n in range(40)]))
    assert (found.rows, found.groups, found.units) == (40, 10, 10)
    assert any(line.startswith("10 groups (40 rows): this sweep finds ") for line in compare.lines(found))


def test_one_unit_tells_no_noise(sweep):
    found = read(sweep((64, 0, {}), (16, 0.3, {}), prompts=["one"] * 40))
    assert (found.rows, found.groups) == (40, 1)
    assert math.isnan(found.comparison.spread.rows) and math.isnan(found.comparison.optimism)
    assert not any("too good" in line or "nan" in line for line in compare.lines(found))


def test_few_rows_that_can_tell_nothing_say_so(sweep):
    """Five signs have no p below 2 / 2 ** 5; the JSON has no number for what such a sweep finds."""
    folder = sweep((64, 0, {}), (8, 0.5, {}), prompts=[f"{n % 5}" for n in range(40)])
    found = read(folder)
    (told,) = [line for line in compare.lines(found) if line.startswith("5 groups (40 rows): ")]
    too_few = "too few groups to tell any difference"
    assert told.startswith(f"5 groups (40 rows): {too_few}; were all points equal, the best would look 0.")
    gathered = report.gather(folder)
    assert report.data(gathered)["detectable"] is None
    assert "Too few groups to tell any difference: 5 groups (40 rows)" in page._noise(gathered)
    assert [report.data(gathered)[key] for key in ("rows", "groups")] == [40, 5]


@pytest.mark.parametrize(("third", "which"), [(None, "points"), (0.3, "most pairs of points")])
def test_differences_that_are_rounding_are_told_in_words(sweep, third, which):
    """Each row is worse by 0.1, save for the last digit: the sweep "finds a difference of 9.4e-18"."""
    shares = [{"f1": [0.1 + by] * 40} for by in (0.0, 0.1, third) if by is not None]
    trials = [(8 * 2**n, 0, {}) for n in range(len(shares))]
    folder = sweep(*trials, columns=shares, objectives=["valid/f1"])
    for n, share in enumerate(shares):
        told = read_json(folder / str(n) / "trial.json")
        write_json(folder / str(n) / "trial.json", told | {"scores": told["scores"] | {"valid/f1": share["f1"][0]}})
    found = read(folder)
    assert 0 <= found.comparison.optimism < 1e-12 and found.detectable < 1e-12
    same = f"{which} differ by the same in every row, or not at all"
    assert f"40 rows: {same}, so that no smallest difference can be told." in compare.lines(found)
    assert f"{same[0].upper()}{same[1:]}: 40 rows" in page._noise(report.gather(folder))
    assert power.measured(folder)[0].rows == 0.0


def test_seeds_that_change_nothing_say_so(sweep):
    rng = np.random.default_rng(0)
    one, other = ({"f1": rng.random(40)} for _ in range(2))
    trials = [(rank, 0, {}) for rank in (8, 8, 16, 16)]
    folder = sweep(*trials, columns=[one, one, other, other], objectives=["valid/f1"], replicates=2)
    for n, share in enumerate([one, one, other, other]):
        told = read_json(folder / str(n) / "trial.json")
        write_json(folder / str(n) / "trial.json", told | {"scores": told["scores"] | {"valid/f1": share["f1"].mean()}})
    assert "Between seeds: no difference." in compare.lines(read(folder))
    assert page._noise(report.gather(folder)).startswith("Between seeds: no difference.<br>Smallest difference")


def test_rows_of_one_document_are_one_unit(sweep):
    units = {"unit": [n // 8 for n in range(40)]}
    folder = sweep((64, 0, {}), (16, 0, {}), columns=[units, units])
    assert read(folder).groups == 5


def test_rows_without_a_prompt_are_told_apart(sweep):
    """Text rows have no prompt: as one unit they would decide nothing."""
    found = read(sweep((64, 0, {}), (16, 0.5, {}), prompts=[""] * 40))
    assert (found.rows, found.groups, found.units) == (40, None, 40)
    assert found.same == (0,)
    assert found.points[1].p < 0.001


@pytest.mark.parametrize(("objective", "told"), [
    ("valid/loss", "in tokens of different tokenizers: objectives=[valid/bits_per_byte] compares them"),
    ("valid/bits_per_byte", None), ("valid/f1", None),
])  # fmt: skip
def test_losses_of_different_tokenizers_are_not_compared(sweep, objective, told):
    trials = [(64, 0, {"facts": {"tokenizer_sha256": name}}) for name in "ab"]
    found = read(sweep(*trials, objectives=[objective]))
    assert found.untested == (told and f"trials 0 and 1 were scored {told}")


@pytest.mark.parametrize(("kind", "told"), [
    ("dpo", "which valid/loss grows with: objectives=[valid/accuracy] compares them"),
    ("rloo", "which valid/loss grows with: objectives=[valid/reward] compares them"), ("sft", None),
])  # fmt: skip
def test_losses_that_beta_scales_are_not_compared(sweep, kind, told):
    how = [
        {"trainer.kind": kind, "trainer.beta": beta, "objectives": ["valid/loss"], "lora.r": 8} for beta in (0.1, 0.5)
    ]
    found = read(sweep(*((8, 0, {"config": one}) for one in how)))
    assert found.untested == (told and f"trials 0 and 1 were scored with different trainer.beta, {told}")


@pytest.mark.parametrize(("names", "first", "second", "told"), [
    ("base/loss test/loss train/loss", {"trainer.kind": "sft"}, {"trainer.kind": "dpo"}, "by different trainer.kind"),
    ("tfidf/loss", {"trainer.kind": "classify"}, {"trainer.kind": "reward"}, "by different trainer.kind"),
    ("base/loss base/perplexity test/loss train/loss", {"tokenizer": "a"}, {"tokenizer": "b"},
     "in tokens of different tokenizers: objectives=[valid/bits_per_byte] compares them"),
    ("forgetting/before forgetting/loss valid/kl base/length", {"tokenizer": "a", "trainer.kind": "rloo"},
     {"tokenizer": "b", "trainer.kind": "rloo"}, "in tokens of different tokenizers"),
    ("base/bits_per_byte test/f1 cost/trainable", {"tokenizer": "a"}, {"tokenizer": "b"}, None),
    ("valid/loss tfidf/loss train/loss", {"tokenizer": "a", "trainer.kind": "classify"},
     {"tokenizer": "b", "trainer.kind": "classify"}, None),
    ("base/loss test/margin train/loss", {"trainer.kind": "dpo", "trainer.beta": 0.1},
     {"trainer.kind": "dpo", "trainer.beta": 0.5}, "with different trainer.beta"),
    ("test/loss train/loss", {"trainer.kind": "rloo", "trainer.beta": 0.1},
     {"trainer.kind": "rloo", "trainer.beta": 0.5}, "with different trainer.beta"),
    ("test/accuracy base/chosen_loss", {"trainer.kind": "dpo", "trainer.beta": 0.1},
     {"trainer.kind": "dpo", "trainer.beta": 0.5}, None),
    ("train/loss", {"trainer.loss": "focal"}, {"trainer.loss": "focal", "trainer.loss_strength": 1.0},
     "with different trainer.loss"),
    ("train/loss", {}, {"trainer.loss": "nll", "trainer.loss_strength": None}, None),
    ("valid/loss base/loss", {"trainer.loss": "focal"}, {"trainer.loss": "dft"}, None),
    ("forgetting/before forgetting/loss", {"trainer.kind": "sft"}, {"trainer.kind": "dpo"}, None),
    ("forgetting/after", {"general": "a"}, {"general": "b"}, "on other general text"),
])  # fmt: skip
def test_what_holds_of_held_out_scores_holds_of_others(names, first, second, told):
    def trial(keys):
        facts = {"tokenizer_sha256": keys.get("tokenizer"), "general_sha256": keys.get("general")}
        return {"config": {k: v for k, v in keys.items() if k.startswith("trainer.")}, "facts": facts}

    for name in names.split():
        for one, two in ((first, second), (second, first)):
            found = boards.other_scale(trial(one), trial(two), name)
            assert found == told or (told and found.startswith(told)), name


def test_losses_of_training_that_are_not_of_one_kind_have_no_best(sweep):
    """There are no rows of them to be tested, which had hidden it."""
    how = [chosen({"trainer.beta": beta}, **{"trainer.kind": "dpo", "lora.r": 8}) for beta in (0.1, 0.5)]
    trials = [(8, 0, one | {"scores": {"train/loss": 0.5, "cost/trainable": 1.0}}) for one in how]
    found = read(sweep(*trials, objectives=["train/loss"]))
    assert found.best is None and "different trainer.beta" in found.untested


def test_rows_that_were_cut_otherwise_are_not_compared(sweep):
    trials = [(64, 0, {"facts": {"tokenizer_sha256": "a"}})] * 2
    found = read(sweep(*trials, columns=[{}, {"bytes": [5] * 40}]))
    assert found.untested.startswith("trials 0 and 1 were scored on other parts of the rows: data.long=cut leaves")


def test_list_valued_keys_have_a_share(sweep):
    targets = [["q_proj"], ["q_proj", "v_proj"]]
    configs = [{"lora.r": (8, 16, 64)[n % 3], "lora.targets": targets[n // 9]} for n in range(18)]
    trials = [(8, 0.05 * n, chosen(told)) for n, told in enumerate(configs)]
    found = read(sweep(*trials, axes=[{"key": "lora.r"}, {"key": "lora.targets"}]))
    assert list(found.importance) == ["lora.targets", "lora.r"]


def test_point_that_was_drawn_again_counts_once(sweep):
    folder = sweep((8, 0, {}), (16, 0.1, {}))
    shutil.copytree(folder / "0", folder / "2")
    found = read(folder)
    assert [p.trials for p in found.points] == [(0,), (1,)]
    assert (found.repeated, found.left_out) == (1, 0)
    assert "1 point was drawn again, with the same config and seed: such a point counts once." in compare.lines(found)


def test_best_by_perplexity_is_the_best_by_loss_over_seeds(sweep):
    """Mean perplexities would rank one that is now much worse, now much better, behind its equal in loss."""
    folder = sweep((64, -0.4, {}), (64, 0.4, {}), (16, 0.05, {}), (16, 0.05, {}), replicates=2,
                   objectives=["valid/perplexity"])  # fmt: skip
    board = report.read(folder)
    found = compare.read(folder, board.trials, board.objective)
    assert found.points[found.best].trials == tuple(t["number"] for t in board.points[board.best].trials) == (0, 1)
    assert board.points[0].scores["valid/perplexity"] == pytest.approx(math.exp(board.points[0].scores["valid/loss"]))


def test_importance_of_searched_keys(sweep):
    configs = [{"lora.r": (8, 16, 64)[n % 3], "trainer.lr": 1e-3 + 0.05 * n} for n in range(18)]
    trials = [(8, 0.05 * n, chosen(told)) for n, told in enumerate(configs)]
    found = read(sweep(*trials, axes=[{"key": "lora.r"}, {"key": "trainer.lr"}, {"key": "lora"}]))
    assert list(found.importance) == ["trainer.lr", "lora.r"]
    assert any(line.startswith("What sets the best points apart") for line in compare.lines(found))


def test_product_of_alpha_and_rate_is_told_where_both_were_searched(sweep):
    configs = [{"lora.alpha": (8, 32)[n % 2], "trainer.lr": 10.0 ** -(n % 3 + 2)} for n in range(12)]
    trials = [(8, 0.05 * n, chosen(told, **{"lora.r": 8})) for n, told in enumerate(configs)]
    axes = [{"key": "lora.alpha"}, {"key": "trainer.lr"}]
    found = read(sweep(*trials, axes=axes))
    assert found.rate is not None
    assert any(line.startswith("alpha and learning rate were both searched: ") for line in compare.lines(found))
    assert read(sweep(*trials, axes=axes[1:])).rate is None


@pytest.mark.parametrize(("rate", "advised"), [
    ((0.9, 0.9, 0.3, 0.5), True), ((0.9, 0.94, 0.3, 0.84), True), ((0.9, 0.96, 0.3, 0.5), False),
    ((0.9, 0.9, 0.86, 0.1), False), ((0.9, 0.9, 0.1, 0.86), False),  # one of the two does it all
    ((0.29, 0.1, 0.0, 0.1), False), ((0.31, 0.1, -0.2, 0.1), True),
])  # fmt: skip
def test_their_product_is_advised_where_neither_alone_does_it(rate, advised):
    told = compare.rate_line(explain.Together(*rate))
    assert ("They act through their product: sweep=effective_rate" in told) == advised


def test_noise_and_a_rate_alone_advise_no_product():
    """Where the learning rate alone acts, 49 of these 200 sweeps advised the product."""
    told = {"noise": 0, "rate": 0, "product": 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        alpha, lr = rng.choice([8, 16, 32], 12), 10 ** rng.uniform(-5, -2.5, 12)
        noise = rng.normal(0, 0.3, 12)
        acting = {"noise": np.zeros(12), "rate": np.log10(lr) + 3.8, "product": np.log10(alpha * lr / 16) + 3.8}
        for name, by in acting.items():
            found = explain.together(alpha.tolist(), lr.tolist(), (0.6 * by**2 + noise).tolist())
            told[name] += "They act" in compare.rate_line(found)
    assert told["noise"] <= 20 and told["rate"] <= 20 and told["product"] >= 60


def test_points_at_which_a_condition_leaves_a_key_out_have_no_part_in_what_it_did(sweep):
    """Five points without an adapter have the config's rank and alpha, which nobody searched there."""
    with_one = [
        {"lora": ("default", "dora")[n % 2], "lora.r": (2, 4, 8)[n % 3], "lora.alpha": (8, 32)[n % 2], "trainer.lr": lr}
        for n, lr in enumerate([1e-4, 1e-3, 1e-2] * 4)
    ]
    without = [{"lora": "none", "trainer.lr": 1e-4 * (n + 1)} for n in range(5)]
    trials = [(8, 0.01 * n, chosen(told, **{"lora.r": 16, "lora.alpha": 32} | told))
              for n, told in enumerate([*with_one, *without])]  # fmt: skip
    axes = [{"key": key} for key in ("lora", "lora.r", "lora.alpha", "trainer.lr")]
    folder = sweep(*trials, axes=axes)
    bins = figures.effects(report.gather(folder))
    assert [(b.low, b.trials) for b in bins["lora.r"]] == [(2, 4), (4, 4), (8, 4), ("(not searched)", 5)]
    assert [(b.low, b.trials) for b in bins["lora.alpha"]] == [(8, 6), (32, 6), ("(not searched)", 5)]
    assert sum(b.trials for b in bins["trainer.lr"]) == 17
    assert "did not meet the key's condition" in page.effects(report.gather(folder))
    rate = read(folder).rate
    for n in range(12, 17):
        shutil.rmtree(folder / str(n))
    assert read(folder).rate == rate is not None  # of the points that search both
    assert "did not meet" not in page.effects(report.gather(folder))


def test_a_key_that_some_points_do_not_search_has_no_share_for_that(sweep):
    """Whether there is an adapter sets the best apart; its rank does not, though it is there in the best alone."""
    told = [{"lora": "default", "lora.r": (2, 4)[n % 2]} if n < 10 else {"lora": "none"} for n in range(40)]
    trials = [(8, 0.001 * (n // 2) if n < 10 else 0.5 + 0.01 * n, chosen(one, **{"lora.r": 16} | one))
              for n, one in enumerate(told)]  # fmt: skip
    shares = read(sweep(*trials, axes=[{"key": "lora"}, {"key": "lora.r"}])).importance
    assert shares["lora"].value > 0.95


def test_single_run_shows_its_interval(sweep):
    folder = sweep((64, 0, {})) / "0"
    board = report.read(folder)
    (line,) = compare.lines(compare.read(folder, board.trials, board.objective))
    assert line.startswith("lora.r=64: loss 0.")
    assert "95 % interval" in line


def test_empty_sweep_says_nothing(sweep):
    assert compare.lines(read(sweep())) == []


def test_real_sweep_is_compared(cli, tmp_path):
    code, out, err = cli(*UNWRITTEN, "track=none", "eval=loss", "lora.r=2,4", "sweep.replicates=2", "name=real", "-m")
    assert code == 0, err
    found = read(tmp_path / "outputs" / "sweeps" / "real")
    assert [p.trials for p in found.points] == [(0, 1), (2, 3)]
    assert found.untested is None
    assert found.rows == 12
    assert f"{found.points[found.best].label} is best (loss " in out


def test_of_equal_points_the_leaderboards_first_is_best(sweep):
    """Shares tie often; the sums over rows in another order must not choose another point."""
    rng = np.random.default_rng(0)
    for case in range(30):
        column = rng.random(len(TEXT))
        shares = [{"f1": rng.permutation(column)} for _ in range(4)]
        folder = sweep(*((n, 0, {}) for n in (2, 4, 8, 16)), columns=shares, objectives=("valid/f1",))
        for n in range(4):
            told = read_json(folder / str(n) / "trial.json")
            told["scores"]["valid/f1"] = float(np.mean(column))
            told["label"] = f"lora.r={n}"
            write_json(folder / str(n) / "trial.json", told)
        board = report.read(folder)
        found = compare.read(folder, board.trials, board.objective)
        assert found.points[found.best].trials == (board.points[board.best].trials[0]["number"],), case
        assert "above a bound" not in page.decision(report.gather(folder))


def test_choices_of_files_have_their_share(sweep):
    """Twelve points of two adapters, where the adapter alone matters."""
    from itertools import product

    folder = sweep(*((r, 1.0 * (kind == "dora"), {}) for kind, r, _ in product(("a", "dora"), (2, 4), (1, 2, 3))))
    for n, (kind, r, lr) in enumerate(product(("default", "dora"), (2, 4), (1, 2, 3))):
        told = read_json(folder / str(n) / "trial.json")
        told |= {"label": f"lora={kind} lora.r={r} trainer.lr={lr}e-3"}
        told["config"] |= {"lora.r": r, "trainer.lr": lr * 1e-3}
        write_json(folder / str(n) / "trial.json", told)
    write_json(
        folder / "sweep.json",
        read_json(folder / "sweep.json") | {"axes": [{"key": k} for k in ("lora", "lora.r", "trainer.lr")]},
    )
    shares = read(folder).importance
    assert set(shares) == {"lora", "lora.r", "trainer.lr"}
    assert shares["lora"].value > 0.7


def test_methods_with_losses_of_their_own_are_not_compared(sweep):
    folder = sweep((4, 0, {}), (8, 0.1, {}))
    for n, kind in enumerate(("dpo", "reward")):
        told = read_json(folder / str(n) / "trial.json")
        told["config"]["trainer.kind"] = kind
        write_json(folder / str(n) / "trial.json", told)
    assert (
        read(folder).untested
        == "trials 0 and 1 were scored by different trainer.kind, whose valid/loss is of another kind"
    )


def test_none_of_scores_that_are_not_of_one_kind_is_best(sweep, capsys):
    """On the leaderboard, the page and in data; and nothing goes on from a winner that there is not."""
    from ftexp import handed

    of = [{"facts": {"tokenizer_sha256": name}} for name in "ab"]
    folder = sweep((4, 0, of[0]), (8, 0.1, of[1]))
    report.show(folder)
    out = capsys.readouterr().out
    assert " best " not in out and "no point is best" in out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Best point" not in page and "no point is best" in page and '<tr class="best' not in page
    assert "best" not in report.export(folder, "md")
    assert [p["best"] for p in json.loads(report.export(folder, "json"))["points"]] == [False, False]
    assert report.read(folder).best is None
    with pytest.raises(
        MachineError, match="this sweep has no winner, trials 0 and 1 were scored in tokens of different"
    ):
        handed.winner(folder)
    told = compare.lines(read(folder))
    assert "different tokenizers" in told[0]
    assert told[1] == "So the leaderboard's order is no ranking, and no point is best."


def held_out(digest, rows=40, cut=0.0, tokens=500.0, **keys):
    """Return the keys of a trial that notes its held-out rows."""
    inputs = [{"context": "training", "sha256": digest * 2, "rows": 9},
              {"context": "validation", "sha256": digest, "rows": rows}]  # fmt: skip
    scores = {
        "valid/loss": 0.5,
        "valid/tokens_cut": cut,
        "valid/tokens": tokens,
        "cost/trainable": 1e6,
        "cost/seconds": 9.0,
        "cost/memory_gib": 2.0,
    }
    return {"inputs": inputs, "scores": scores, "facts": {"tokenizer_sha256": "a"}} | keys


@pytest.mark.parametrize(("other", "told"), [
    (held_out("b"), "on other rows"), (held_out("a", rows=39), "on other rows"),
    (held_out("a", cut=3.0), "on other parts of the rows: data.long=cut leaves more of them at a larger data.max_length"),
    (held_out("a", cut=3.0, facts={"tokenizer_sha256": "b"}), "in tokens of different tokenizers"),
    (held_out("a", tokens=600.0), "over other supervised tokens, as another chat template has"),
])  # fmt: skip
def test_sweep_of_other_held_out_rows_has_no_winner_for_any_reader(sweep, other, told):
    """What goes on from a winner reads no rows; it must know what the leaderboard knows."""
    from ftexp import handed

    folder = sweep((4, 0, held_out("a")), (8, 0.1, other), objectives=["valid/loss", "cost/trainable"])
    assert f"trials 0 and 1 were scored {told}" in read(folder).untested
    assert (read(folder).front, figures.front(report.gather(folder), "cost/trainable")) == ((), [])
    with pytest.raises(MachineError, match=f"this sweep has no winner, trials 0 and 1 were scored {told}"):
        handed.winner(folder)


def test_points_above_a_bound_may_be_of_another_kind(sweep):
    """Leaderboard, verdict and what goes on from the winner agree that the others have a best."""
    from ftexp import handed

    of = [{"facts": {"tokenizer_sha256": name}} for name in "aab"]
    folder = sweep((4, 0, of[0]), (8, 0.1, of[1]), (64, 0.2, of[2]), at_most={"cost/trainable": 9e6})
    board, verdict = report.judge(folder)
    assert (board.best, verdict.best, handed.winner(folder).folder.name) == (0, 0, "0")


def test_keys_have_no_share_in_scores_of_different_kinds(sweep):
    keys = ("trainer.kind", "lora.r", "lora.alpha", "trainer.lr")
    grid = [("dpo", r, a, lr) for r in (4, 8) for a in (4.0, 16.0) for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
    points = [chosen(dict(zip(keys, point, strict=True))) for point in grid]
    folder = sweep(*((8, 0.1 * n, p) for n, p in enumerate(points)), axes=[{"key": key} for key in keys])
    assert read(folder).importance and read(folder).rate
    points[3]["config"]["trainer.kind"] = "sft"
    found = read(sweep(*((8, 0.1 * n, p) for n, p in enumerate(points)), axes=[{"key": key} for key in keys]))
    assert isinstance(found.untested, compare.Unlike)
    assert (found.importance, found.rate) == ({}, None)


def test_sweep_whose_points_all_pass_a_bound_says_so(sweep):
    folder = sweep((4, 0, {}), (8, 0.1, {}))
    kept = read_json(folder / "sweep.json")
    kept["options"]["at_most"] = {"cost/memory_gib": 1.0}
    write_json(folder / "sweep.json", kept)
    assert compare.lines(read(folder))[0].startswith("No point is complete and within the bounds of sweep.at_most")


def test_sweep_that_was_stopped_is_not_told_as_a_whole_one(sweep, capsys):
    folder = sweep((4, 0, {}), (8, 0.5, {}))
    write_json(folder / "sweep.json", read_json(folder / "sweep.json") | {"tickets": 5})
    report.show(folder)
    out = " ".join(capsys.readouterr().out.split())
    assert "3 of 5 trials have not begun: this is a ranking of the others." in out
    text = (folder / "report.html").read_text()
    assert "5 trials: 2 complete, 3 not begun" in text and "3 of 5 trials have not begun" in text
    told = json.loads(report.export(folder, "json"))
    assert (told["trials"], told["not_begun"]) == (5, 3)


def test_rival_of_a_score_that_is_a_difference_is_not_the_base(sweep):
    folder = sweep((4, 0, {}), (8, 0.5, {}), objectives=("forgetting/loss",))
    for n in range(2):
        told = read_json(folder / str(n) / "trial.json")
        told["scores"] |= {"forgetting/loss": 0.1 * n, "base/loss": 5.5833}
        write_json(folder / str(n) / "trial.json", told)
    assert "5.5833" not in page._best(report.gather(folder), report.gather(folder).winner)
