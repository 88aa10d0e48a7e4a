"""Pairs of answers of which one is worse, made from the Yoda sentences by spoiling the right answer.

| spoiling   | the worse answer                                  |
|------------|---------------------------------------------------|
| unchanged  | the question itself: the task was not done        |
| off_topic  | the right answer to another question              |
| cut        | the right answer without its second half          |
| doubled    | the right answer twice                            |
| shuffled   | the words of the right answer in another order    |
| unsure     | the right answer behind an empty phrase           |
| careless   | the right answer in small letters without signs   |

Column `spoiling` says which it was, so that a reward can be measured for each kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from ftexp.data import yoda

PHRASES = ["I am not sure, but perhaps: ", "That is a great question! ", "As far as I know, ", "Well, it depends. "]


def _shuffled(answer: str, r: random.Random) -> str:
    words = answer.split()
    order = words[:]
    while order == words:
        r.shuffle(order)
    return " ".join(order)


SPOILINGS: dict[str, Callable[[str, str, str, random.Random], str]] = {  # question, answer, another answer
    "unchanged": lambda question, answer, other, r: question,
    "off_topic": lambda question, answer, other, r: other,
    "cut": lambda question, answer, other, r: " ".join(answer.split()[: len(answer.split()) // 2]),
    "doubled": lambda question, answer, other, r: f"{answer} {answer}",
    "shuffled": lambda question, answer, other, r: _shuffled(answer, r),
    "unsure": lambda question, answer, other, r: r.choice(PHRASES) + answer,
    "careless": lambda question, answer, other, r: "".join(c for c in answer.lower() if c.isalpha() or c == " "),
}


def records(seed: int) -> Iterator[dict[str, str]]:
    """Yield records without end: prompt, chosen, rejected and spoiling.

    >>> next(records(0))["spoiling"]
    'careless'
    """
    r = random.Random(seed)
    pairs = yoda.pairs(seed)
    before = next(pairs)[1]
    for question, answer in pairs:
        name = r.choice(list(SPOILINGS))
        worse = SPOILINGS[name](question, answer, before, r)
        yield {"prompt": question, "chosen": answer, "rejected": worse, "spoiling": name}
        before = answer
