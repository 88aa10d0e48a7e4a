import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftexp.config import Data
from ftexp.data import load
from ftexp.data.rows import Row
from ftexp.data.splits import normalise, split
from ftexp.errors import DataError


def made(*prompts):
    return [Row(p, f"answer {n}", f"t:{n}") for n, p in enumerate(prompts)]


def test_no_prompt_is_in_two_splits():
    splits = load(Data(valid=64, test=32))
    train, valid, test = ({normalise(r.prompt) for r in part} for part in (splits.train, splits.valid, splits.test))
    assert not train & valid
    assert not train & test
    assert not valid & test
    assert (len(splits.valid), len(splits.test)) == (64, 32)


def test_edited_copies_of_a_prompt_stay_together():
    rows = made(*[f"row {n}" for n in range(40)], *[f"ROW  {n}!" for n in range(40)])
    splits = split(rows, Data(valid=10, test=10), "t")
    held = {normalise(r.prompt) for r in (*splits.valid, *splits.test)}
    assert not held & {normalise(r.prompt) for r in splits.train}


def test_sabotage_row_by_row_split_would_leak():
    """The twin of the test above: without grouping, the same rows do leak."""
    rows = made(*[f"row {n}" for n in range(40)], *[f"ROW  {n}!" for n in range(40)])
    held, train = rows[::4], [r for n, r in enumerate(rows) if n % 4]
    assert not {r.prompt for r in held} & {r.prompt for r in train}  # an exact comparison sees nothing
    rows = made(*[f"row {n}" for n in range(40)], *[f"ROW  {(n + 1) % 40}!" for n in range(40)])
    held, train = rows[::4], [r for n, r in enumerate(rows) if n % 4]
    assert {normalise(r.prompt) for r in held} & {normalise(r.prompt) for r in train}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([f"p{n}" for n in range(30)]), min_size=12, max_size=60),
    st.integers(0, 5),
    st.integers(0, 9),
)
def test_counts_add_up(prompts, test, seed):
    rows = made(*prompts) + made(*prompts)[:3]
    try:
        splits = split(rows, Data(valid=2, test=test, seed=seed), "t")
    except DataError:
        return
    parts = (splits.train, splits.valid, splits.test)
    assert sum(map(len, parts)) + splits.duplicates == splits.read == len(rows)
    assert len(splits.valid) == 2
    assert len(splits.test) == test


def test_repeats_are_left_out_and_counted():
    rows = [Row("a", "b", "t:0")] * 3 + made(*"cdefg")
    splits = split(rows, Data(valid=2), "t")
    assert splits.duplicates == 2


def test_seed_moves_the_split_and_nothing_else_does():
    one, same, other = (load(Data(valid=16, seed=s)) for s in (0, 0, 1))
    assert one.digest() == same.digest()
    assert one.digest() != other.digest()
    # frozen: the same rows on every machine and version
    assert one.digest().startswith("9a5740db7c8ea64f")


@pytest.mark.parametrize(
    ("count", "valid", "message"),
    [(4, 5, "data.valid=5 rows cannot be held out of 4"), (5, 5, "no row is left to train on")],
)
def test_too_few_rows_are_refused(count, valid, message):
    with pytest.raises(DataError, match=message):
        split(made(*[str(n) for n in range(count)]), Data(valid=valid), "t")


def test_one_prompt_with_many_answers_cannot_be_split():
    with pytest.raises(DataError, match="cannot be held out"):
        split(made(*["same"] * 9), Data(valid=3), "t")
