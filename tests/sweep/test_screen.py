"""A sweep at a glance: counts, best point, estimate, and what a terminal and a pipe see."""

from datetime import datetime, timedelta
from io import StringIO
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

from ftexp.files import write_json
from ftexp.sweep import frozen, screen, space
from ftexp.sweep.options import Options


@pytest.fixture
def sweep(tmp_path):
    """Return a function that makes a sweep of four points and its record in memory."""

    def make(**options):
        searched = space.parse(["lora.r=1,2,3,4"])
        made = frozen.Frozen(tmp_path, "s", searched, Options(**options), ["valid/loss"], None, "", {})
        return made, optuna.create_study(direction="minimize")

    return make


def add(record, number, state, value=None, seconds=60, constraint=None, **attrs):
    began = datetime(2026, 1, 1)
    kept = create_trial(
        state=getattr(TrialState, state), value=value, params={"lora.r": "1"},
        distributions={"lora.r": optuna.distributions.CategoricalDistribution(["1"])},
        user_attrs={"ftexp:ticket": number, **{f"ftexp:{k}": v for k, v in attrs.items()}},
        constraints=None if constraint is None else {"cost/memory_gib at most 4.0": constraint},
    )  # fmt: skip
    record.add_trial(kept)
    stored = record._storage._get_trial(len(record.trials) - 1)
    stored.datetime_start = None if state == "WAITING" else began
    stored.datetime_complete = began + timedelta(seconds=seconds) if kept.state.is_finished() else None


def test_line_counts_states_names_the_best_and_estimates(sweep):
    made, record = sweep()
    add(record, 0, "COMPLETE", 0.5, seconds=100)
    add(record, 1, "COMPLETE", 0.25, seconds=50)
    add(record, 2, "PRUNED", seconds=30)
    add(record, 3, "PRUNED", kind="diverged")
    add(record, 4, "FAIL", kind="crash")
    add(record, 5, "RUNNING")
    add(record, 6, "WAITING")
    add(record, 7, "FAIL", lost=True)  # an attempt whose worker died does not count
    told = screen.line(made, record)
    # three trials of 60 s on average ... with one running (half done) and one waiting: (100+50+30+60)/4 * 1.5 = 90 s
    assert told == (
        "2 complete, 1 pruned, 2 failed, 1 running, 1 waiting; best trial 1, valid/loss 0.2500; about 2 min left"
    )


def test_best_is_a_point_with_all_its_replicates(sweep):
    made, record = sweep(replicates=2)
    for number, value in ((0, 0.1), (2, 0.4), (3, 0.6), (4, 0.5), (5, 0.3)):
        add(record, number, "COMPLETE", value)
    add(record, 1, "RUNNING")  # trial 0 is best alone, but its point is not done
    assert screen.glance(made, record).best == ([4, 5], pytest.approx(0.4))


def test_point_that_breaks_a_bound_is_never_best(sweep):
    made, record = sweep(at_most={"cost/memory_gib": 4.0})
    add(record, 0, "COMPLETE", 0.1, constraint=2.0)
    add(record, 1, "COMPLETE", 0.9, constraint=-1.0)
    assert screen.glance(made, record).best == ([1], 0.9)


@pytest.mark.parametrize(
    ("at_most", "best"),
    [({"cost/memory_gib": 4.0}, 1), ({"cost/memory_gib": 7}, 0), ({"cost/memory_gib": 2.5}, 2), ({}, 0),
     ({"cost/seconds": 50.0}, 2), ({"cost/memory_gib": 1.0}, None)],
)  # fmt: skip
def test_bounds_that_were_changed_since_are_those_that_count(sweep, tmp_path, at_most, best):
    """A launch under the same name may change them; trials recorded by how much they passed those of their day."""
    made, record = sweep(at_most=at_most)
    for n, (loss, over, seconds) in enumerate([(0.1, 2.0, 90.0), (0.5, -1.0, 80.0), (0.9, -2.0, 40.0)]):
        add(record, n, "COMPLETE", loss, constraint=over)  # 6, 3 and 2 GiB where 4 were allowed
        (tmp_path / str(n)).mkdir()
        write_json(
            tmp_path / str(n) / "trial.json", {"state": "complete", "config": {}, "scores": {"cost/seconds": seconds}}
        )
    found = screen.best_point(made, screen.study.counted(record))
    assert (None if found is None else found[0]) == (None if best is None else [best])


@pytest.mark.parametrize(("config", "digest"), [({"trainer.beta": 0.5}, "a"), ({}, "b")])
def test_none_is_best_where_scores_are_of_different_kinds_or_of_other_rows(sweep, tmp_path, config, digest):
    made, record = sweep()
    for n, (keys, rows) in enumerate([({}, "a"), (config, digest)]):
        add(record, n, "COMPLETE", 0.5 - 0.1 * n)
        inputs = [{"context": "validation", "sha256": rows, "rows": 9}]
        told = {"trainer.kind": "dpo", "trainer.beta": 0.1} | keys
        write_json(tmp_path / str(n) / "trial.json", {"state": "complete", "config": told, "inputs": inputs})
    assert screen.line(made, record) == "2 complete"


def test_kinds_of_scores_are_read_once_for_each_trial_and_only_the_first_is_kept(sweep, tmp_path, monkeypatch):
    """The line of progress is told at each end of a trial: it took 0.1 s after 2,000, and 20 kB of each were kept."""
    made, record = sweep()
    honest, read = screen.read_trial, []
    monkeypatch.setattr(screen, "read_trial", lambda folder: (read.append(folder.name), honest(folder))[1])
    for n in range(4):
        add(record, n, "COMPLETE", 0.5 - 0.1 * n)
        write_json(tmp_path / str(n) / "trial.json", {"state": "complete", "config": {"trainer.kind": "sft"}})
        assert screen.line(made, record).startswith(f"{n + 1} complete; best trial {n}")
    assert read == ["0", "1", "2", "3"]
    assert [t["number"] for t in screen._kinds.kinds.kept.values()] == [0] and screen._kinds.seen == {0, 1, 2, 3}
    write_json(tmp_path / "1" / "trial.json", {"state": "complete", "config": {"trainer.kind": "dpo"}})
    assert screen.line(sweep()[0], record) == "4 complete"  # another launch looks anew


def test_nothing_done_says_so(sweep):
    made, record = sweep()
    add(record, 0, "WAITING")
    assert screen.line(made, record) == "1 waiting"


def drawn(table):
    out = StringIO()
    Console(file=out, width=140).print(table)
    return out.getvalue()


def test_table_shows_how_far_running_trials_are(sweep):
    made, record = sweep()
    folder = Path(made.folder) / "0"
    folder.mkdir()
    write_json(folder / "trial.json", {"state": "running", "config": {}, "steps": 20})
    (folder / "metrics.jsonl").write_text('{"step": 7, "train/loss": 1.25}\n{"step": 8, "train/lo')
    add(record, 0, "RUNNING", worker={"host": "node7", "pid": 42, "start": 1.0})
    add(record, 1, "FAIL", kind="oom")
    text = drawn(screen.table(made, record))
    assert "7/20" in text
    assert "train 1.250" in text
    assert "node7:42" in text
    assert "failed: oom" in text


def test_trial_that_was_stopped_says_where_it_goes_on(sweep):
    """A folder without a seal is torn, and one that runs shows its own step."""
    made, record = sweep()
    for number, (state, name) in enumerate(
        [
            ("WAITING", "checkpoint-20/manifest.json"),
            ("WAITING", "checkpoint-8/model"),
            ("RUNNING", "checkpoint-4/manifest.json"),
        ]
    ):
        write_json(Path(made.folder) / str(number) / "checkpoints" / name, {})
        add(record, number, state)
    add(record, 3, "WAITING")
    rows = [
        [cell.strip() for cell in line.split("│")]
        for line in drawn(screen.table(made, record)).splitlines()
        if "│ " in line
    ]
    assert [row[3] for row in rows[-4:]] == ["waiting, goes on from step 20", "waiting", "running", "waiting"]


def test_long_sweeps_show_what_runs_and_what_ended_last(sweep):
    made, record = sweep()
    for number in range(30):
        add(record, number, "COMPLETE", 1.0, seconds=number)
    add(record, 30, "RUNNING")
    for number in range(31, 50):
        add(record, number, "WAITING")
    shown = [line.split("│")[1].strip() for line in drawn(screen.table(made, record, 5)).splitlines() if "│ " in line]
    assert shown == ["26", "27", "28", "29", "30"]


def test_pipe_gets_a_line_for_each_trial_that_ends(sweep, capfd, monkeypatch):
    made, record = sweep()
    monkeypatch.setattr(screen, "FRESH_SECONDS", 0.0)
    with screen.live(made, record) as show:
        show()
        add(record, 0, "COMPLETE", 0.5)
        show()
        show()
    assert capfd.readouterr().err.strip() == "s: 1 complete; best trial 0, valid/loss 0.5000"


def test_terminal_gets_a_screen(sweep, monkeypatch):
    made, record = sweep()
    out = StringIO()
    monkeypatch.setattr(screen, "console", Console(file=out, force_terminal=True, width=140, height=20))
    add(record, 0, "RUNNING")
    with screen.live(made, record) as show:
        show()
    assert "lora.r=1" in out.getvalue()
