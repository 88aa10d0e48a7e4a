"""Rows and seeds needed, from numbers or from a sweep, and every mistake in one line."""

import json
import math
import sys

import pytest
from test_compare import sweep  # noqa: F401

from ftexp import power
from ftexp.stats import noise


@pytest.fixture
def ask(monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["power", *map(str, argv)])
        code = power.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_rows_by_hand(ask):
    # paired t test, effect half a standard deviation, power 0.8: 34 rows in any table
    code, out, _ = ask("effect=0.05", "sd_rows=0.1", "seeds=1")
    assert code == 0
    assert "1 seed a point: 34 rows find 0.05 with chance 0.81" in out
    assert "Training noise counts as 0" in out


def test_json_holds_the_numbers(ask):
    code, out, _ = ask("effect=0.02", "sd=0.15", "correlation=0.8", "sd_seed=0.004", "trials=6", "rows=200", "--json")
    told = json.loads(out)
    spread = noise.Spread(0.15 * math.sqrt(0.4), 0.004)
    assert told["spread"] == {"rows": pytest.approx(spread.rows), "seed": 0.004, "mixed": 0.0}
    assert [p["seeds"] for p in told["plans"]] == [1, 2, 3, 5]
    assert told["plans"][2] == pytest.approx(
        {k: getattr(noise.needed(0.02, spread, 3, 6), k) for k in told["plans"][2]}
    )
    assert told["at"][0] == [
        1,
        *map(
            pytest.approx,
            (
                noise.power(0.02, 200, spread, 1, 6),
                noise.detectable(200, spread, 1, 6),
                noise.power(0.0, 200, spread, 1, 6),
            ),
        ),
    ]


def test_hopeless_and_false_are_said(ask):
    _, out, _ = ask("effect=0.01", "sd_rows=0.1", "sd_seed=0.02", "seeds=1,2")
    assert "2 seeds a point: no number of rows finds 0.01" in out
    assert "equal points are told apart too" in out.splitlines()[1]


def test_rows_alone_tell_the_smallest_effect(ask):
    _, out, _ = ask("rows=34", "sd_rows=1", "seeds=1")
    assert "34 rows, 1 seed a point: 0.495 is found with chance 0.8" in out


def test_rows_that_are_too_few_say_so(ask):
    _, out, _ = ask("effect=9", "rows=5", "sd_rows=0.1", "seeds=1,2")
    assert "1 seed a point: 6 rows find 9 with chance 1.00" in out
    assert "5 rows, 1 seed a point: 9 is found with chance 0.00; too few rows to tell any difference" in out
    assert "5 rows, 2 seeds a point: 9 is found with chance 1.00; 0." in out
    _, out, _ = ask("rows=5", "sd_rows=0.1", "seeds=1", "--json")
    assert json.loads(out)["at"] == [[1, None, None, 0.0]]


@pytest.mark.parametrize("smallest", [None, math.nan, 0.0])
def test_rows_that_tell_equal_points_apart_say_so(ask, monkeypatch, smallest):
    """Endless rows, noise between seeds of five times theirs: a difference of 0 was "found with chance 0.8"."""
    if smallest is not None:  # as older and newer `noise` have it
        monkeypatch.setattr(noise, "detectable", lambda rows, spread, seeds, *_: smallest if seeds == 1 else 0.5)
    argv = ("rows=100000", "sd_rows=0.1", "sd_seed=0.5", "seeds=1,2")
    _, out, _ = ask(*argv)
    one, two = out.splitlines()[1:3]
    # one run: T of equal points is normal times sqrt(0.5 + 1e-7) / sqrt(1e-7), above 1.96 in all but 0.07 %
    assert one.endswith(
        "1 seed a point: equal points are told apart with chance 1.00 a pair: no difference says anything"
    )
    assert two.endswith("is found with chance 0.8") and "equal" not in two
    seeds, chance, found, false = (
        json.loads(ask(*argv, "--json")[1])["at"][0] if smallest is None else (1, None, None, 1)
    )
    assert (seeds, chance, found) == (1, None, None) and false > 0.99


def test_rate_of_false_differences_is_told_of_the_rows_there_are(ask):
    """Row part 0.01 / 50 = 0.0002, seed part 2 * 0.0004 = 0.0008: equal points pass t = 2.01 as z passes 2.01 / sqrt(5)."""
    _, out, _ = ask("rows=50", "sd_rows=0.1", "sd_seed=0.02", "seeds=1", "effect=0.2")
    assert out.splitlines()[2].endswith(
        "is found with chance 0.8; equal points are told apart too, with chance 0.37 a pair"
    )


def test_without_noise_any_difference_is_found(ask, sweep, monkeypatch):  # noqa: F811
    monkeypatch.setattr(power, "measured", lambda folder: (noise.Spread(0.0), 2, "twins", False))
    _, out, _ = ask("rows=9", "--from", sweep((4, 0, {})), "seeds=1")
    assert "9 rows, 1 seed a point: any difference is found\n" in out


def test_noise_is_read_from_a_sweep(ask, sweep):  # noqa: F811
    folder = sweep((64, 0, {}), (64, 0.1, {}), (16, 0, {}), (16, 0.1, {}), (8, 0, {}), (8, 0.1, {}), replicates=2)
    code, out, _ = ask("effect=0.05", "--from", folder, "--json")
    told = json.loads(out)
    assert (code, told["trials"]) == (0, 3)
    assert told["source"] == "valid/loss of 3 points, 2 runs each, 40 rows"
    assert told["spread"]["seed"] == pytest.approx(0.1 / math.sqrt(2), rel=0.1)
    assert 0.02 < told["spread"]["mixed"] < 0.05  # 0.02 of a row, and what a shift of all tokens adds to long rows
    _, out, _ = ask("effect=0.05", f"--from={folder}", "--json", "sd_seed=0", "trials=9")
    assert (json.loads(out)["spread"]["seed"], json.loads(out)["trials"]) == (0, 9)


def test_groups_of_a_sweep_are_told_as_groups(ask, sweep):  # noqa: F811
    """Forty rows of ten prompts: told as rows, ten of them were asked for where ten prompts are needed."""
    folder = sweep((64, 0, {}), (8, 0.02, {}), prompts=[f"prompt {n // 4}" for n in range(40)])
    code, out, _ = ask("effect=0.02", "--from", folder, "groups=10", "seeds=1")
    first, needed, there, _ = out.splitlines()
    assert code == 0 and "1 run each, 10 groups (40 rows): sd_rows 0." in first and " (over groups), sd_seed 0" in first
    assert " groups find 0.02 with chance 0." in needed and there.startswith("10 groups, 1 seed a point: 0.02 is found")
    assert " rows " not in needed + there
    code, out, err = ask("effect=0.02", "--from", folder, "rows=40")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "rows=40: the noise is that of groups of rows" in err and "give the groups there are, as groups=12" in err
    code, _, err = ask("effect=0.02", "--from", sweep((64, 0, {}), (8, 0.02, {})), "groups=10")
    assert code == 2 and err.startswith(
        "ftexp: groups=10: the noise is that of single rows (valid/loss of 2 points, 1 run"
    )
    assert err.endswith("which are in no groups; give rows\n")
    for more in ((), ("sd_rows=0.1",), ("effect=0.01", "sd_rows=0.1", "rows=40")):
        code, _, err = ask("groups=10", *more)
        assert (
            code == 2
            and "groups=10 needs --from SWEEP, whose rows are in groups; without a sweep give rows=10, and" in err
        )
    told = json.loads(ask("groups=10", "--from", sweep((64, 0, {}), (8, 0, {}), prompts=["a", "b"] * 20), "--json")[1])
    assert (told["rows"], told["unit"]) == (10, "groups")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["effect=0", "sd_rows=1"], "effect must be above 0, got 0"),
        (["effect=nan", "sd_rows=1"], "effect must be above 0, got nan"),
        (["effect=x", "sd_rows=1"], "effect must be a number, got 'x'"),
        (["effect=1"], "sd_rows, or sd and correlation, or --from a sweep must be given"),
        (["sd_rows=1"], "effect or rows must be given"),
        (["effect=1", "sd=1"], "sd and correlation must be given together"),
        (["effect=1", "sd=1", "correlation=1.1"], "correlation must be between -1 and 1, got 1.1"),
        (["effect=1", "sd_rows=1", "sd=1"], "sd and correlation have no part"),
        (["effect=1", "sd_rows=1", "sd_seed=-1"], "sd_seed must be at least 0, got -1"),
        (["effect=1", "sd_rows=1", "trials=1"], "trials must be between 2 and 10000, got 1"),
        (["effect=1", "sd_rows=1", "trials=nan"], "trials must be a whole number, got nan"),
        (["effect=1", "sd_rows=1", "rows=inf"], "rows must be a whole number, got inf"),
        (["effect=1", "sd_rows=1", "trials=2.5"], "trials must be a whole number, got 2.5"),
        (["effect=1", "sd_rows=1", "seeds=0,1"], "seeds must be between 1 and 1000, got 0"),
        (["effect=1", "sd_rows=1", "alpha=1"], "alpha must be between 1e-06 and 0.5, got 1"),
        (["effct=1", "sd_rows=1"], "effct=1: must be key=value with a key among effect,"),
        (["effect"], "effect: must be key=value"),
        (["effect=0.1", "effect=0.02", "sd_rows=1"], "effect must be given once, got effect=0.02 too"),
        (["effect=1", "sd_rows=1", "seeds=1", "seeds=2"], "seeds must be given once, got seeds=2 too"),
        (["effect=1", "--from"], "--from must be followed by the folder of a sweep"),
    ],
)
def test_mistake_is_told_in_one_line(ask, argv, message):
    code, out, err = ask(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_folder_without_a_sweep(ask, tmp_path, sweep):  # noqa: F811
    assert ask("effect=1", "--from", tmp_path)[0] == 4
    code, _, err = ask("effect=1", "--from", sweep((64, 0, {})))
    assert code == 4
    assert "must hold two points to compare; it has one" in err


def test_one_row_tells_no_noise(ask, sweep):  # noqa: F811
    """Its standard deviation over rows of 0 would promise that two rows find anything."""
    for replicates in (1, 2):
        trials = [(rank, 0.01 * n, {}) for n, rank in enumerate((64, 64, 16, 16))]
        folder = sweep(*trials, prompts=["one"] * 40, replicates=replicates)
        code, out, err = ask("effect=0.05", "--from", folder)
        assert (code, out) == (4, "")
        assert "must have two held-out rows, or groups of rows, to measure noise; it has one" in err


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0)])
def test_usage(ask, argv, code):
    found, out, err = ask(*argv)
    assert found == code
    told, nothing = (err, out) if code else (out, err)
    assert not nothing
    for key in (*power.KEYS, "seeds", "--from", "--json"):
        assert f"\n  {key} " in told
