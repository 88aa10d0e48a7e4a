"""Many trials in one process leave nothing behind: no file handle, process, temporary file or memory."""

import os
import tempfile
from pathlib import Path

import psutil
import pytest
from conftest import UNWRITTEN

from ftexp import facts
from ftexp.sweep import worker

TRIALS = int(os.environ.get("FTEXP_SOAK", "500"))
WARM = 10
"""Trials after which caches are full and counting begins."""


def counted():
    process = psutil.Process()
    return {"handles": process.num_fds(), "processes": len(process.children(recursive=True)),
            "threads": process.num_threads(), "files": len(list(Path(tempfile.gettempdir()).iterdir())),
            "GiB": facts.resident_gib()}  # fmt: skip


@pytest.mark.chaos
def test_many_trials_leave_nothing_behind(cli, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))  # of this process alone: others write to /tmp
    told, real = [], worker.run_ticket

    def run_ticket(*given):
        real(*given)
        told.append(counted())

    monkeypatch.setattr(worker, "run_ticket", run_ticket)
    small = [t for t in UNWRITTEN if not t.startswith(("trainer.steps", "trainer.report"))]
    code, _, err = cli(*small, "trainer.steps=1", "trainer.report_steps=0", "eval=loss", "track=none", "name=k",
                       f"seed={','.join(map(str, range(TRIALS)))}", "-m")  # fmt: skip
    assert code == 0, err[-2000:]
    assert len(told) == TRIALS
    first, last = told[WARM], told[-1]
    lines = [f"{name:12} after {WARM} trials {first[name]:.4g}, after {TRIALS} {last[name]:.4g}" for name in first]
    print("\n" + "\n".join(lines))
    for name in ("handles", "processes", "threads", "files"):
        assert last[name] <= first[name], lines
    assert last["GiB"] < 1.05 * first["GiB"], lines
