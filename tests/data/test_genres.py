"""Labels that can be learned from the text, to the degree the grammar promises."""

from collections import Counter
from itertools import islice

import pytest

from ftexp.data import genres


def spoken_for(text):
    return {g for slot in genres.SLOTS for phrase, told in slot.items() if phrase in text.lower() for g in told.split()}


def test_there_are_twenty_genres_and_each_has_several_phrases():
    counts = Counter(g for slot in genres.SLOTS for told in slot.values() for g in told.split())
    assert len(counts) == 20
    assert min(counts.values()) >= 3


def test_records_differ_and_follow_the_seed():
    made = list(islice(genres.records(0), 2000))
    assert len({r["text"] for r in made}) == 2000
    assert made[:20] == list(islice(genres.records(0), 20)) != list(islice(genres.records(1), 20))
    assert all(1 <= len(r["labels"]) <= 4 and r["labels"] == sorted(set(r["labels"])) for r in made)


def test_text_speaks_for_most_labels_and_without_vagueness_for_more(monkeypatch):
    def share():
        made = list(islice(genres.records(0), 1000))
        return sum(len(spoken_for(r["text"]) & set(r["labels"])) for r in made) / sum(len(r["labels"]) for r in made)

    usual = share()
    monkeypatch.setattr(genres, "VAGUE", 0.0)
    clear = share()
    monkeypatch.setattr(genres, "VAGUE", 1.0)
    assert share() < 0.6 < usual < clear


@pytest.mark.slow
def test_a_linear_model_learns_it():
    """TF-IDF and logistic regression, as the plain baseline: well above the most frequent labels."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import MultiLabelBinarizer

    made = list(islice(genres.records(0), 2500))
    labels = MultiLabelBinarizer().fit_transform([r["labels"] for r in made])
    texts = TfidfVectorizer(ngram_range=(1, 2)).fit_transform([r["text"] for r in made])
    model = OneVsRestClassifier(LogisticRegression(C=10)).fit(texts[:2000], labels[:2000])
    found = (model.predict_proba(texts[2000:]) > 0.35).astype(int)
    assert f1_score(labels[2000:], found, average="micro") > 0.5
