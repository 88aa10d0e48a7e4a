"""English sentences and the same in Yoda's word order, from a small grammar of ours.

The rule: what stands behind the finite verb moves to the front (object, complement, place, or the bare verb of a
modal or perfect phrase), and the subject with its verb follows. Words and their order are all that changes, so one
right answer exists for each sentence and exact match is a fair score.

| frame       | English                                    | Yoda                                         |
|-------------|--------------------------------------------|----------------------------------------------|
| copula      | The pilot is very brave.                   | Very brave, the pilot is.                    |
| modal       | You must find the old map.                 | Find the old map, you must.                  |
| perfect     | We have built a small bridge.              | Built a small bridge, we have.               |
| past        | The farmer carried the box over the hill.  | Over the hill the box, the farmer carried.   |
| place       | They waited near the river.                | Near the river, they waited.                 |
| question    | Does the captain sleep in the forest?      | Sleep in the forest, does the captain?       |
| before      | Close the gate before you leave.           | Before you leave, close the gate you must.   |
| condition   | If she can sing, we will open the door.    | Open the door we will, if sing she can.      |

The grammar has some 700 000 sentences; a draw of a few thousand rarely meets the same one twice, and repeats are
left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

SUBJECTS = [  # subject, form of be, form of have, form of do
    *[(s, "is", "has", "does") for s in ("the pilot", "the farmer", "our captain", "my sister", "the old king", "she",
                                         "the young thief", "his teacher", "the tall guard", "a quiet monk", "he")],
    *[(s, "are", "have", "do") for s in ("you", "we", "they", "the children", "your friends", "two sailors",
                                         "the brave scouts", "her cousins")],
    ("I", "am", "have", "do"),
]  # fmt: skip
DEGREES = ["", "", "very ", "too ", "never ", "always ", "quite "]
ADJECTIVES = ["brave", "tired", "hungry", "patient", "ready", "angry", "lonely", "wise", "careless", "honest", "afraid",
              "proud", "gentle", "busy", "lost", "cheerful", "stubborn", "awake"]  # fmt: skip
TRANSITIVE = [  # base, past, participle
    ("find", "found", "found"), ("break", "broke", "broken"), ("build", "built", "built"), ("hide", "hid", "hidden"),
    ("paint", "painted", "painted"), ("carry", "carried", "carried"), ("steal", "stole", "stolen"),
    ("mend", "mended", "mended"), ("draw", "drew", "drawn"), ("forget", "forgot", "forgotten"),
    ("guard", "guarded", "guarded"), ("choose", "chose", "chosen"), ("burn", "burned", "burned"),
    ("sell", "sold", "sold"), ("bring", "brought", "brought"), ("lift", "lifted", "lifted"),
]  # fmt: skip
OBJECTS = ["the old map", "a small bridge", "the heavy box", "the garden gate", "a silver coin", "the red lantern",
           "the broken clock", "a long letter", "the wooden boat", "the green cloak", "an empty barrel", "the last key",
           "the stone wall", "a strange mask", "the kitchen table", "the golden bell"]  # fmt: skip
INTRANSITIVE = [  # base, past
    ("sleep", "slept"), ("wait", "waited"), ("sing", "sang"), ("work", "worked"), ("dance", "danced"),
    ("rest", "rested"), ("fight", "fought"), ("listen", "listened"), ("swim", "swam"), ("laugh", "laughed"),
]  # fmt: skip
PLACES = ["in the forest", "near the river", "over the hill", "behind the mill", "under the bridge", "by the fire",
          "at the harbor", "across the valley", "beside the road", "after the storm", "before dawn", "on the island",
          "in the tower", "without a sound"]  # fmt: skip
MODALS = ["must", "can", "will", "should", "may", "could", "might"]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _copula(r: random.Random) -> tuple[str, str]:
    (subject, be, _, _), quality = r.choice(SUBJECTS), r.choice(DEGREES) + r.choice(ADJECTIVES)
    return f"{subject} {be} {quality}.", f"{quality}, {subject} {be}."


def _modal(r: random.Random) -> tuple[str, str]:
    (subject, *_), modal, (verb, _, _), thing = (
        r.choice(SUBJECTS),
        r.choice(MODALS),
        r.choice(TRANSITIVE),
        r.choice(OBJECTS),
    )
    return f"{subject} {modal} {verb} {thing}.", f"{verb} {thing}, {subject} {modal}."


def _perfect(r: random.Random) -> tuple[str, str]:
    (subject, _, have, _), (_, _, done), thing = r.choice(SUBJECTS), r.choice(TRANSITIVE), r.choice(OBJECTS)
    return f"{subject} {have} {done} {thing}.", f"{done} {thing}, {subject} {have}."


def _past(r: random.Random) -> tuple[str, str]:
    (subject, *_), (_, past, _) = r.choice(SUBJECTS), r.choice(TRANSITIVE)
    thing, place = r.choice(OBJECTS), r.choice(PLACES)
    return f"{subject} {past} {thing} {place}.", f"{place} {thing}, {subject} {past}."


def _place(r: random.Random) -> tuple[str, str]:
    (subject, *_), (_, past), place = r.choice(SUBJECTS), r.choice(INTRANSITIVE), r.choice(PLACES)
    return f"{subject} {past} {place}.", f"{place}, {subject} {past}."


def _question(r: random.Random) -> tuple[str, str]:
    (subject, _, _, do), (verb, _), place = r.choice(SUBJECTS), r.choice(INTRANSITIVE), r.choice(PLACES)
    return f"{do} {subject} {verb} {place}?", f"{verb} {place}, {do} {subject}?"


def _before(r: random.Random) -> tuple[str, str]:
    (verb, _, _), thing, (later, _) = r.choice(TRANSITIVE), r.choice(OBJECTS), r.choice(INTRANSITIVE)
    return f"{verb} {thing} before you {later}.", f"before you {later}, {verb} {thing} you must."


def _condition(r: random.Random) -> tuple[str, str]:
    (subject, *_), can, (verb, _) = r.choice(SUBJECTS), r.choice(MODALS), r.choice(INTRANSITIVE)
    will, (act, _, _), thing = r.choice(MODALS), r.choice(TRANSITIVE), r.choice(OBJECTS)
    return (
        f"if {subject} {can} {verb}, we {will} {act} {thing}.",
        f"{act} {thing} we {will}, if {verb} {subject} {can}.",
    )


FRAMES: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _copula, _modal, _perfect, _past, _place, _question, _before, _condition,
)  # fmt: skip


def pairs(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (English, Yoda) pairs without end and without repeating an English sentence.

    The same seed gives the same pairs on every machine: nothing but `random.Random` is drawn from.

    >>> next(pairs(0))
    ('Sell a small bridge before you dance.', 'Before you dance, sell a small bridge you must.')
    """
    r = random.Random(seed)
    seen: set[str] = set()
    while True:
        english, yoda = r.choice(FRAMES)(r)
        if english not in seen:
            seen.add(english)
            yield _capital(english), _capital(yoda)
