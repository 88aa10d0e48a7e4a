"""The disk is full at each place where something is written.

One line names the path and the reason, the exit code is 4, the newest sealed checkpoint stays good, and with room the
same command ends with the bytes of a run that never met a full disk.
"""

import hashlib
import json
import sys

import pytest
from conftest import UNWRITTEN
from disks import disk
from full import POINTS, arm

from ftexp import experiment, probe, sync, track
from ftexp.data import tokens
from ftexp.errors import MachineError
from ftexp.files import no_room, read_json
from ftexp.sweep import study, worker
from ftexp.train import checkpoints

RUN = [*UNWRITTEN, "track=none", "eval=loss", "name=k", "lora.r=2", "trainer.checkpoint_minutes=0"]
SWEEP = [*RUN, "-m"]
OF_A_SWEEP = (
    "frozen configs",
    "sweep.json",
    "record",
    "record at a claim",
    "record at an end",
    "hydra files of a trial",
)
LATE = ("checkpoint", "optimizer of a checkpoint", "seal", "adapter", "examples.parquet", "trial.json at the end")
"""Places that are reached once a checkpoint is sealed."""
OWN = (".hydra", "ftexp.log", "report.html", "supervisor.lock")
"""Files of a run that a trial of a sweep has elsewhere, or not at all."""
MEASURED = ("time", "cost/", "plan/memory_gib_")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run that never met a full disk."""
    from ftexp import run as command

    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["ftexp.run", *RUN])
        assert command.main() == 0
    return folder / "outputs" / "runs" / "k"


@pytest.fixture(params=[None])
def small(request, tmp_path, monkeypatch):
    """A small disk, with the current folder on it."""
    with disk(tmp_path / "disk", mounted=request.param) as lent:
        monkeypatch.setattr(probe, "LEAST", 1)  # the disk has less than a launch asks for
        monkeypatch.setattr(tokens, "MANY", 0)
        monkeypatch.setattr(experiment, "_tokens", None)
        monkeypatch.setattr(tokens, "cache", lambda: lent.folder / "cache")
        yield lent


def adapter(folder):
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def curve(folder):
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in p.items() if not k.startswith(MEASURED)} for p in points]


def same(folder, calm):
    """The same adapter, curve and files as a run that never met a full disk."""
    assert read_json(folder / "trial.json")["state"] == "complete"
    assert adapter(folder) == adapter(calm)
    assert curve(folder) == curve(calm)
    ours = {p.name for p in folder.iterdir()} - {*OWN}
    assert ours == {p.name for p in calm.iterdir()} - {*OWN}


def told_in_a_line(code, err):
    assert code == 4, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("ftexp: ")]
    reasons = ("No space left on device", "File too large", "disk: 0.00 GiB free")  # the last is the probe's
    assert [reason for reason in reasons if reason in line], line
    assert "/disk" in line or "outputs/" in line, "names the path"


def meets_a_full_disk(command, lent, monkeypatch, calm, point):
    given = SWEEP if point in OF_A_SWEEP else RUN
    with monkeypatch.context() as patch:
        calls = arm(point, lent.fill, patch.setattr)
        code, err = command(*given)
    lent.free()
    assert len(calls) >= POINTS[point][2], "the point was never reached"
    told_in_a_line(code, err)
    folder = lent.folder / "outputs" / ("sweeps/k/0" if point in OF_A_SWEEP else "runs/k")
    if point in LATE:
        (kept,) = folder.glob("checkpoints/checkpoint-*")
        told = read_json(kept / checkpoints.SEAL)
        assert checkpoints.store(kept.parent, told["fingerprint"]).resume.folder == kept
    monkeypatch.setattr(study, "started", lambda pid: -1.0)  # as of another process: the first is this one, and lives
    code, err = command(*given)
    assert code == 0, err
    same(folder, calm)
    if point in LATE:
        assert read_json(folder / "trial.json")["resumed_at"]


@pytest.fixture
def command(small, monkeypatch, capsys):
    """The command line in this process, with the small disk as current folder."""

    def run(*argv):
        from ftexp import run as ftexp_run

        monkeypatch.chdir(small.folder)
        monkeypatch.setattr(sys, "argv", ["ftexp.run", *argv])
        try:
            code = ftexp_run.main()
        finally:
            monkeypatch.chdir("/")
        return code, capsys.readouterr().err

    return run


RECORD = ("record", "record at a claim", "record at an end")
"""An entry may still fit in the last block of the file, so these are met with a limit alone."""


RARE = ("metrics.jsonl in the middle", "optimizer of a checkpoint", "trial.json at the end", "hydra files of a trial")
"""Left to `make chaos`: each is met by the same code as a neighbour."""


def points(*names):
    return [pytest.param(name, marks=pytest.mark.chaos) if name in RARE else name for name in names]


@pytest.mark.parametrize("point", points(*(name for name in POINTS if name not in ("MLflow store", *RECORD))))
def test_full_disk_costs_one_line_and_the_same_command_goes_on(command, small, monkeypatch, calm, point):
    meets_a_full_disk(command, small, monkeypatch, calm, point)


@pytest.mark.parametrize("small", [False], indirect=True)
@pytest.mark.parametrize("point", points("metrics.jsonl in the middle", "seal", *RECORD))
def test_limit_on_file_sizes_is_met_in_the_same_way(command, small, monkeypatch, calm, point):
    meets_a_full_disk(command, small, monkeypatch, calm, point)


def test_full_tracking_store_costs_one_warning_and_sync_brings_the_rest(cli, tmp_path, monkeypatch):
    with disk(tmp_path / "disk", mounted=None) as lent:
        uri = f"sqlite:///{lent.folder}/ml.db"
        with monkeypatch.context() as patch:
            arm("MLflow store", lent.fill, patch.setattr)
            honest = track.Log.flush
            patch.setattr(track.Log, "flush", lambda log: (honest(log), None if lent.mounted else lent.free())[1])
            code, _, err = cli(*UNWRITTEN, "eval=loss", "name=one", f"track.uri={uri}")
        assert code == 0, err
        assert err.count("MLflow failed") == 1
        lent.free()
        track._stores.clear()
        assert sync.sync([tmp_path / "outputs"]).points > 0
        from test_sync import histories, in_files

        assert histories(uri)["one"] == in_files(tmp_path / "outputs" / "runs" / "one")
        assert sync.sync([tmp_path / "outputs"]).points == 0
        track._stores.clear()


def test_errors_without_a_number_are_known_by_what_the_libraries_say(tmp_path):
    """What safetensors and torch really raise, on a disk that is full."""
    import torch
    from safetensors.torch import save_file

    with disk(tmp_path / "disk", 1) as lent:
        if not lent.mounted:
            pytest.skip("a full file system is needed; run the tests as root")
        lent.fill()
        for write in (
            lambda p: save_file({"a": torch.zeros(9**5)}, p),
            lambda p: torch.save({"a": torch.zeros(9**5)}, p),
        ):
            with pytest.raises(Exception) as raised:
                write(lent.folder / "x")
            assert not isinstance(raised.value, OSError)
            assert f"{tmp_path}: cannot be written: No space left on device" in str(no_room(raised.value, tmp_path))


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("x"), MachineError("No space left on device"),
                                   FileNotFoundError(2, "No such file"), KeyError("unexpected pos")])  # fmt: skip
def test_other_errors_are_not_taken_for_a_full_disk(error):
    assert no_room(error) is None


def test_sabotage_full_disk_that_is_not_known_fails_the_trial_for_good(command, small, monkeypatch):
    """What happened before: the trial counts as failed, and the same command does not run it again."""
    monkeypatch.setattr(experiment, "no_room", lambda *_: None)
    monkeypatch.setattr(worker, "no_room", lambda *_: None)
    with monkeypatch.context() as patch:
        arm("examples.parquet", small.fill, patch.setattr)
        code, err = command(*SWEEP)
    small.free()
    assert command(*SWEEP)[0] == 5


def test_worker_on_a_full_disk_gives_its_trial_back_and_stops_the_sweep(command, small, monkeypatch):
    """No trial has failed and no further one is taken; the launch ends with exit code 4, not 5."""
    from ftexp.errors import NoRoom
    from ftexp.sweep import frozen, plugin

    with monkeypatch.context() as patch:
        arm("frozen configs", small.free, patch.setattr)
        patch.setattr(plugin, "_run_left", lambda *_: None)  # launched, and nothing run
        command(*SWEEP)
    sweep = frozen.load(small.folder / "outputs" / "sweeps" / "k")
    with monkeypatch.context() as patch:
        arm("examples.parquet", small.fill, patch.setattr)
        patch.setattr(worker, "give_back", lambda *given, honest=worker.give_back: (small.free(), honest(*given)))
        assert worker._main(sweep) == 4
    record = worker.open_study(sweep)
    assert [(t.state.name, t.user_attrs["ftexp:retries"]) for t in study.counted(record)] == [("WAITING", 0)]
    assert "No space left on device" in record.user_attrs[worker.STOP]
    with pytest.raises(NoRoom, match="No space left on device"):
        plugin._finish(sweep, record, sweep.run({"lora.r": "2"}, 0))
    assert command(*SWEEP)[0] == 0
