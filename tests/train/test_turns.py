"""Which way the first steps of a pack are taken, and what is heard of them."""

from typing import Any

import pytest

from ftexp.train.turns import NEEDED, Turns


@pytest.fixture
def heard():
    """What a judge of turns was told."""
    return []


def listening(heard: list[Any], answer: bool) -> Turns:
    return Turns(lambda *given: heard.append(given) or answer)


@pytest.mark.parametrize("answer", [True, False])
def test_tokens_are_timed_together_and_one_by_one_in_turn(heard, answer):
    """Steps of 10 tokens that take 2 s together, of 5 that take 3 s one by one; warm ones took longer."""
    turns = listening(heard, answer)
    for n, (seconds, tokens) in enumerate([(9, 10), (9, 10), (9, 5), *[(2, 10), (3, 5)] * 3]):
        assert turns.most(7, 99 - n) == (1 if n in (2, 4, 6, 8) else 7)
        turns.took(seconds, tokens, 99 - n, None)
    assert heard == [([0.2] * 3, [0.6] * 3, None)]
    assert turns.most(7, 9) == (7 if answer else 1)
    turns.took(1, 1, 9, None)
    assert len(heard) == 1


def test_a_pack_that_ends_before_is_not_tried(heard):
    turns = listening(heard, False)
    for left in range(NEEDED - 1, 0, -1):
        assert turns.most(4, left) == 4
        turns.took(1, 1, left, None)
    assert turns.most(4, NEEDED) == 4  # the next pack is, from its first step
    turns.took(1, 1, NEEDED, None)
    for left in range(NEEDED - 1, 0, -1):
        turns.took(1, 1, left, None)
    assert len(heard) == 1


def test_where_one_alone_fits_nothing_is_compared(heard):
    turns = listening(heard, False)
    turns.took(1, 1, 99, None)
    turns.took(1, 1, 98, 2)
    assert not heard
    turns.took(1, 1, 97, 1)
    assert heard == [([], [], 1)]


def test_a_known_way_is_gone():
    assert Turns(None).most(4, 99) == 4
    assert Turns(None, one_by_one=True).most(4, 99) == 1
    assert Turns(None, one_by_one=True).most(4, 2) == 1
