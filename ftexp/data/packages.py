"""Real rows without a hub: texts that travel inside packages of the Python index, pinned and checked by hash.

| set          | package                        | licence               | rows                                   |
|--------------|--------------------------------|-----------------------|----------------------------------------|
| quotes       | mightymaxims                   | MIT; old authors only | topic, quote and author                |
| chat         | chatterbot-corpus              | BSD                   | English small talk: prompt, completion |
| chat_ko      | chatterbot-corpus              | BSD                   | Korean small talk: prompt, completion  |
| interface_ko | jupyterlab-language-pack-ko-KR | BSD-3-Clause          | English and Korean texts of JupyterLab |

A package is fetched with pip on first use, never installed or imported, and kept in the cache; none of its text is
part of ftexp. Opinions and mistakes in these texts are their authors'.
"""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ftexp.errors import MachineError
from ftexp.files import cache, sha256
from ftexp.progress import say


@dataclass(frozen=True)
class Package:
    """A wheel that was reviewed."""

    name: str
    version: str
    sha256: str


MAXIMS = Package("mightymaxims", "2026.6.7", "8f025b7e64e39cd9c17f1de2a467ea4c8740f98b2a15557146c0a5c5f7c5c326")
CHATTERBOT = Package("chatterbot-corpus", "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")
JUPYTERLAB = Package(
    "jupyterlab-language-pack-ko-KR", "4.5.post3", "a7ca15848e6fc47ecf35e83a791e2ae9dd26bbfdbc8503567593f908f86c51f4"
)

TOPICS = {  # topic -> words a quote about it holds; the first that fits counts
    "love": "love loves loved lover lovers loving",
    "friendship": "friend friends friendship",
    "death": "death die dies died dead grave",
    "truth": "truth true lie lies falsehood",
    "wisdom": "wisdom wise fool fools foolish",
    "knowledge": "knowledge learn learning education books book study",
    "fortune": "fortune luck chance fate",
    "money": "money rich riches wealth poor poverty gold",
    "virtue": "virtue virtues vice vices honest honesty",
    "courage": "courage brave fear fears afraid coward",
    "time": "time hour day days years tomorrow",
    "power": "power king kings government law laws war",
    "happiness": "happy happiness pleasure joy",
    "nature": "nature sea flower flowers tree trees",
    "speech": "word words speak speech tongue silence",
    "work": "work labor labour idle busy",
}
NAMES = """
Abraham Lincoln, Adam Smith, Aesop, Alexander Pope, Ambrose Bierce, Aristotle, Arthur Schopenhauer, Benjamin Disraeli,
Benjamin Franklin, Blaise Pascal, Buddha, Cato The Elder, Charles Caleb Colton, Charles Dickens, Cicero, Confucius,
Count Leo Nikolaevich Tolstoy, Democritus, Diogenes of Sinope, Dr. Samuel Johnson, Edgar Allan Poe, Edmund Burke,
Edward Young, Emily Dickinson, Epictetus, Epicurus, Euripides, Francis Bacon, Francois de La Rochefoucauld, Frederic
Bastiat, Friedrich Nietzsche, Georg C. Lichtenberg, George Eliot, George Herbert, George Washington, Gustave Flaubert,
Henrik Ibsen, Henry David Thoreau, Henry Wadsworth Longfellow, Henry Ward Beecher, Hippocrates, Horace, James Russell
Lowell, Jean Jacques Rousseau, Jean Paul Richter, Jean de La Bruyere, Johann Friedrich Von Schiller, Johann Kaspar
Lavater, Johann Wolfgang Von Goethe, John Adams, John Dryden, John Keats, John Locke, John Milton, John Ruskin,
Jonathan Swift, Joseph Addison, Joseph Joubert, Josh Billings, Lao Tzu, Lao-Tzu, Lewis Carroll, Lord Alfred Tennyson,
Lord Chesterfield, Lucius Annaeus Seneca, Marcel Proust, Marcus Aurelius, Marcus Aurelius Antoninus, Marcus T. Cicero,
Mark Twain, Martin Luther, Michel Eyquem De Montaigne, Moliere, Napoleon Bonaparte, Nathaniel Hawthorne, Niccolo
Machiavelli, Oliver Goldsmith, Oscar Wilde, Ovid, Plato, Plutarch, Publilius Syrus, Ralph Waldo Emerson, Robert
Browning, Robert Louis Stevenson, Sallust, Samuel Johnson, Samuel Smiles, Seneca, Sir Walter Raleigh, Sir Walter
Scott, Sir William Temple, Socrates, Sophocles, St. Augustine, Sydney Smith, Tacitus, Terence, Thomas Carlyle, Thomas
Fuller, Thomas Huxley, Thomas Jefferson, Thomas Paine, Titus Maccius Plautus, Victor Hugo, Virgil, Voltaire, Walt
Whitman, Walter Savage Landor, William Blake, William Ellery Channing, William Hazlitt, William James, William M.
Thackeray, William Penn, William Shakespear, William Wordsworth, Zoroaster
"""
AUTHORS = {" ".join(name.split()) for name in NAMES.split(",")}
"""As the package spells them; all died before 1926."""
SPARED = {"politics.yml", "gossip.yml", "psychology.yml", "humor.yml"}
"""Parts of the small talk that are left out as edgy."""


def wheel(package: Package) -> Path:
    """Return a package's wheel, fetching it on first use; safe to call from several processes.

    Raises:
        MachineError: the package cannot be fetched, or is not the one that was reviewed.
    """
    kept = cache() / "wheels" / f"{package.name}-{package.version}.whl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            say(f"fetching {package.name} {package.version} (once)")
            with tempfile.TemporaryDirectory(dir=kept.parent) as work:
                _fetch(package, Path(work)).rename(kept)
    return kept


def _fetch(package: Package, into: Path) -> Path:
    wanted = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
    done = subprocess.run([*command, str(into), wanted], capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise MachineError(f"these rows need the package {wanted}, which pip could not fetch: {last}")
    if (found := sha256(wheels[0])) != package.sha256:
        raise MachineError(
            f"{wheels[0].name}: must have sha256 {package.sha256}, got {found}; it is not the reviewed package"
        )
    return wheels[0]


def quotes() -> Iterator[dict[str, str]]:
    """Yield quotes of authors long dead, and proverbs that are about one of our topics: topic, quote, author."""
    with zipfile.ZipFile(wheel(MAXIMS)) as archive, tempfile.TemporaryDirectory() as work:
        path = archive.extract("MightyMaxims/MightyMaxims2026.sqlt3", work)
        store = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            found = store.execute("SELECT quote, author FROM MightyMaxims ORDER BY id").fetchall()
        finally:
            store.close()
    for quote, author in found:
        quote, author = " ".join(quote.split()), " ".join(author.split())
        topic = topic_of(quote)
        if topic is not None and (author in AUTHORS or author.endswith(" Proverb")):
            yield {"topic": topic, "quote": quote, "author": author}


def topic_of(quote: str) -> str | None:
    """Return the topic of a quote by the words in it.

    >>> topic_of("A friend in power is a friend lost."), topic_of("Hm.")
    ('friendship', None)
    """
    words = set(re.findall(r"[a-z]+", quote.lower()))
    return next((topic for topic, marks in TOPICS.items() if words & set(marks.split())), None)


def chat(language: str) -> Iterator[dict[str, str]]:
    """Yield a question and its first answer: prompt, completion, topic.

    Args:
        language: a folder of the corpus, `english` or `korean`.
    """
    import yaml

    with zipfile.ZipFile(wheel(CHATTERBOT)) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"chatterbot_corpus/data/{language}/"))
        for name in (n for n in names if n.endswith(".yml") and Path(n).name not in SPARED):
            for turns in yaml.safe_load(archive.read(name))["conversations"]:
                asked, answer = (" ".join(str(turn).split()) for turn in turns[:2])
                if asked and answer and "```" not in answer:
                    yield {"prompt": asked, "completion": answer, "topic": Path(name).stem}


def interface_ko() -> Iterator[dict[str, str]]:
    """Yield texts of JupyterLab of two words or more: english, korean."""
    with zipfile.ZipFile(wheel(JUPYTERLAB)) as archive:
        seen: set[str] = set()
        for name in sorted(n for n in archive.namelist() if "/LC_MESSAGES/" in n and n.endswith(".json")):
            for english, korean in json.loads(archive.read(name)).items():
                if not isinstance(korean, list) or "\x04" in english:  # the head of the file, and names with a context
                    continue
                english, korean = " ".join(english.split()), " ".join(" ".join(korean[:1]).split())
                if " " in english and re.search("[가-힣]", korean) and english not in seen:
                    seen.add(english)
                    yield {"english": english, "korean": korean}
