"""Many rows through processes and the disk: the same ids, errors and bits as in memory, and nothing torn is read."""

import json
import os
import struct

import pytest

from ftexp import data, experiment, model
from ftexp.config import Data, Gate, Long, Model, Packing, Template
from ftexp.data import prompts, tokens
from ftexp.data.shapes import Row
from ftexp.errors import DataError, MachineError
from ftexp.files import sha256
from ftexp.model import tiny as toy
from ftexp.train import lengths

TURNS = (("system", "s"), ("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant", "two"))
ROWS = tuple(
    Row("p\nv", "two", f"my.jsonl:{n}", TURNS) if n % 5 == 0
    else Row("", f"a text {n}", f"my.jsonl:{n}") if n % 5 == 1
    else Row(f"Say {n} in 한국어", "x" * (n % 30 + 1), f"my.jsonl:{n}")
    for n in range(60)
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Take the way of many rows with few, in one process."""
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "MANY", 20)
    monkeypatch.setattr(tokens, "PIECE", 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "tokens"


def kept(rows=ROWS, tokenizer=None, content="c", **keys):
    return tokens.render(rows, tokenizer or toy.tokenizer(), Data(max_length=256, **keys), content)


def by_memory(rows=ROWS, tokenizer=None, **keys):
    return prompts.render(rows, tokenizer or toy.tokenizer(), Data(max_length=256, **keys))


def no_work(monkeypatch):
    monkeypatch.setattr(prompts, "examples", None)


@pytest.mark.parametrize("keys", [{}, {"template": Template.chatml}, {"long": Long.cut, "allow": list(Gate)}])
def test_ids_masks_and_bytes_are_those_of_memory(keys, monkeypatch):
    keys = keys | ({"max_length": 40} if "long" in keys else {"max_length": 256})
    cold = tokens.render(ROWS, toy.tokenizer(), Data(**keys), "c")
    expected = prompts.render(ROWS, toy.tokenizer(), Data(**keys))
    assert isinstance(cold, tokens.Tokens)
    assert list(cold) == expected == cold[:]
    no_work(monkeypatch)
    warm = tokens.render(ROWS, toy.tokenizer(), Data(**keys), "c")
    assert list(warm) == expected
    assert warm[-1] == expected[-1]
    assert tokens.longest(warm) == tokens.longest(expected)
    assert tokens.rows_of(warm) == tokens.rows_of(expected) == [e.row for e in expected]
    given, usual = lengths.dataset(warm), lengths.dataset(expected)
    assert given["input_ids"][:] == usual["input_ids"][:]
    assert given["labels"][:] == usual["labels"][:]


@pytest.fixture(scope="module")
def smollm():
    """Loaded while the cache is still the real one."""
    return model.tokenizer(Model())


def test_real_tokenizer_in_processes(smollm, monkeypatch):
    """Two processes with a tokenizer whose merges and template are no toy."""
    monkeypatch.setattr(tokens, "workers", lambda: 2)
    assert list(kept(tokenizer=smollm)) == by_memory(tokenizer=smollm)


def test_few_rows_stay_in_memory(folder):
    assert isinstance(kept(ROWS[:19]), list)
    assert not folder.exists()


def test_training_from_the_disk_has_the_bits_of_one_from_memory(tiny, tmp_path, monkeypatch):
    run = tiny("data.packing=bfd", "eval=loss")
    for name, many in (("disk", 20), ("memory", 10_000)):
        monkeypatch.setattr(tokens, "MANY", many)
        monkeypatch.setattr(experiment, "_tokens", None)
        experiment.execute(run, tmp_path / name, "x")
        rows = experiment.tokenised(run, data.load(run.data))[0]
        assert isinstance(rows, tokens.Tokens) == (name == "disk")
        experiment.prepare(run)
    weights = [sha256(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("disk", "memory")]
    assert weights[0] == weights[1]


def test_what_decides_is_in_the_name():
    tokenizer, how = toy.tokenizer(), Data()
    usual = tokens.digest(tokenizer, how, "c")
    assert tokens.digest(toy.tokenizer(), Data(valid=7, seed=3, path=""), "c") == usual
    other = toy.tokenizer()
    other.add_tokens(["xyz"])
    ending = toy.tokenizer()
    ending.eos_token = "<|endoftext|>"
    retold = toy.tokenizer()
    retold.chat_template += " "
    others = [
        tokens.digest(tokenizer, how, "d"), tokens.digest(other, how, "c"), tokens.digest(ending, how, "c"),
        tokens.digest(retold, how, "c"), tokens.digest(tokenizer, Data(max_length=99), "c"),
        tokens.digest(tokenizer, Data(long=Long.cut), "c"), tokens.digest(tokenizer, Data(template=Template.plain), "c"),
        tokens.digest(tokenizer, Data(allow=[Gate.double_bos]), "c"),
        tokens.digest(tokenizer, Data(packing=Packing.wrapped), "c"),
    ]  # fmt: skip
    assert len({usual, *others}) == len(others) + 1
    tokenizer(["a", "bcd"], padding=True)  # leaves a mark on the tokenizer
    assert tokens.digest(tokenizer, how, "c") == usual


def test_changed_rows_are_tokenised_anew_though_all_else_is_the_same(tiny, monkeypatch):
    one = experiment.tokenised(tiny(), data.load(tiny().data))[0]
    other = experiment.tokenised(tiny("data.seed=1"), data.load(tiny("data.seed=1").data))[0]
    assert [e.row for e in one] != [e.row for e in other]
    assert all(e.ids == prompts.render((e.row,), toy.tokenizer(), tiny().data)[0].ids for e in other[:5])


@pytest.mark.parametrize("damage", ["cut", "flipped", "no seal", "torn seal", "foreign seal", "foreign", "gone"])
def test_torn_or_foreign_file_is_made_anew(folder, damage, capfd):
    kept()
    (file,), (seal,) = folder.glob("*.arrow"), folder.glob("*.json")
    content = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(content[:-100])
        case "flipped":
            file.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
        case "no seal":
            seal.unlink()
        case "torn seal":
            seal.write_text(seal.read_text()[:-9])
        case "foreign seal":
            seal.write_text(json.dumps([1]))
        case "foreign":
            kept(ROWS[:30], content="d")
            (other,) = set(folder.glob("*.arrow")) - {file}
            file.write_bytes(other.read_bytes())
        case "gone":
            file.unlink()
    assert list(kept()) == by_memory()
    assert ("a damaged cache of token ids, made anew" in capfd.readouterr().err) == (damage != "gone")
    assert file.read_bytes() == content


def test_sabotage_a_file_that_is_not_hashed_is_believed(folder, monkeypatch):
    kept()
    (file,) = folder.glob("*.arrow")
    content = file.read_bytes()
    ids = struct.pack("<4i", *by_memory()[2].ids[:4])
    file.write_bytes(content.replace(ids, ids[::-1]))
    (seal,) = folder.glob("*.json")
    monkeypatch.setattr(tokens, "sha256", lambda path: json.loads(seal.read_text())["sha256"])
    monkeypatch.setattr(tokens, "digest", lambda *_: seal.stem)
    assert list(kept()) != by_memory()


def test_files_not_used_for_longest_go_first(folder, monkeypatch):
    for n, content in enumerate("abc"):
        kept(content=content)
        made = tokens.digest(toy.tokenizer(), Data(max_length=256), content)
        os.utime(folder / f"{made}.json", (1000 + n, 1000 + n))
    kept(content="a")  # used again
    size = max(p.stat().st_size for p in folder.glob("*.arrow"))
    monkeypatch.setattr(tokens, "MOST", 3 * size)
    (folder / "old.part").write_bytes(b"x")
    os.utime(folder / "old.part", (1000, 1000))
    kept(content="d")
    left = {tokens.digest(toy.tokenizer(), Data(max_length=256), content): content for content in "abcd"}
    assert sorted(left[p.stem] for p in folder.glob("*.arrow")) == ["a", "c", "d"]
    assert {p.stem for p in folder.glob("*.json")} == {p.stem for p in folder.glob("*.arrow")}
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("count", [1, 2])
def test_first_bad_row_is_named_and_nothing_is_kept(folder, monkeypatch, count):
    monkeypatch.setattr(tokens, "workers", lambda: count)
    long = [Row("p", "x" * 300, f"my.jsonl:{n}") for n in (50, 33)]
    rows = (*ROWS[:33], long[1], *ROWS[34:50], long[0], *ROWS[51:])
    with pytest.raises(DataError, match=r"my\.jsonl:33: a row must be at most data\.max_length=256"):
        kept(rows)
    assert not [p for p in folder.iterdir() if p.suffix != ".lock"]


def test_gates_hold_and_tell_the_same_cold_and_warm(capfd):
    rows = (*ROWS[:40], *(Row("p", "x" * 300, f"my.jsonl:{n}") for n in (40, 41)), *ROWS[42:])
    told = []
    for render in (by_memory, kept, kept):
        assert tokens.rows_of(render(rows, long=Long.drop)) == [row for row in rows if len(row.completion) < 300]
        told.append(capfd.readouterr().err)
    assert "2 of 60 rows have more than data.max_length=256 tokens, the first is my.jsonl:40" in told[0]
    assert told[0] == told[1] == told[2]
    rows = (*rows[:55], *(Row("p", "x" * 300, f"my.jsonl:{n}") for n in range(55, 60)))
    for _ in range(2):
        with pytest.raises(DataError, match=r"my\.jsonl:40: 7 of 60 rows .*; more than 5% may be lost"):
            kept(rows, content="more", long=Long.drop)
    assert len(lengths.dataset(kept(rows, content="more", long=Long.drop, allow=[Gate.lost]))) == 53


def test_process_that_dies_ends_the_run_in_one_line(monkeypatch):
    monkeypatch.setattr(tokens, "workers", lambda: 2)
    monkeypatch.setattr(tokens.sys, "executable", "/bin/false")
    with pytest.raises(MachineError, match=r"a process that tokenises rows died|cannot be written"):
        kept()


def test_processes_are_as_many_as_cores_and_threads(monkeypatch):
    monkeypatch.setattr(tokens.machine, "cores", lambda: 3)
    for asked, expected in (("", 3), ("2", 2), ("8", 3), ("0", 1), ("4,2", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert tokens.workers() == expected
