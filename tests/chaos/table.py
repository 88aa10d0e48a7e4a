"""`make chaos`: measures the figures R1 to R18 and prints them as one table.

`python tests/chaos/table.py [--only R1,R9] [--show]` measures a part, and keeps what was measured before: results are in
`outputs/chaos/results.json`, with the digest of the code they were measured with; a figure of other code is shown as
stale. R1 and R2 add up over calls: `FTEXP_KILLS` (200) and `FTEXP_FAULTS` (300) say how many a call deals.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Xml
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS, ROOT = HERE.parent, HERE.parent.parent
KEPT = ROOT / "outputs" / "chaos" / "results.json"
sys.path.insert(0, str(TESTS))

from known_answers.traps import TRAPS  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from ftexp import facts  # noqa: E402
from ftexp.files import read_json, write_json  # noqa: E402

Told = tuple[str, bool]
"""What was measured, in words, and whether it is enough."""


@dataclass(frozen=True)
class Figure:
    """A figure to reach."""

    what: str
    target: str
    measure: Callable[[list[Any]], tuple[Any, Told]]
    """Takes what earlier calls measured with this code; returns what this one did, and what both tell."""


def script(name: str, *words: object, timeout: int = 7200) -> Any:
    """Run a script of this folder in a folder of its own; return the JSON of its last line."""
    place = Path(tempfile.mkdtemp(prefix="ftexp-chaos-"))
    try:
        done = subprocess.run([sys.executable, str(HERE / name), str(place / "x"), *map(str, words)],
                              stdout=subprocess.PIPE, text=True, timeout=timeout, check=True)  # fmt: skip
    finally:
        if (place / "x" / "disk").is_mount():
            subprocess.run(["umount", "-l", str(place / "x" / "disk")])
        shutil.rmtree(place, ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def cases(*wanted: str, marks: str = "not gpu and not hub and not cluster") -> tuple[dict[str, int], str]:
    """Run tests and count their cases by outcome; `file` or `file::test`. Returns what they print, too."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "junit.xml"
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-m", marks, f"--junitxml={path}",
                               *(str(TESTS / name) for name in dict.fromkeys(wanted))], cwd=ROOT, stdout=subprocess.PIPE, text=True)  # fmt: skip
        told = {"passed": 0, "failed": 0, "skipped": 0}
        for case in Xml.parse(path).iter("testcase"):
            kinds = {child.tag for child in case}
            told["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return told, done.stdout


def counted(least: int, unit: str, *wanted: str) -> Callable[[list[Any]], tuple[Any, Told]]:
    """Make a figure of the cases of tests, of which at least so many must pass and none fail."""

    def measure(_: list[Any]) -> tuple[Any, Told]:
        told, _ = cases(*wanted)
        total = told["passed"] + told["failed"]
        good = told["passed"] >= least and not told["failed"]
        left = f", {told['skipped']} skipped" if told["skipped"] else ""
        return told, (f"{told['passed']} of {total} {unit}{left}", good)

    return measure


def kills(before: list[Any]) -> tuple[Any, Told]:
    made = script("kills.py", os.environ.get("FTEXP_KILLS", "200"))
    total = [*before, made]
    dealt, good = (sum(t[k] for t in total) for k in ("kills", "resumable"))
    most = max(t["redone"]["most"] for t in total)
    equal, of = (sum(t[k] for t in total) for k in ("bit_equal", "trainings"))
    words = f"{good} of {dealt} resumable, at most {most} steps redone; {equal} of {of} trainings bit-equal"
    return made, (words, dealt >= 200 and good == dealt and most <= 1 and equal == of)


def storm(before: list[Any]) -> tuple[Any, Told]:
    made = script("storm.py", os.environ.get("FTEXP_FAULTS", "300"), 6, len(before))
    total = [*before, made]
    names = ("faults", "trials", "lost", "doubled", "bit_identical", "points", "points_lost", "points_doubled")
    faults, trials, lost, doubled, same, points, gone, twice = (sum(t.get(k, 0) for t in total) for k in names)
    problems = [p for t in total for p in t["problems"]]
    kinds = len({kind for t in total for kind in t["kinds"]})
    words = (f"{faults} faults of {kinds} kinds, {lost} lost, {doubled} doubled, {same} of {trials} bit-identical; of {points} points "
             f"{gone} lost, {twice} doubled" + (f"; {len(problems)} problems, the first: {problems[0][:300]}" if problems else ""))  # fmt: skip
    seen = all(t.get("sees_a_changed_byte") for t in total)
    return made, (
        words,
        faults >= 300
        and kinds >= 12
        and not (lost or doubled or gone or twice or problems)
        and same == trials
        and seen,
    )


_stores: dict[str, Any] = {}


def stores() -> dict[str, Any]:
    if not _stores:
        _stores.update(script("stores.py", os.environ.get("FTEXP_ROUNDS", "20")))
    return _stores


def outage(_: list[Any]) -> tuple[Any, Told]:
    told = stores()["outage"]
    words = f"{told['added_in_loop']:+.2f} s in 10,000 steps, {told['at_the_end']:.1f} s at the end, waited {told['waited_in_all']:.1f} s; {told['lost']} of 30,000 points lost"
    return told, (words, told["added_in_loop"] < 1 and told["at_the_end"] <= 10 and told["lost"] == 0)


def many(_: list[Any]) -> tuple[Any, Told]:
    told = stores()["many"]
    return told, (
        f"{told['seconds']:.1f} s, p99 {told['p99_ms']:.2f} ms; a new store, once: {told['new_store']:.1f} s",
        told["seconds"] <= 5 and told["p99_ms"] <= 0.2 and not told["lost"],
    )


def openers(_: list[Any]) -> tuple[Any, Told]:
    told = stores()["openers"]
    return told, (f"{told['dead']} of {told['openers']} dead", told["dead"] == 0 and told["rounds"] >= 20)


def soak(_: list[Any]) -> tuple[Any, Told]:
    told, said = cases("chaos/test_soak.py", marks="chaos")
    lines = re.findall(r"^(\w+) +after (\d+) trials (\S+), after (\d+) (\S+)$", said, re.MULTILINE)
    words = ", ".join(f"{name} {first} -> {last}" for name, _, first, _, last in lines)
    trials = int(lines[0][3]) if lines else 0
    return {"cases": told, "lines": lines}, (f"{trials} trials: {words}", told["passed"] == 1 and trials >= 500)


def diverged(_: list[Any]) -> tuple[Any, Told]:
    told, _ = cases("chaos/test_diverged.py", marks="chaos")
    return told, (
        "0 of 50 best, each flagged at its step"
        if told["passed"] == 1
        else "a diverged trial was best or flagged late",
        told["passed"] == 1,
    )


def full_disk(_: list[Any]) -> tuple[Any, Told]:
    told, _ = cases("faults/test_disk.py", marks="chaos or not chaos")
    points, _ = cases("faults/test_disk.py::test_full_disk_costs_one_line_and_the_same_command_goes_on",
                      "faults/test_disk.py::test_limit_on_file_sizes_is_met_in_the_same_way", marks="chaos or not chaos")  # fmt: skip
    words = f"{points['passed']} of {points['passed'] + points['failed']} points continue, {told['passed']} of {told['passed'] + told['failed']} tests"
    return told, (words, points["passed"] >= 10 and not told["failed"] and not points["failed"])


def traps(_: list[Any]) -> tuple[Any, Told]:
    """Run every known answer and every twin by its trap; a trap counts where all of its cases pass."""
    names = {n: ([*answers], [*twins]) for n, (_, answers, twins) in TRAPS.items()}
    flat = dict.fromkeys(test for pair in names.values() for tests in pair for test in tests)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "junit.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={path}", *(str(TESTS / t) for t in flat),
                        str(TESTS / "known_answers" / "test_traps.py")], cwd=ROOT, stdout=subprocess.DEVNULL)  # fmt: skip
        bad, ran = set(), set()
        for case in Xml.parse(path).iter("testcase"):
            key = case.attrib["classname"].split(".")[-1] + "::" + case.attrib["name"].split("[")[0]
            ran.add(key)
            if {child.tag for child in case} & {"failure", "error", "skipped"}:
                bad.add(key)
    told = [[n for n, pair in names.items() if all((k := Path(t.split("::")[0]).stem + "::" + t.split("::")[1]) in ran and k not in bad for t in pair[which])]
            for which in (0, 1)]  # fmt: skip
    missed = [f"P{n}" for n in names if n not in told[0] or n not in told[1]]
    words = f"{len(told[0])} of 33 answers, {len(told[1])} of 33 twins" + (
        f"; not: {', '.join(missed)}" if missed else ""
    )
    return {"answers": told[0], "twins": told[1]}, (words, not missed and len(names) == 33)


FIGURES = {
    "R1": Figure("SIGKILL of a training, resumable", "200 of 200, at most one step redone", kills),
    "R2": Figure("a sweep under faults", "300 of 12 kinds, 0 lost, 0 doubled, all bit-identical", storm),
    "R3": Figure("resume is exact or refused", "all cases", counted(
        14, "cases", "train/test_checkpoints.py", "train/test_lengths.py::test_left_training_goes_on_to_the_same_bits",
        "train/test_sft.py::test_killed_training_of_two_rates_or_of_the_whole_model_ends_with_the_same_bits")),
    "R4": Figure("wrong resumes refused", "20 of 20", counted(20, "mutations", "train/test_checkpoints.py::test_wrong_resume_is_refused")),
    "R5": Figure("diverged trials chosen as best", "0 of 50, flagged within a step", diverged),
    "R6": Figure("a dead tracking server", "under 1 s in training, 10 s at the end, 0 of 30,000 points lost", outage),
    "R7": Figure("10,000 steps of three metrics", "5 s, p99 0.2 ms", many),
    "R8": Figure("eight processes on an empty store, 20 times", "0 of 160 dead", openers),
    "R9": Figure("disk full where something is written", "10 of 10 go on, newest seal good", full_disk),
    "R10": Figure("bad files refused by their line", "60 of 60", counted(
        60, "cases", "data/test_reader.py::test_bad_file_is_refused_with_its_message", "data/test_reader.py::test_special_files_are_refused_and_nothing_hangs",
        "data/test_reader.py::test_memory_is_bounded_by_the_longest_line")),
    "R11": Figure("absurd command lines refused", "80 of 80", lambda _: absurd()),
    "R12": Figure("hostile artefacts executed", "0 of 40", counted(40, "tests of them, none executed", "hostile/test_hostile.py")),
    "R13": Figure("planted secrets in written bytes", "0", counted(5, "tests", "hostile/test_secrets.py")),
    "R14": Figure("traps P1 to P33, answer and twin", "33 of 33, 33 of 33", traps),
    "R15": Figure("held-out loss against the exact one", "1e-6, any batch", counted(
        6, "cases", "test_evaluate.py::test_loss_is_the_same_for_every_batch_size_and_by_hand", "known_answers/test_loss.py::test_left_padded_and_packed_rows_have_the_same_loss")),
    "R16": Figure("the same config twice", "equal bytes on a CPU", counted(
        3, "cases", "train/test_sft.py::test_same_seed_gives_the_same_bits_and_another_does_not", "train/test_sft.py::test_trial_alone_equals_the_same_trial_after_others",
        "sweep/test_plugin.py::test_trial_of_a_sweep_equals_the_single_run")),
    "R17": Figure("the winner's curse is shown", "sealed score within 0.5 points over 200 sweeps", counted(
        3, "tests, 400 simulated sweeps", "test_confirm.py::test_best_of_equals_looks_too_good_and_sealed_rows_say_so",
        "stats/test_noise.py::test_expected_maximum_equals_simulation", "stats/test_pairs.py::test_optimism_is_how_much_the_best_of_equals_flatters")),
    "R18": Figure("500 trials in one process", "nothing left, memory within 5 %", soak),
}  # fmt: skip


def absurd() -> tuple[Any, Told]:
    """Count the command lines that end in the golden text; the one test holds them all."""
    told, _ = cases("test_run.py::test_absurd_configs_are_refused_in_one_line_before_torch")
    count = len((TESTS / "badinput" / "configs.txt").read_text().splitlines())
    good = told["passed"] == 1
    return told | {"lines": count}, (
        f"{count if good else 0} of {count} refused in one line before torch",
        good and count >= 80,
    )


def show(kept: dict[str, Any], code: str) -> bool:
    """Print the table; tell whether every figure was measured with this code and is reached."""
    table = Table("", "figure", "target", "measured", "")
    good = True
    for name, figure in FIGURES.items():
        one = kept.get(name)
        fresh = one is not None and one["code"] == code
        state = "not measured" if one is None else ("" if fresh else "stale: ") + ("ok" if one["passed"] else "MISSED")
        good &= bool(fresh and one["passed"])
        table.add_row(name, figure.what, figure.target, one["told"] if one else "", state)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default=",".join(FIGURES), help="figures to measure, as R1,R9; default: all")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    args = parser.parse_args()
    code = facts.code()
    kept = read_json(KEPT) or {}
    for name in () if args.show else args.only.split(","):
        one = kept.get(name)
        before = one["pieces"] if one and one["code"] == code and name in ("R1", "R2") else []
        began = time.monotonic()
        made, (told, passed) = FIGURES[name].measure(before)
        pieces = [*before, made]
        kept = read_json(KEPT) or {}
        kept[name] = {
            "told": told,
            "passed": passed,
            "pieces": pieces,
            "code": code,
            "seconds": round(time.monotonic() - began),
        }
        write_json(KEPT, kept)
        print(f"{name} {'ok' if passed else 'MISSED'}: {told}", flush=True)
    measured = show(kept, code)
    chosen = [kept[name]["passed"] for name in args.only.split(",") if name in kept]
    return 0 if (measured if args.show else all(chosen)) else 1


if __name__ == "__main__":
    sys.exit(main())
