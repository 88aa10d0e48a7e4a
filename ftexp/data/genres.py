"""Synopses of stories that were never made, with their genres: several labels a text, from a small grammar of ours.

A synopsis has a place, a hero, a goal and a turn; each phrase speaks for one to three of twenty genres. Labels are
drawn first, by a walk through genres that share a phrase, then phrases that speak for at least one of them. With
probability `VAGUE` a phrase speaks for none, so some labels cannot be told from the text, as in real sets.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

VAGUE = 0.15
HEROES = {
    "a retired detective": "mystery crime", "a rookie pilot": "action sci-fi military",
    "a shy transfer student": "school romance", "a cursed swordsman": "fantasy action supernatural",
    "a small-town baker": "slice-of-life comedy", "a starship engineer": "sci-fi",
    "a disgraced knight": "fantasy historical", "a tone-deaf singer": "music comedy",
    "a washed-up goalkeeper": "sports drama", "a runaway princess": "fantasy romance adventure",
    "a night nurse": "horror drama", "a street magician": "mystery supernatural",
    "a teenage hacker": "thriller sci-fi", "a stray cat": "slice-of-life fantasy",
    "a defeated general": "military historical", "a failed novelist": "drama romance psychological",
    "a timid ghost hunter": "supernatural horror comedy", "a test pilot of a giant robot": "mecha action",
    "a chess prodigy": "psychological sports", "a treasure diver": "adventure",
    "a substitute teacher": "school comedy", "a jazz pianist": "music drama",
    "an android without memory": "sci-fi psychological mecha", "a tired contract killer": "crime thriller action",
    "the widow of a poet": "drama historical", "a village witch": "fantasy supernatural",
}  # fmt: skip
PLACES = {
    "in a drowned city": "sci-fi adventure", "at a boarding school": "school mystery horror",
    "in a fortress on the border": "military historical fantasy",
    "in a quiet town by the sea": "slice-of-life romance mystery",
    "aboard a ship between the stars": "sci-fi thriller", "in the imperial capital": "historical romance",
    "at a national tournament": "sports", "in a house that counts its guests": "horror supernatural",
    "in the clubs of the old port": "music", "in a kingdom without night": "fantasy",
    "at the edge of a dead forest": "horror fantasy adventure",
    "among the smugglers of the harbor": "crime thriller", "inside a clinic for dreams": "psychological sci-fi",
    "on a proving ground for robots": "mecha military", "in a crowded shared flat": "comedy slice-of-life romance",
    "on an island on no map": "adventure mystery",
}  # fmt: skip
GOALS = {
    "must solve a murder in a locked room": "mystery crime", "falls for a rival": "romance sports comedy",
    "prepares for one last match": "sports drama", "learns to steer a forbidden machine": "mecha sci-fi",
    "tries to break a family curse": "supernatural drama fantasy",
    "hides a second identity": "thriller comedy psychological", "races to disarm a bomb": "action thriller",
    "keeps hearing a voice that is not there": "psychological horror",
    "forms a band to save the club": "music school", "searches for a lost map": "adventure",
    "negotiates a doomed truce": "military historical", "opens a tiny cafe": "slice-of-life",
    "hunts a thing that wears faces": "horror action supernatural", "plans a flawless robbery": "crime thriller",
    "writes letters that arrive in the past": "sci-fi romance drama",
    "leads an army of the dead": "fantasy military supernatural",
    "misreads every love letter": "comedy romance school",
    "composes a song nobody can finish": "music psychological",
}  # fmt: skip
TURNS = {
    "until an old friend returns": "", "when the first snow falls": "romance slice-of-life",
    "but the culprit is a classmate": "mystery school", "while the fleet closes in": "military sci-fi action",
    "and the crowd goes silent": "sports music", "as memories begin to change": "psychological sci-fi",
    "before the gate opens again": "fantasy supernatural horror",
    "and everything burns in the kitchen": "comedy slice-of-life",
    "when the ransom note rhymes": "crime mystery comedy", "at the cost of an arm": "action mecha drama",
    "and the mountain answers": "adventure fantasy", "on the eve of the coronation": "historical romance",
    "but the signal comes from below": "horror sci-fi thriller", "after the final whistle": "sports drama",
}  # fmt: skip
SLOTS = (PLACES, HEROES, GOALS, TURNS)
GENRES = sorted({genre for slot in SLOTS for told in slot.values() for genre in told.split()})


def records(seed: int) -> Iterator[dict[str, object]]:
    """Yield records without end and without repeating a text: text, and labels in alphabetical order.

    >>> len(GENRES), sorted(next(records(0)))
    (20, ['labels', 'text'])
    """
    r = random.Random(seed)
    seen: set[str] = set()
    while True:
        labels = _labels(r)
        place, hero, goal, turn = (_phrase(slot, labels, r) for slot in SLOTS)
        text = f"{place[0].upper()}{place[1:]}, {hero} {goal} {turn}."
        if text not in seen:
            seen.add(text)
            yield {"text": text, "labels": sorted(labels)}


def _labels(r: random.Random) -> list[str]:
    labels = [r.choice(GENRES)]
    for _ in range(r.choice([0, 1, 1, 2, 2, 3])):
        near = [told.split() for slot in SLOTS for told in slot.values() if labels[-1] in told.split()]
        genre = r.choice(r.choice(near))
        if genre not in labels:
            labels.append(genre)
    return labels


def _phrase(slot: dict[str, str], labels: list[str], r: random.Random) -> str:
    fitting = [phrase for phrase, told in slot.items() if set(told.split()) & set(labels)]
    return r.choice(list(slot) if r.random() < VAGUE or not fitting else fitting)
