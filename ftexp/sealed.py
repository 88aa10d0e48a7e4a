"""Openings of a sweep's sealed rows, as `confirm.json` tells them: read back, and put in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ftexp.errors import Damaged
from ftexp.files import read_json
from ftexp.metrics import written

FILE = "confirm.json"
NEEDS = {"plan", "runs", "seeds", "test"}
"""Keys that every opening has."""
LABELS = "test_labels.json"
"""Of a run whose sealed rows were opened: one entry a label, where rows have labels."""


def openings(folder: Path) -> list[dict[str, Any]]:
    """Read the openings of a sweep's sealed rows, oldest first.

    Raises:
        Damaged: `confirm.json` holds something else.
    """
    entries = (read_json(folder / FILE, "openings") or {"openings": []})["openings"]
    if not isinstance(entries, list) or not all(isinstance(one, dict) and one.keys() >= NEEDS for one in entries):
        raise Damaged(f"{folder / FILE}: is damaged, an opening must have {', '.join(sorted(NEEDS))}; put it back")
    return entries


def line(entry: dict[str, Any]) -> str:
    """Tell an opening in one line."""
    opened = f"sealed rows opened {times(entry)}"
    if "result" not in entry:
        return f"Confirmation of {entry['plan'][0]['label']} begun {entry['date']}, {opened}: not finished."
    result = entry["result"]
    winner, name = result["members"][0], result["objective"].removeprefix("valid/")
    score = f"{name.replace('_', ' ')} {ranged(winner['test'][name])}"
    rows = counted(result["rows"], result.get("groups"), "sealed ")
    return f"Confirmed on {rows} and {fresh(winner)}: {winner['label']}, {score}; {opened}."


def lines(entry: dict[str, Any]) -> list[str]:
    """Tell an opening in a few plain lines, for below the table; only that it is not finished where it is not."""
    from ftexp.stats.noise import ALPHA

    if "result" not in entry:
        return [line(entry)]
    result = entry["result"]
    winner, said = result["members"][0], [line(entry)]
    expected = result["expected_optimism"]
    if expected is not None:
        equal = f"; were all {result['points']} points equal, {number(expected)} would be expected"
        said.append(
            f"The winner looked {_off(winner['optimism'], result['unit'])} in the sweep than on sealed rows"
            f"{equal if math.isfinite(expected) and result['points'] > 1 else ''}."
        )
    if result["replicates"] == 1:
        said.append("One run a point in the sweep: its noise between seeds is not in the interval of the optimism.")
    if (pair := result["pair"]) is not None:
        verdict = "are not told apart" if pair["p"] > ALPHA else "differ"
        said.append(f"Winner less cheapest: {ranged({'value': pair['difference'], **pair})}{result['unit']}, "
                    f"p={pair['p']:.2g}: they {verdict} on sealed rows.")  # fmt: skip
    said += [f"The winner alone: {result['alone']}."] if result["alone"] else []
    said += _lone(result["members"])
    told = before(entry)
    return said if told is None else [*said, f"{told[0].upper()}{told[1:]}."]


def fresh(member: dict[str, Any]) -> str:
    """Count the fresh seeds of a point, and those of them that diverged and have no score."""
    done, failed = len(member["seeds"]), member["failed"]
    told = f"{done} fresh seed{'s' * (done != 1)}"
    return f"{told} ({failed} of {done + failed} seeds diverged)" if failed else told


def _lone(members: list[dict[str, Any]]) -> list[str]:
    """Say where a point's own seeds tell nothing of the noise between seeds: it is pooled over all that have two."""
    lone = [member["role"] for member in members if len(member["seeds"]) == 1]
    if len(lone) == len(members):
        return ["One fresh seed: the intervals are over rows alone."]
    known = next(member["role"] for member in members if len(member["seeds"]) > 1)
    return [f"One fresh seed of the {role}: the noise between seeds in its interval is that of the {known}."
            for role in lone]  # fmt: skip


def before(entry: dict[str, Any]) -> str | None:
    """Tell which other sweeps opened rows of this opening before; None where none did."""
    if not entry["elsewhere"]:
        return None
    rows = entry["test"]["rows"]
    shared = entry.get("shared", rows)  # openings of before rows had hashes share all
    which = "these sealed rows" if shared == rows else f"{shared} of these {rows} sealed rows"
    were = "was" if shared == 1 < rows else "were"
    return f"{which} {were} opened before, by {'; '.join(entry['elsewhere'])}"


def moved(entry: dict[str, Any], trials: list[int], label: str, ranking: str) -> str | None:
    """Say that another point ranks first than the one that was confirmed; None where it is the same."""
    confirmed = entry["plan"][0]
    if confirmed["trials"] == trials:
        return None
    by = entry.get("by")
    first = f"first by {ranking}" if by not in (None, ranking) else "first now"
    return f"Confirmed was {confirmed['label']}{f', first by {by}' if by else ''}; {first} is {label}."


def labels(folder: Path) -> list[dict[str, Any]]:
    """Read what the last finished opening says of each label, on the sealed rows and of the winner.

    Counts and scores are means over the fresh seeds; what one of them has no number for is None.
    """
    entry = next((e for e in reversed(openings(folder)) if "result" in e), None)
    runs = [folder / "confirm" / str(r["number"]) / LABELS for r in (entry or {"runs": []})["runs"] if r["member"] == 0]
    tables = [table for path in runs if (table := read_json(path, of=list)) is not None]
    return [_over_seeds(list(rows)) for rows in zip(*tables, strict=True)]


def _over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        known = None if None in values else sum(values) / len(values) if not isinstance(first, str) else first
        found[key] = known
    return found


def counted(rows: int, groups: int | None, kind: str = "") -> str:
    """Count rows; where rows of a group are one unit of the test, the groups first.

    >>> counted(1, None), counted(192, 12), counted(24, None, "sealed ")
    ('1 row', '12 groups (192 rows)', '24 sealed rows')
    """
    told = f"{rows} {kind}row{'s' * (rows != 1)}"
    return told if groups is None else f"{groups} group{'s' * (groups != 1)} ({told})"


def times(entry: dict[str, Any]) -> str:
    """Say how often the rows of an opening have been opened, this time included."""
    return "1 time" if entry["opened"] == 1 else f"{entry['opened']} times"


def ranged(interval: dict[str, Any]) -> str:
    """Write a score with its interval where it has one."""
    value = number(interval["value"])
    return value if interval["low"] is None else f"{value} ({number(interval['low'])} to {number(interval['high'])})"


def _off(optimism: dict[str, Any], unit: str) -> str:
    """Say by how much a point looked better, or worse, with the interval of that."""
    if optimism["value"] is None or optimism["value"] >= 0:
        return f"{ranged(optimism)}{unit} better"
    low, high = (None if end is None else -end for end in (optimism["high"], optimism["low"]))
    return f"{ranged({'value': -optimism['value'], 'low': low, 'high': high})}{unit} worse"


def number(value: float | None) -> str:
    """Write a score in four digits after the point."""
    return "undefined" if value is None else written(value)
