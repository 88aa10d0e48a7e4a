"""Particles and endings by the book, on words whose forms are written out here."""

from itertools import islice

import pytest

from ftexp.data import korean


@pytest.mark.parametrize(
    ("noun", "subject", "thing"),
    [("선생님", "선생님은", "선생님을"), ("친구", "친구는", "친구를"), ("물", "물은", "물을"), ("커피", "커피는", "커피를"),
     ("옷", "옷은", "옷을"), ("한국어", "한국어는", "한국어를")],
)  # fmt: skip
def test_particles_follow_the_last_sound(noun, subject, thing):
    assert (korean.topic(noun), korean.thing(noun)) == (subject, thing)


def test_every_verb_has_its_endings():
    for polite, plain, past in korean.OBJECTS:
        assert polite.endswith("니다")
        assert plain.endswith("다") and not plain.endswith("니다")
        assert korean.closed(past)  # the past ends in ㅆ
        assert (ord(past[-1]) - 0xAC00) % 28 == 20


def test_only_the_ending_and_the_first_person_change():
    for polite, plain in islice(korean.pairs(0), 2000):
        first, *middle, verb = polite.split()
        first_plain, *middle_plain, verb_plain = plain.split()
        assert middle == middle_plain
        assert first == first_plain or (first, first_plain) == ("저는", "나는")
        assert verb.endswith("니다.") and verb_plain.endswith("다.") and not verb_plain.endswith("니다.")


def test_sentences_differ_and_follow_the_seed():
    made = list(islice(korean.pairs(0), 3000))
    assert len({polite for polite, _ in made}) == 3000
    assert made[:50] == list(islice(korean.pairs(0), 50)) != list(islice(korean.pairs(1), 50))
