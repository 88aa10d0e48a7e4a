import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import made
import pyarrow
import pyarrow.parquet
import pytest

from ftexp import board, compare, files, report, runs, sealed
from ftexp.errors import ConfigError, Damaged, MachineError
from ftexp.model import saved
from ftexp.sweep import frozen


def test_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path))
    assert files.cache() == tmp_path


def test_json_round_trip(tmp_path):
    files.write_json(tmp_path / "a" / "x.json", {"r": 8})
    assert files.read_json(tmp_path / "a" / "x.json") == {"r": 8}
    assert files.read_json(tmp_path / "none.json") is None


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, object())
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_file_is_whole_after_kill_at_any_moment(tmp_path):
    path = tmp_path / "x.json"
    code = (
        "import sys; from pathlib import Path; from ftexp import files\n"
        "n = 0\n"
        "while True:\n    n += 1; files.write_json(Path(sys.argv[1]), [n] * 20000); print(n, flush=True)"
    )
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        content = json.loads(path.read_text())
        assert len(content) == 20000
        assert len(set(content)) == 1


def test_folder_is_whole_or_absent(tmp_path):
    with files.whole(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o777 & ~current_umask()
    with pytest.raises(KeyboardInterrupt), files.whole(tmp_path / "c") as folder:
        (folder / "x").write_text("1")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "empty").mkdir()
    with files.whole(tmp_path / "empty") as folder:
        (folder / "x").write_text("2")
    assert os.listdir(tmp_path / "empty") == ["x"]


def test_folder_that_is_taken_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with (
            pytest.raises(ConfigError, match=f"{name}: must be a new or an empty folder"),
            files.whole(tmp_path / name),
        ):
            pass
    with pytest.raises(MachineError, match="cannot be made"), files.whole(tmp_path / "file" / "below"):
        pass
    assert (tmp_path / "full" / "x").read_text() == (tmp_path / "file").read_text() == "mine"


def test_current_folder_is_filled_where_it_is_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = Path().stat().st_ino
    with pytest.raises(KeyboardInterrupt), files.whole(Path()) as folder:
        (folder / "x").write_text("1")
        raise KeyboardInterrupt
    assert os.listdir() == []
    with files.whole(Path()) as folder:
        (folder / "x").write_text("1")
        (folder / "below").mkdir()
        (folder / "below" / "y").write_text("2")
    assert sorted(os.listdir()) == ["below", "x"] and os.listdir("below") == ["y"]
    assert tmp_path.stat().st_ino == place  # a mount point cannot be replaced either
    assert (tmp_path / "below").stat().st_mode & 0o777 == 0o777 & ~current_umask()


@pytest.mark.parametrize("there", [False, True])
def test_folder_that_another_process_fills_meanwhile_is_refused(tmp_path, there):
    target = tmp_path / "a"
    if there:
        target.mkdir()
    with pytest.raises(ConfigError, match="a: must be a new or an empty folder"), files.whole(target) as folder:
        (folder / "x").write_text("1")
        target.mkdir(exist_ok=True)
        (target / "x").write_text("theirs")
    assert os.listdir(tmp_path) == ["a"] and os.listdir(target) == ["x"]
    assert (target / "x").read_text() == "theirs"


def test_folder_that_cannot_be_moved_is_told_in_one_line(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", refused)
    with (
        pytest.raises(MachineError, match="a: cannot be written: Device or resource busy"),
        files.whole(tmp_path / "a"),
    ):
        pass
    assert os.listdir(tmp_path) == []


def current_umask():
    os.umask(mask := os.umask(0))
    return mask


def test_what_is_not_finite_is_null_in_files_and_nan_to_who_reads_scores(tmp_path):
    """A bare NaN is no JSON: jq, JavaScript and pandas stumble over it."""

    def strict(name):
        raise AssertionError(name)

    told = {"state": "complete", "config": {}}
    files.write_json(tmp_path / "trial.json", {**told, "scores": {"valid/f1": float("nan"), "valid/loss": 0.5}})
    kept = json.loads((tmp_path / "trial.json").read_text(), parse_constant=strict)
    assert kept["scores"] == {"valid/f1": None, "valid/loss": 0.5}
    read = files.read_trial(tmp_path)
    assert math.isnan(read["scores"].pop("valid/f1")) and read == {**told, "scores": {"valid/loss": 0.5}}
    assert files.read_trial(tmp_path / "none") is None
    (tmp_path / "trial.json").write_text(
        '{"state": "", "config": {}, "scores": {"valid/f1": NaN}}'
    )  # as older versions wrote it
    assert math.isnan(files.read_trial(tmp_path)["scores"]["valid/f1"])


def test_points_of_a_file_of_metrics_end_before_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert files.read_points(path) == []
    path.write_text('{"step": 1, "valid/loss": 2.0}\n{"step": 2, "valid/f1": null}\n{"step": 3, "val')
    first, second = files.read_points(path)
    assert first == {"step": 1, "valid/loss": 2.0} and math.isnan(second["valid/f1"])


@pytest.mark.parametrize("bad", [b"{nope", b'{"step": "\xff"}', b"3"])
def test_bad_line_inside_a_file_of_metrics_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
    with pytest.raises(MachineError, match=r"metrics\.jsonl:2: is damaged, a line must be (JSON|a JSON object)"):
        files.read_points(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"step": 1, "valid/loss": "x"}\n'), ("metrics.jsonl", '{"valid/loss": 1.5}\n'),
        ("trial.json", '{"state": "complete", "config": 5}'), ("trial.json", '{"state": "complete", "config": {}, "scores": []}'),
        ("sweep.json", '{"options": 5, "objectives": []}'), ("confirm.json", '{"openings": [5]}'),
        ("confirm.json", '{"openings": {}}'), ("confirm.json", '{"openings": [{"date": "x"}]}'),
        ("examples.parquet", None), ("x.yaml", "a: [1"), ("x.yaml", "[1, 2]"), ("x.yaml", "5"), ("x.yaml", "\xff"),
        (".hydra/overrides.yaml", "a: [1"), (".hydra/overrides.yaml", "5"), (".hydra/hydra.yaml", "a: [1"),
    ],
)  # fmt: skip
def test_record_of_another_shape_is_named(tmp_path, name, text):
    """Each was a traceback of `report`, `confirm`, `diff` or `sweep show`."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if text is None:
        pyarrow.parquet.write_table(pyarrow.table({"nats": [1.0], "reference": ["a"]}), path)
    else:
        path.write_text(text, encoding="latin-1")
    readers = {
        "metrics.jsonl": files.read_points, "trial.json": lambda path: files.read_trial(path.parent),
        "sweep.json": lambda path: files.read_sweep(path.parent), "confirm.json": lambda path: sealed.openings(path.parent),
        "examples.parquet": compare.read_table, "x.yaml": frozen._composed,
        ".hydra/overrides.yaml": lambda path: report.command(tmp_path, {}),
        ".hydra/hydra.yaml": lambda path: report._config_dir(tmp_path),
    }  # fmt: skip
    with pytest.raises(Damaged, match=f"{re.escape(str(path))}.*: is damaged, "):
        readers[name](path)


def test_trial_that_is_complete_and_has_no_scores_is_named(tmp_path):
    folder = made.sweep(tmp_path / "s", 2)
    told = files.read_json(folder / "1" / "trial.json")
    del told["scores"]
    files.write_json(folder / "1" / "trial.json", told)
    with pytest.raises(Damaged, match=r"s: trial\.json of trial 1 is damaged, it lacks scores"):
        board.read(folder)


def test_run_without_facts_of_its_device_is_named(tmp_path, tiny):
    """`ftexp generate` ended in a traceback."""
    with pytest.raises(Damaged, match=r"trial\.json: is damaged, it lacks facts of its device"):
        saved.as_trained(runs.Kept(tmp_path, {"state": "complete", "config": {}}), tiny())
