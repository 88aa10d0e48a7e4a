import json
import os
import signal
import subprocess
import sys

import pytest

from ftexp import files


def test_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path))
    assert files.cache() == tmp_path


def test_json_round_trip(tmp_path):
    files.write_json(tmp_path / "a" / "x.json", {"r": 8})
    assert files.read_json(tmp_path / "a" / "x.json") == {"r": 8}
    assert files.read_json(tmp_path / "none.json") is None


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, [1])
    with pytest.raises(TypeError):
        files.write_json(path, object())
    assert files.read_json(path) == [1]
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
