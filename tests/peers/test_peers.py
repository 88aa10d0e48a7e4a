"""The same toy sweep under Hydra's basic sweeper, hydra-optuna-sweeper and ours: what a mishap costs.

The Optuna sweeper pins another Hydra or Optuna, so it needs an environment of its own: give its Python in
`FTEXP_PEER`, else its rows are skipped. `pytest -s tests/peers` prints the table.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).with_name("toy.py")
POINTS = ["2", "4", "8"]


def launch(sweeper, mishap, folder):
    """Run the toy; return its exit code and the lines its points left, rank and alpha."""
    python = os.environ["FTEXP_PEER"] if sweeper == "optuna" else sys.executable
    env = {k: v for k, v in os.environ.items() if sweeper != "optuna" or k != "PYTHONPATH"}
    done = subprocess.run([python, str(TOY), sweeper, mishap, str(folder)], capture_output=True, text=True, env=env)
    ran = [line.split() for line in (folder / "ran.txt").read_text().splitlines()]
    told = " ".join(f"r={r}(alpha {alpha})" for r, alpha in ran)
    print(f"{sweeper:7} {mishap:5} exit {done.returncode:3}, ran {told}")
    return done.returncode, [r for r, _ in ran], [alpha for _, alpha in ran]


peer = pytest.mark.parametrize(
    "sweeper",
    [
        "basic",
        pytest.param(
            "optuna",
            marks=pytest.mark.skipif(
                "FTEXP_PEER" not in os.environ,
                reason="FTEXP_PEER=<python> names an environment with hydra-optuna-sweeper",
            ),
        ),
    ],
)


@pytest.mark.slow
@pytest.mark.parametrize("mishap", ["fail", "nan"])
def test_ours_runs_every_point_beside_a_bad_one(tmp_path, mishap):
    code, ran, _ = launch("ftexp", mishap, tmp_path)
    assert (code, ran) == (5, POINTS)


@pytest.mark.slow
def test_ours_runs_only_what_is_missing_after_a_kill(tmp_path):
    assert launch("ftexp", "kill", tmp_path)[0] == -9
    code, ran, _ = launch("ftexp", "kill", tmp_path)
    assert (code, ran) == (0, ["2", "4", "4", "8"])  # the killed one again, the finished one not


@pytest.mark.slow
def test_ours_runs_what_was_launched_after_an_edit(tmp_path):
    code, ran, alphas = launch("ftexp", "edit", tmp_path)
    assert (code, ran) == (0, POINTS)
    assert set(alphas) == {"16.0"}


@peer
@pytest.mark.slow
@pytest.mark.parametrize("mishap", ["fail", "nan"])
def test_peer_beside_a_bad_point(tmp_path, sweeper, mishap):
    """Basic runs on and then ends with the first trial's traceback; Optuna's stops at the trial that failed."""
    code, ran, _ = launch(sweeper, mishap, tmp_path)
    if mishap == "nan":
        assert (code, len(ran)) == (0, 3)  # nothing says that a trial diverged
        return
    assert code == 1
    assert len(ran) == (3 if sweeper == "basic" else ran.index("4") + 1)


@peer
@pytest.mark.slow
def test_peer_does_finished_trials_over(tmp_path, sweeper):
    launch(sweeper, "kill", tmp_path)
    _, ran, _ = launch(sweeper, "kill", tmp_path)
    assert len(ran) > 4 or (sweeper == "optuna" and len(ran) != 4)


@peer
@pytest.mark.slow
def test_peer_runs_what_is_on_disk_by_then(tmp_path, sweeper):
    _, ran, alphas = launch(sweeper, "edit", tmp_path)
    assert "999" in alphas
