"""The worse answer is worse in the way the record says."""

from collections import Counter
from itertools import islice

import pytest

from ftexp.data import preference

MADE = list(islice(preference.records(0), 3000))


def test_answers_differ_and_every_spoiling_is_there():
    assert all(r["chosen"] != r["rejected"] and r["rejected"].strip() for r in MADE)
    counts = Counter(r["spoiling"] for r in MADE)
    assert set(counts) == set(preference.SPOILINGS)
    assert min(counts.values()) > 3000 / len(counts) * 0.8


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("unchanged", lambda p, c, w: w == p),
        ("off_topic", lambda p, c, w: sorted(w.lower().split()) != sorted(c.lower().split())),
        ("cut", lambda p, c, w: c.startswith(w) and len(w.split()) == len(c.split()) // 2),
        ("doubled", lambda p, c, w: w == f"{c} {c}"),
        ("shuffled", lambda p, c, w: sorted(w.split()) == sorted(c.split()) and w != c),
        ("unsure", lambda p, c, w: w.endswith(c) and len(w) > len(c)),
        ("careless", lambda p, c, w: w == "".join(x for x in c.lower() if x.isalpha() or x == " ")),
    ],
)
def test_spoiling_does_what_it_says(name, holds):
    assert all(holds(r["prompt"], r["chosen"], r["rejected"]) for r in MADE if r["spoiling"] == name)


def test_right_answers_are_those_of_yoda():
    from ftexp.data import yoda

    known = dict(islice(yoda.pairs(0), 4000))
    assert all(known[r["prompt"]] == r["chosen"] for r in MADE)
