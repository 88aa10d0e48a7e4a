"""`python -m ftexp.report <folder>`: a sweep or a run as a leaderboard, a page or data, from its files alone."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Quote, QuotedString
from rich.console import Console

from ftexp import board as boards
from ftexp import config, metrics, overrides, runs, sealed, track, verb
from ftexp import own as owns
from ftexp.board import Board, read
from ftexp.errors import ConfigError, Damaged, MachineError
from ftexp.files import finite, read_json, read_sweep, write_text
from ftexp.metrics import METRICS
from ftexp.page.text import visible
from ftexp.progress import Sheet

if TYPE_CHECKING:
    from ftexp.compare import Verdict
    from ftexp.page.figures import Sweep

WIDTH = 132
"""Columns of the table where the output is not a terminal."""
PAGE = "report.html"
FORMATS = ("md", "csv", "json")
NOTE = 5000
"""Letters of a description; MLflow takes 8000 bytes of a tag."""
STYLES = {"base": "dim", "best": "bold", "unfinished": "dim"}


def leaderboard(board: Board) -> Sheet:
    """Lay the leaderboard out for a terminal."""
    replicated = any(point.spread is not None for point in board.points)
    title = f"ranked by {board.ranking}" + (", means over seeds" if replicated else "")
    table = Sheet(title)
    for n, column in enumerate(boards.titles(board)):
        table.column(column, right=n > 1, whole=n == 0)
    for line in boards.lines(board):
        table.row(*line.cells, style=STYLES.get(line.kind, ""), end_section=line.ends)
    return table


def gather(folder: Path, by: str | None = None) -> Sweep:
    """Read all that the page and the notebooks show of a sweep, or of a single run; ranked as by `judge`.

    Raises:
        FtexpError: as of `judge`.
    """
    return beside(folder, *judge(folder, by))


def judge(folder: Path, by: str | None = None) -> tuple[Board, Verdict]:
    """Read the leaderboard and what its ranking is worth; where scores are of different kinds none is best.

    Args:
        folder: of the sweep or the run.
        by: a metric, or a function of one's own as `scores.py:number`; None ranks by the sweep's first objective.

    Raises:
        MachineError: the folder holds neither sweep nor run, or a trial's completions cannot be read.
        ConfigError: there is no such metric, function or score.
        DataError: the function fails on a row.
    """
    from ftexp import compare  # numpy and scipy, after the command line is checked

    if by is None or (":" not in by and not by.endswith(".py")):
        name, scorer, own = by and checked(by), None, None
    else:
        function = owns.load(by)
        name, scorer, own = metrics.OWN, function.values, (by, lambda place: function.scores(_rows(place)))
    board = read(folder, name, own)
    verdict = compare.read(folder, board.trials, board.objective, scorer)
    return (replace(board, best=None) if isinstance(verdict.untested, compare.Unlike) else board), verdict


def checked(by: str) -> str:
    """Return the name of a metric that may rank.

    Raises:
        ConfigError: there is no such metric, or it ranks nothing.
    """
    metrics.check_objective(by, {key for metric in METRICS.values() for key in metric.needs}, "--by")
    return by


def _rows(place: Path) -> dict[str, list[Any]]:
    from ftexp import compare

    if (content := compare.read_table(place / "examples.parquet")) is None:
        raise MachineError(f"{place / 'examples.parquet'}: must be the table of a trial's rows, it cannot be read")
    return content


def beside(folder: Path, board: Board, verdict: Verdict) -> Sweep:
    """Read what stands in the folder beside the trials: curves, rows and labels of the best point, its confirmation."""
    from ftexp import compare, examples
    from ftexp.page.figures import Sweep

    frozen = read_sweep(folder)
    places = {t["number"]: folder if frozen is None else folder / str(t["number"]) for t in board.trials}
    winner = None if verdict.best is None else boards.point_of(board, verdict.points[verdict.best].trials)
    shown = None if winner is None else winner.trials[0]["number"]
    content = None if shown is None else compare.read_table(places[shown] / "examples.parquet")
    return Sweep(
        name=folder.resolve().name,
        board=board,
        verdict=verdict,
        winner=winner,
        axes=tuple(axis["key"].lstrip("+") for axis in (frozen or {}).get("axes", [])),
        curves={n: track.curve(place / track.FILE, "valid/loss") for n, place in places.items()},
        rows=examples.of(content, _separator(winner)) if content else [],
        command=() if shown is None else command(places[shown], winner.trials[0] if winner else {}),
        openings=sealed.openings(folder),
        labels=() if shown is None else read_json(places[shown] / "labels.json", of=list) or (),
        sealed_labels=sealed.labels(folder),
    )


def _separator(winner: boards.Point | None) -> str:
    """Tell what stands between the labels of a trial."""
    return "," if winner is None else winner.trials[0].get("config", {}).get("eval.labels") or ","


def command(place: Path, trial: dict[str, Any]) -> tuple[str, ...]:
    """Return the words that run a trial again, alone; where it was tracked is left to the reader.

    Raises:
        Damaged: `.hydra/overrides.yaml` holds something else.
    """
    import yaml

    path = place / ".hydra" / "overrides.yaml"
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    except FileNotFoundError:
        return ()
    except (yaml.YAMLError, ValueError):
        told = None
    if not isinstance(told, list):
        raise Damaged(f"{path}: is damaged, it must be a list of overrides; put it back or remove it")
    seed = trial.get("config", {}).get("seed", 0)
    words = [str(o) for o in told if not str(o).startswith(("track.", "name=", "seed=", "+track."))]
    sweep = read_sweep(place.parent) if place.name.isdigit() else None
    own = _config_dir(place) if sweep is None else sweep.get("config_dir")
    flags = () if own is None else ("--config-dir", own)
    files = [word.partition("=")[2] for word in words if word.startswith("sweep=")]
    words = [word for word in words if not word.startswith("sweep=")]
    for file in files:
        words = [*_beside_the_search(file, own, trial, words), *words]
    return ("python", "-m", "ftexp.run", *flags, *words, *([f"seed={seed}"] if seed else []))


def _beside_the_search(file: str, own: str | None, trial: dict[str, Any], words: list[str]) -> list[str]:
    """Write what a file of `sweeps/` chooses for all trials as overrides; with `sweep=` the words would search again.

    Args:
        file: its name.
        own: folder of the launch's `--config-dir`.
        trial: whose values count, since the file may have been edited.
        words: overrides of the trial, which win.
    """
    import yaml

    places = [overrides.SWEEPS, *([] if own is None else [Path(own) / "sweeps"])]
    path = next((p for p in (place / f"{file}.yaml" for place in places) if p.exists()), None)
    told = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    given = {word.lstrip("+").partition("=")[0] for word in words}
    entries = [entry for entry in told.get("defaults", []) if isinstance(entry, dict)]
    groups = {key.removeprefix("override ").lstrip("/"): value for entry in entries for key, value in entry.items()}
    keys = config.flat({key: value for key, value in told.items() if key not in ("hydra", "defaults")})
    values = {key: trial["config"][key] for key in keys if key in trial["config"]}
    sign = {key: "++" if key.startswith(overrides.OPEN) else "" for key in values}
    return [
        *(f"{key}={value}" for key, value in groups.items() if key not in given),
        *(f"{sign[key]}{key}={_spelled(value)}" for key, value in values.items() if key not in given),
    ]


def _spelled(value: Any) -> str:
    """Write a value of a config as an override has it.

    >>> _spelled([1, None, True, "all-linear", "a b"])
    '[1,null,true,all-linear,"a b"]'
    """
    if isinstance(value, list):
        return f"[{','.join(map(_spelled, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {_spelled(part)}' for key, part in value.items())}}}"
    if not isinstance(value, str):
        return json.dumps(value)
    return value if re.fullmatch(r"[\w./:@+-]+", value) else QuotedString(value, Quote.double).with_quotes()


def _config_dir(place: Path) -> str | None:
    """Return the folder of a single run's `--config-dir`, as Hydra noted it."""
    import yaml

    try:
        path = place / ".hydra" / "hydra.yaml"
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
        sources = told["hydra"]["runtime"]["config_sources"]
    except (FileNotFoundError, KeyError, TypeError):
        return None
    except (yaml.YAMLError, ValueError) as error:
        raise Damaged(f"{path}: is damaged, it must be YAML as Hydra wrote it; put it back or remove it") from error
    return next((os.path.relpath(s["path"]) for s in sources if s["provider"] == "command-line"), None)


def show(folder: Path, html: Path | None = None, page: bool = True, by: str | None = None) -> None:
    """Print the leaderboard and what the ranking is worth, and write the page.

    Args:
        folder: of the sweep or the run.
        html: where the page goes; None takes `report.html` in the folder.
        page: whether there is one.
        by: what ranks, as of `judge`; the page in the folder stays that of the sweep's own objective.

    Raises:
        FtexpError: as of `judge`, or the page cannot be written.
    """
    from ftexp import compare
    from ftexp.page import figures

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    board, verdict = judge(folder, by)
    console.print(leaderboard(board))
    sweep = beside(folder, board, verdict)
    for line in [*filter(None, [board.line()]), *compare.lines(sweep.verdict), *figures.confirmed(sweep)]:
        console.print(line, markup=False, highlight=False)
    for trial in board.trials:
        if "error" in trial:
            console.print(f"trial {trial['number']} {trial['state']}: {trial['error']}", markup=False)
    if page and (by is None or html is not None):
        path = write_page(folder, sweep, html)
        console.print(f"page: {path}", markup=False, highlight=False, soft_wrap=True)


def write_page(folder: Path, sweep: Sweep, html: Path | None = None) -> Path:
    """Write the page, and show it with the sweep in the tracking store where it is new.

    Raises:
        MachineError: the file cannot be written.
    """
    from ftexp.page.html import page

    path, text = html or folder / PAGE, page(sweep)
    try:
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return path
        write_text(path, text)
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(f"the page cannot be written to {path}: {error}; --html PATH names another place") from error
    kept = read_sweep(folder) or {}
    if html is None and kept.get("mlflow_run"):
        track.attach(kept["track_uri"], kept["mlflow_run"], path, _note(sweep))
    return path


def _note(sweep: Sweep) -> str:
    """Write what the ranking is worth as Markdown, for the description of the sweep's run."""
    from ftexp import compare

    told = [*filter(None, [sweep.board.line()]), *compare.lines(sweep.verdict)]
    return "\n".join(f"- {markdown(line)}" for line in told)[:NOTE]


def data(sweep: Sweep) -> dict[str, Any]:
    """Sum a sweep up for scripts, numbers in full; what is unknown is null."""
    board, verdict = sweep.board, sweep.verdict
    tested = {point.trials: (n, point) for n, point in enumerate(verdict.points)}
    points = []
    for point in board.points:
        numbers = tuple(t["number"] for t in point.trials)
        n, told = tested.get(numbers, (None, None))
        points.append({
            "trials": list(numbers), "overrides": boards.label(point), "best": n is not None and n == verdict.best,
            "states": [t["state"] for t in point.trials], "low": told and told.score.low,
            "high": told and told.score.high, "p": told and told.p,
            "same_as_best": None if n is None or not verdict.same else n in verdict.same,
            "between_seeds": point.spread, "reasons": [t["error"] for t in point.trials if "error" in t],
            "scores": point.scores,
        })  # fmt: skip
    return finite({
        "name": sweep.name, "objective": board.objective, "trials": len(board.trials) + board.absent,
        "not_begun": board.absent, "points": points, "rows": verdict.rows, "groups": verdict.groups,
        "detectable": verdict.detectable, "untested": verdict.untested, "cost": verdict.cost,
        "cheapest": None if verdict.cheapest is None else verdict.points[verdict.cheapest].label,
        "importance": {key: [s.value, s.low, s.high] for key, s in verdict.importance.items()},
        "rate": None if verdict.rate is None else vars(verdict.rate),
        "front": list(verdict.front), "confirmed": list(sweep.openings),
    })  # fmt: skip


def export(folder: Path, form: str, by: str | None = None) -> str:
    """Write a sweep as a Markdown leaderboard, as CSV with one line a point, or as JSON."""
    if form == "md":
        board, _ = judge(folder, by)
        rows = [boards.titles(board), *(line.cells for line in boards.lines(board))]
        told = ["| " + " | ".join(markdown(c) for c in row) + " |" for row in rows]
        return "\n".join([told[0], "|---|---|" + "---:|" * (len(rows[0]) - 2), *told[1:]]) + "\n"
    found = data(gather(folder, by))
    return json.dumps(found, indent=1) + "\n" if form == "json" else _csv(found["points"])


def markdown(text: str) -> str:
    """Escape what ends a cell, a line or the table's text in Markdown, where HTML passes through."""
    for sign, instead in (("\\", "\\\\"), ("|", "\\|"), ("&", "&amp;"), ("<", "&lt;"), ("`", "\\`")):
        text = text.replace(sign, instead)
    return visible(" ".join(text.split()))


def _csv(points: list[dict[str, Any]]) -> str:
    flat = [
        {"trials": _joined(p["trials"]), **{k: p[k] for k in ("overrides", "best", "low", "high", "p", "same_as_best")},
         "states": _joined(p["states"]), "between_seeds": p["between_seeds"], "reasons": "; ".join(p["reasons"]),
         **p["scores"]}
        for p in points
    ]  # fmt: skip
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _joined(values: list[Any]) -> str:
    return " ".join(map(str, values))


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        "ftexp report", description="Print the leaderboard of a sweep or a run, and write it as one HTML page."
    )
    made.add_argument("folder", type=Path, help="of a sweep or a run, or its name")
    made.add_argument("--html", type=Path, metavar="PATH", help="where the page goes; default FOLDER/report.html")
    made.add_argument(
        "--by", metavar="WHAT", help="rank by another metric, as valid/chrf, or by a function of your own, as "
        "scores.py:number, of completion, reference and prompt; higher is better",
    )  # fmt: skip
    made.add_argument("--no-html", action="store_true", help="write no page")
    made.add_argument("--format", metavar="{md,csv,json}", help="print data only, and no page without --html")
    made.add_argument("--json", action="store_const", const="json", dest="format", help="short for --format json")
    return made


def main() -> int:
    """Run the command line; return the exit code."""
    try:
        args = parser().parse_args()
    except SystemExit as left:
        return int(left.code or 0)
    return verb.ended(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    page = "; the page is written with --html PATH, and without --format" if args.format == "html" else ""
    if args.format not in (None, *FORMATS):
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}, got {args.format!r}{page}")
    args.folder = runs.shown(args.folder)
    if args.format is None:
        show(args.folder, args.html, not args.no_html, args.by)
        return 0
    sys.stdout.write(export(args.folder, args.format, args.by))
    if args.html is not None and not args.no_html:
        write_page(args.folder, gather(args.folder, args.by), args.html)
    return 0


if __name__ == "__main__":
    sys.exit(main())
