import re
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from ftexp.data import yoda
from ftexp.metrics import words


def drawn(count, seed=0):
    return list(islice(yoda.pairs(seed), count))


def test_two_thousand_pairs_are_distinct():
    pairs = drawn(5000)
    assert len({english for english, _ in pairs}) == 5000


def test_same_seed_same_pairs_in_another_process():
    code = "from itertools import islice; from ftexp.data import yoda; print(list(islice(yoda.pairs(7), 50)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(drawn(50, 7))
    assert drawn(50, 7) != drawn(50, 8)


@pytest.mark.parametrize(
    ("english", "rewritten"),
    [
        (r"^(?!If )(.*?) (is|are|am) ((?:(?:very|too|never|always|quite) )?\w+)\.$", r"\3, \1 \2."),
        (r"^(?!If )(.*?) (must|can|will|should|may|could|might) (.*)\.$", r"\3, \1 \2."),
        (r"^(.*?) (has|have) (.*)\.$", r"\3, \1 \2."),
        (r"^(Do|Does) (.*) (sleep|wait|sing|work|dance|rest|fight|listen|swim|laugh) (.*)\?$", r"\3 \4, \1 \2?"),
        (r"^(\w+) (.*) before you (\w+)\.$", r"Before you \3, \1 \2 you must."),
        (r"^If (.*?) (\w+) (\w+), we (\w+) (.*)\.$", r"\5 we \4, if \3 \1 \2."),
    ],
)
def test_frames_follow_the_documented_rule(english, rewritten):
    """The rule a second time, as rewriting of the English text instead of a grammar."""
    told = [(re.sub(english, rewritten, source), target) for source, target in drawn(3000) if re.match(english, source)]
    assert len(told) > 200
    for expected, target in told:
        assert expected.lower() == target.lower()


def test_only_the_order_changes():
    added = {"you", "must"}  # "... you must" of an imperative
    for english, told in drawn(2000):
        extra = Counter(words(told)) - Counter(words(english))
        assert set(extra) <= added
        assert not Counter(words(english)) - Counter(words(told))


def test_both_begin_with_a_capital_and_keep_the_end_mark():
    for english, told in drawn(500):
        assert english[0].isupper()
        assert told[0].isupper()
        assert english[-1] == told[-1]
