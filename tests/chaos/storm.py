"""`python tests/chaos/storm.py FOLDER FAULTS [TRIALS [SEED [KINDS]]]`: a sweep under faults of seventeen kinds; prints JSON.

The faults come from outside: signals, files, a small file system, a tracking server of its own, a clock file. They are
dealt from shuffled packs that hold each kind once. A sweep that ends is compared with one that was left alone, and the
next begins, until all faults are dealt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
from nursery import Child, Disk, disk, launch, workers

from ftexp import sync
from ftexp.files import read_json
from ftexp.sweep import study

STEPS, LONGEST = 20, 400
MEASURED = ("time", "cost/", "plan/memory_gib_")
WORDS = ["model=tiny", "model.dtype=float32", "data.rows=120", "data.valid=12", "data.max_length=256", "trainer.lr=1e-2",
         f"trainer.steps={STEPS}", "trainer.report_steps=10", "trainer.checkpoint_minutes=0", "trainer.neftune=5",
         "lora.dropout=0.1", "eval=loss", "name=k", "sweep.workers=2", "sweep.max_retries=100", "-m"]  # fmt: skip


class Storm:
    """A sweep, what runs it, and what is done to it."""

    def __init__(self, place: Path, lent: Disk, trials: int, seed: int) -> None:
        self.place, self.lent, self.trials = place, lent, trials
        self.dice = random.Random(seed)
        self.clock, self.out = place / "clock", place / "out.txt"
        self.told: Counter[str] = Counter()
        self.problems: list[str] = []
        self.process: Child | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.words = [*WORDS, f"seed={','.join(map(str, range(trials // 2)))}", "lora.r=2,4"]
        self.server = self.serve()
        self.kinds = [k for k in KINDS if lent.mounted or k not in (Storm.disk_full, Storm.disk_read_only)]
        self.rounds = self.brought_back = 0
        self.began = time.monotonic()
        self.fresh()

    def fresh(self) -> None:
        """Begin a sweep in an empty folder."""
        self.rounds += 1
        self.folder = self.lent.folder / f"wild{self.rounds}"
        self.folder.mkdir()
        self.sweep, self.brought_back = self.folder / "outputs" / "sweeps" / "k", 0
        self.up()

    def start(self) -> Child:
        return launch([*self.words, f"track.uri=http://127.0.0.1:{self.port}"], self.folder, self.out, self.clock)

    def up(self) -> None:
        self.process = self.start()

    def down(self) -> None:
        """SIGKILL everything."""
        assert self.process is not None
        alive = workers(self.process)
        self.process.kill()
        self.process.wait(30)
        self.gone(alive)

    def gone(self, alive: list[psutil.Process]) -> None:
        """Wait for workers that end with their supervisor."""
        if psutil.wait_procs(alive, timeout=20)[1]:
            self.problems.append("workers outlived their supervisor")

    def serve(self) -> Child:
        """Start the tracking server, or start it again."""

        def work() -> int:
            from mlflow import server
            from werkzeug.serving import make_server

            kept = self.place / "ml"
            kept.mkdir(exist_ok=True)
            os.environ[server.BACKEND_STORE_URI_ENV_VAR] = f"sqlite:///{kept}/ml.db"
            os.environ[server.ARTIFACT_ROOT_ENV_VAR] = str(kept)
            make_server("127.0.0.1", self.port, server.app, threaded=True).serve_forever()
            return 0

        made = Child(work, self.place / "server.txt")
        for _ in range(600):
            with socket.socket() as asked:
                if not asked.connect_ex(("127.0.0.1", self.port)):
                    break
            time.sleep(0.05)
        return made

    def runs(self) -> list[Path]:
        return sorted(p.parent for p in self.sweep.glob("*/trial.json"))

    def expect(self, code: int, text: str, process: Child | None = None) -> None:
        """Have a launch end with a code and a line."""
        at = self.out.stat().st_size
        got = (process or self.start()).wait(LONGEST)
        said = self.out.read_bytes()[at:].decode(errors="replace").replace("\n", " ")
        if got != code or text not in said:
            self.problems.append(f"expected exit code {code} and {text!r}, got {got}: {said[-800:]}")

    def until(self, ready: Callable[[], object]) -> bool:
        """Wait until something is there to be hit; False where the launch ends before."""
        began = time.monotonic()
        while not ready():
            if self.process.poll() is not None or time.monotonic() - began > LONGEST:
                return False
            time.sleep(0.02)
        return True

    def some_worker(self) -> psutil.Process | None:
        """Wait for workers, and choose one."""
        found: list[psutil.Process] = []
        self.until(lambda: found.extend(workers(self.process)) or found)
        return self.dice.choice(found) if found else None

    def sealed(self) -> list[Path]:
        """List the checkpoints that are sealed, by their step."""
        found = self.sweep.glob("*/checkpoints/*/manifest.json")
        return [p.parent for p in sorted(found, key=lambda p: int(p.parent.name.split("-")[1]))]

    # the faults; each returns False where there was nothing it could hit

    def worker_killed(self) -> bool:
        return self.signalled(signal.SIGKILL)

    def worker_terminated(self) -> bool:
        return self.signalled(signal.SIGTERM)

    def signalled(self, number: int) -> bool:
        if (chosen := self.some_worker()) is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            chosen.send_signal(number)
        return True

    def supervisor_killed(self) -> bool:
        alive = workers(self.process)
        self.process.kill()
        self.process.wait(30)
        self.gone(alive)
        return True

    def all_killed(self) -> bool:
        self.down()
        return True

    def launch_terminated(self) -> bool:
        if self.some_worker() is None:
            return False
        self.process.terminate()
        if (code := self.process.wait(LONGEST)) not in (75, 0):
            self.problems.append(f"exit code {code} after SIGTERM")
        return True

    def worker_stopped(self) -> bool:
        """It looks dead for a while, and lives: its trial is nobody else's."""
        if (chosen := self.some_worker()) is None or not self.until(lambda: self.held_by(chosen.pid)):
            return False
        try:
            chosen.send_signal(signal.SIGSTOP)
            before = self.held_by(chosen.pid)
            time.sleep(1.5)
            if self.held_by(chosen.pid) != before:
                self.problems.append("the trial of a stopped worker was given away")
            chosen.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            return False
        return bool(before)

    def held_by(self, pid: int) -> list[int]:
        from optuna import load_study
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        if not psutil.pid_exists(pid):
            return [-1]
        try:  # without the lock, which the stopped one may hold
            record = load_study(
                study_name="k", storage=JournalStorage(JournalFileBackend(str(self.sweep / study.JOURNAL)))
            )
        except (KeyError, OSError, ValueError):
            return []
        mine = [t for t in record.get_trials() if t.user_attrs.get("ftexp:worker", {}).get("pid") == pid]
        return [t.number for t in mine if t.state.name == "RUNNING"]

    def record_torn(self) -> bool:
        path = self.sweep / study.JOURNAL
        if not self.until(path.exists):
            return False
        self.down()
        with path.open("ab") as out:
            out.write(b'{"op_code": 8, "worker_id": "x", "tri')
        return True

    def record_corrupted(self) -> bool:
        """Garbage at the end or in the middle is refused by its line; without that line the sweep goes on."""
        path = self.sweep / study.JOURNAL
        if not self.until(lambda: path.exists() and path.read_bytes().count(b"\n") > 3):
            return False
        self.down()
        study.cut_torn(path)
        lines = path.read_bytes().splitlines(keepends=True)
        at = self.dice.choice([len(lines), self.dice.randrange(1, len(lines))])
        path.write_bytes(b"".join([*lines[:at], b"\x00\x00garbage\n", *lines[at:]]))
        self.expect(4, f"{study.JOURNAL}:{at + 1}: must be one entry")
        path.write_bytes(b"".join(lines))
        return True

    def checkpoint_damaged(self) -> bool:
        if not self.until(self.sealed):
            return False
        self.down()
        if not self.sealed():
            return False
        folder = self.sealed()[-1]
        file = self.dice.choice(["manifest.json", "optimizer.pt", "adapter_model.safetensors", "trainer_state.json"])
        content = bytearray((folder / file).read_bytes())
        match self.dice.choice(["cut", "flipped", "gone"]):
            case "cut":
                (folder / file).write_bytes(content[: len(content) // 2])
            case "flipped":
                content[self.dice.randrange(len(content))] ^= 1
                (folder / file).write_bytes(content)
            case "gone":
                (folder / file).unlink()
        return True

    def files_deleted(self) -> bool:
        """Of a complete trial, which runs again, and of a running one."""
        if not self.until(self.runs):
            return False
        self.down()
        kept = self.runs()
        folder = self.dice.choice(kept)
        if complete := (read_json(folder / "trial.json") or {}).get("state") == "complete":
            self.brought_back += self.ended(int(folder.name))
        match self.dice.choice(
            ["adapter", "trial.json", "examples.parquet", "all"] if complete else ["trial.json", "all"]
        ):
            case "adapter":
                shutil.rmtree(folder / "adapter")
            case "all":
                shutil.rmtree(folder)
            case name:
                (folder / name).unlink()
        return True

    def ended(self, number: int) -> bool:
        """Tell whether a ticket is complete on record; its folder may be, and the record not yet."""
        return any(t.state.name == "COMPLETE" and study.ticket(t) == number for t in study.counted(self.record()))

    def record(self):
        import optuna

        return optuna.load_study(study_name="k", storage=study.storage(self.sweep, None))

    def disk_full(self) -> bool:
        if not self.lent.mounted:
            return False
        self.lent.fill()
        time.sleep(1.5)
        self.lent.free()
        return True

    def disk_read_only(self) -> bool:
        self.down()
        if not self.lent.mounted:
            return False
        subprocess.run(["mount", "-o", "remount,ro", str(self.lent.folder)], check=True)
        try:
            self.expect(4, "Read-only" if os.access(self.lent.folder, os.W_OK) else "can be written")
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(self.lent.folder)], check=True)
        return True

    def clock_forward(self) -> bool:
        self.clock.write_text("3600")
        return True

    def clock_back(self) -> bool:
        self.clock.write_text("-3600")
        return True

    def server_killed(self) -> bool:
        self.server.kill()
        self.server.wait(30)
        time.sleep(1.0)
        self.server = self.serve()
        return True

    def server_stopped(self) -> bool:
        """It answers nobody for longer than anybody waits."""
        self.server.send_signal(signal.SIGSTOP)
        time.sleep(4)
        self.server.send_signal(signal.SIGCONT)
        return True

    def second_launch(self) -> bool:
        if self.some_worker() is None:
            return False
        other = self.start()
        at = self.out.stat().st_size
        code = other.wait(LONGEST)
        if code == 4:
            return "is being run by process" in self.out.read_bytes()[max(0, at - 2000) :].decode(
                errors="replace"
            ).replace("\n", " ")
        return False  # the first had ended by then, so this was an ordinary launch

    # what is right

    def hashes(self, sweep: Path) -> dict[str, str]:
        found = sweep.glob("*/adapter/adapter_model.safetensors")
        return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}

    def scores(self, sweep: Path) -> dict[str, dict[str, float]]:
        kept = {p.parent.name: read_json(p)["scores"] for p in sweep.glob("*/trial.json")}
        return {n: {k: v for k, v in s.items() if not k.startswith(MEASURED)} for n, s in kept.items()}

    def curves(self, sweep: Path) -> dict[str, list[dict[str, float]]]:
        told = {}
        for path in sweep.glob("*/metrics.jsonl"):
            points = [json.loads(line) for line in path.read_text().splitlines()]
            told[path.parent.name] = [{k: v for k, v in p.items() if not k.startswith(MEASURED)} for p in points]
        return told

    def judge(self, calm: Path) -> None:
        """Compare a sweep that has ended with the calm one, and MLflow with the files."""
        record = self.record()
        states = Counter(t.state.name for t in study.counted(record))
        tickets = [study.ticket(t) for t in study.counted(record)]
        complete = sum(t.state.name == "COMPLETE" for t in record.get_trials())
        self.told["trials"] += self.trials
        self.told["lost"] += self.trials - states["COMPLETE"] + len(set(range(self.trials)) - set(tickets))
        self.told["doubled"] += abs(complete - self.trials - self.brought_back)
        ours, theirs = self.hashes(self.sweep), self.hashes(calm)
        self.told["bit_identical"] += sum(ours.get(n) == h for n, h in theirs.items())
        for what in (self.scores, self.curves):
            if what(self.sweep) != what(calm):
                self.problems.append(f"other {what.__name__} in round {self.rounds}")
        left = [str(p.relative_to(self.sweep)) for p in self.sweep.glob("*/checkpoints")]
        if left:
            self.problems.append(f"left behind: {left}")
        self.points()

    def points(self) -> None:
        """Bring what MLflow missed; then each point of the files is there, and once."""
        brought = launch([str(self.folder / "outputs")], self.folder, self.out, self.clock, sync.main)
        if brought.wait(LONGEST):
            self.problems.append("sync failed")
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"http://127.0.0.1:{self.port}")
        for folder in self.runs():
            run_id = read_json(folder / "trial.json")["mlflow_run"]
            for line in (folder / "metrics.jsonl").read_text().splitlines():
                self.told["points"] += len(json.loads(line)) - 2
            wanted = Counter((k, json.loads(line)["step"]) for line in (folder / "metrics.jsonl").read_text().splitlines()
                             for k in json.loads(line) if k not in ("step", "time"))  # fmt: skip
            there = Counter((name, m.step) for name in client.get_run(run_id).data.metrics
                            for m in client.get_metric_history(run_id, name))  # fmt: skip
            self.told["points_lost"] += sum((wanted - there).values())
            # What was measured anew after a kill, as seconds are, stands beside what was measured before it.
            twice = {
                point: n
                for point, n in (there - wanted).items()
                if not (point[1] == 0 and point[0].startswith(MEASURED))
            }
            self.told["points_doubled"] += sum(twice.values())
            if twice:
                self.problems.append(f"more than once in MLflow: {list(twice.items())[:4]}")


KINDS: tuple[Callable[[Storm], bool], ...] = (
    Storm.worker_killed, Storm.worker_terminated, Storm.supervisor_killed, Storm.all_killed, Storm.launch_terminated,
    Storm.worker_stopped, Storm.record_torn, Storm.record_corrupted, Storm.checkpoint_damaged, Storm.files_deleted,
    Storm.disk_full, Storm.disk_read_only, Storm.clock_forward, Storm.clock_back, Storm.server_killed,
    Storm.server_stopped, Storm.second_launch,
)  # fmt: skip
FINE = {0: "ended", -9: "killed", 75: "left", 4: "no room"}
"""Exit codes that a launch may have in a storm."""


def main() -> int:
    place, count = Path(sys.argv[1]).absolute(), int(sys.argv[2])
    trials = int(sys.argv[3]) if len(sys.argv) > 3 else 6
    seed = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    chosen = sys.argv[5].split(",") if len(sys.argv) > 5 else []
    place.mkdir(parents=True)
    (place / "calm").mkdir()
    began = time.monotonic()
    with disk(place / "disk", mib=256) as lent:
        storm = Storm(place, lent, trials, seed)
        storm.kinds = [kind for kind in storm.kinds if not chosen or kind.__name__ in chosen]
        storm.down()
        calm = launch([*storm.words, "track=none"], place / "calm", place / "calm.txt", place / "no clock")
        assert calm.wait(LONGEST) == 0, (place / "calm.txt").read_text()
        shutil.rmtree(storm.folder)
        storm.folder.mkdir()
        storm.up()
        weather(storm, count, place / "calm" / "outputs" / "sweeps" / "k")
        storm.server.kill()
        last = next(storm.sweep.glob("*/adapter/adapter_model.safetensors"))
        content = bytearray(last.read_bytes())
        content[-1] ^= 1
        last.write_bytes(content)
        storm.told["sees_a_changed_byte"] = storm.hashes(storm.sweep) != storm.hashes(place / "calm/outputs/sweeps/k")
    kinds = {k.removeprefix("fault "): v for k, v in storm.told.items() if k.startswith("fault ")}
    told = {k: v for k, v in storm.told.items() if not k.startswith("fault ")}
    print(json.dumps({"faults": sum(kinds.values()), "kinds": kinds, "sweeps": storm.rounds, **told,
                      "problems": storm.problems[:20], "seconds": round(time.monotonic() - began)}))  # fmt: skip
    return 0


def weather(storm: Storm, count: int, calm: Path) -> None:
    """Deal the faults, and let the last sweep end."""
    pack: list[Callable[[Storm], bool]] = []
    dealt, quiet_since = 0, time.monotonic()
    while True:
        time.sleep(storm.dice.uniform(0.2, 1.2))
        code = storm.process.poll()
        if code is not None:
            if code not in FINE:
                storm.problems.append(f"exit code {code}: {storm.out.read_text(errors='replace')[-1500:]}")
            if code == 0:
                storm.judge(calm)
                if dealt >= count:
                    return
                shutil.rmtree(storm.folder)
                storm.fresh()
                continue
            storm.up()
        if storm.problems and len(storm.problems) > 10:
            return
        if dealt >= count:
            if time.monotonic() - quiet_since > LONGEST:
                storm.problems.append("the last sweep does not end")
                storm.down()
                return
            continue
        if not pack:
            pack = storm.dice.sample(storm.kinds, len(storm.kinds))
        if pack[-1](storm):
            kind = pack.pop().__name__
            storm.told[f"fault {kind}"] += 1
            dealt, quiet_since = dealt + 1, time.monotonic()
            print(f"{time.monotonic() - storm.began:.0f} s: {dealt} {kind}", file=sys.stderr, flush=True)
        else:
            pack.insert(0, pack.pop())  # nothing to hit at this moment


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
