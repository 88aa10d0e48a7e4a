"""`python -m ftexp.power effect=0.01 ...`: held-out rows and seeds that a sweep needs, before anything is spent."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftexp import runs, verb
from ftexp.errors import ConfigError, MachineError

if TYPE_CHECKING:
    from ftexp.stats.noise import Plan, Spread

USAGE = """usage: python -m ftexp.power effect=0.01 sd_rows=0.1 [key=value ...] [--json]
       python -m ftexp.power effect=0.01 --from outputs/sweeps/NAME [key=value ...] [--json]

How many held-out rows and seeds tell a difference of `effect` in a sweep, all pairs of its points compared?

  effect       true difference to be found, in units of the score
  sd_rows      standard deviation over rows of the paired difference of two points
  sd           instead of sd_rows: standard deviation over the rows of one trial,
  correlation  and correlation between the rows of two trials; hard rows are hard for both
  sd_seed      standard deviation between runs that differ in the seed alone (0)
  trials       points in the sweep (2)
  alpha        chance of any false difference in the sweep (0.05)
  power        chance to find the effect (0.8)
  seeds        runs of each point, several by commas (1,2,3,5)
  rows         held-out rows there are: tells their power, and the smallest effect they find
  groups       instead of rows, with --from a sweep whose rows are in groups: the groups there are
  --from       a sweep to estimate sd_rows, sd_seed and trials from; a key given wins
  --json       one JSON object on stdout
"""
KEYS = {  # key -> lowest, highest; both ends are allowed where they are finite and not 0
    "effect": (0.0, math.inf),
    "sd_rows": (0.0, math.inf),
    "sd": (0.0, math.inf),
    "sd_seed": (-1e-300, math.inf),
    "correlation": (-1.0, 1.0),
    "trials": (2, 10_000),
    "alpha": (1e-6, 0.5),
    "power": (0.05, 0.9999),
    "rows": (2, 10_000_000),
    "groups": (2, 10_000_000),
}
WHOLE = {"trials", "rows", "groups", "seeds"}


@dataclass(frozen=True)
class Question:
    """What is asked, checked."""

    effect: float | None
    spread: Spread
    trials: int
    alpha: float
    target: float
    seeds: tuple[int, ...]
    rows: int | None
    source: str
    """Where the noise is known from."""
    unit: str = "rows"
    """What `rows` counts: `rows`, or `groups` of rows of the sweep it is known from."""


@dataclass(frozen=True)
class Answer:
    """Rows and seeds needed."""

    plans: tuple[Plan, ...]
    """One for each number of seeds; empty without `effect`."""
    at: tuple[tuple[int, float | None, float, float], ...]
    """For the rows there are: seeds, power, smallest effect found, chance that equal points are told apart; empty
    without `rows`. The smallest is NaN for too few rows, and where equal points are told apart as often.

    Rows are groups of rows wherever the question's `unit` is."""


def parse(argv: list[str]) -> tuple[dict[str, float], tuple[int, ...], Path | None, bool]:
    """Read the command line.

    Raises:
        ConfigError: a key is unknown, given twice or out of range.
    """
    given: dict[str, float] = {}
    seeds: tuple[int, ...] = (1, 2, 3, 5)
    folder, as_json, left = None, False, list(argv)
    named: set[str] = set()
    while left:
        word = left.pop(0)
        if word == "--json":
            as_json = True
            continue
        if (name := word.partition("=")[0]) in named:
            raise ConfigError(f"{name} must be given once, got {word} too")
        named.add(name)
        if word == "--from" or word.startswith("--from="):
            text = word.partition("=")[2] or (left.pop(0) if left else "")
            if not text:
                raise ConfigError("--from must be followed by the folder of a sweep, got nothing")
            folder = runs.shown(text)
        elif "=" not in word or (key := word.split("=")[0]) not in (*KEYS, "seeds"):
            raise ConfigError(f"{word}: must be key=value with a key among {', '.join((*KEYS, 'seeds'))}")
        elif key == "seeds":
            seeds = tuple(int(_number(key, part, 1, 1000)) for part in word.partition("=")[2].split(","))
        else:
            given[key] = _number(key, word.partition("=")[2], *KEYS[key])
    return given, seeds, folder, as_json


def _number(key: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{key} must be a number, got {text!r}") from None
    if key in WHOLE and not value.is_integer():
        raise ConfigError(f"{key} must be a whole number, got {text}")
    if not (low <= value <= high if math.isfinite(high) else low < value < high):
        bounds = f"between {low:g} and {high:g}" if math.isfinite(high) else "above 0" if low == 0 else "at least 0"
        raise ConfigError(f"{key} must be {bounds}, got {text}")
    return value


def ask(given: dict[str, float], seeds: tuple[int, ...], folder: Path | None) -> Question:
    """Put the question together from the keys given and a sweep.

    Raises:
        ConfigError: a key is missing or at odds with another.
        MachineError: the folder holds no sweep whose rows can be compared.
    """
    from ftexp.stats import noise

    if not {"effect", "rows", "groups"} & given.keys():
        raise ConfigError("effect or rows must be given: what is to be found, or the rows there are")
    if "sd_rows" in given and ("sd" in given or "correlation" in given):
        raise ConfigError("sd_rows is given: sd and correlation have no part")
    if ("sd" in given) != ("correlation" in given):
        raise ConfigError("sd and correlation must be given together")
    spread, trials, source, grouped = noise.Spread(math.nan), 2, "the numbers given", False
    if folder is not None:
        spread, trials, source, grouped = measured(folder)
    if grouped and "rows" in given:
        raise ConfigError(
            f"rows={given['rows']:g}: the noise is that of groups of rows ({source}), each counts once; give the "
            "groups there are, as groups=12"
        )
    if "groups" in given and not grouped:
        raise ConfigError(_ungrouped(given["groups"], None if folder is None else source))
    there = given.get("groups" if grouped else "rows")
    if "sd_rows" in given:
        spread = noise.Spread(given["sd_rows"], spread.seed, spread.mixed)
    if "sd" in given:
        spread = noise.Spread(noise.paired_sd(given["sd"], given["correlation"]), spread.seed, spread.mixed)
    if "sd_seed" in given:
        spread = noise.Spread(spread.rows, given["sd_seed"], spread.mixed)
    if math.isnan(spread.rows):
        raise ConfigError("sd_rows, or sd and correlation, or --from a sweep must be given")
    return Question(
        given.get("effect"), spread, int(given.get("trials", trials)), given.get("alpha", noise.ALPHA),
        given.get("power", noise.POWER), seeds, None if there is None else int(there), source,
        "groups" if grouped else "rows",
    )  # fmt: skip


def _ungrouped(groups: float, source: str | None) -> str:
    """Say what to give instead of `groups`, where the noise is of numbers or of a sweep whose rows stand alone."""
    if source is None:
        return (
            f"groups={groups:g} needs --from SWEEP, whose rows are in groups; without a sweep give rows={groups:g}, "
            "and as sd_rows the standard deviation over the groups"
        )
    return f"groups={groups:g}: the noise is that of single rows ({source}), which are in no groups; give rows"


def measured(folder: Path) -> tuple[Spread, int, str, bool]:
    """Estimate the noise from a sweep: its spread, its points, a line that says so, and whether rows are in groups.

    Raises:
        MachineError: the folder holds no sweep, or nothing in it can be compared.
    """
    from ftexp import compare, report, sealed
    from ftexp.stats import noise, pairs

    board = report.read(folder)
    verdict = compare.read(folder, board.trials, board.objective)
    if verdict.comparison is None or len(verdict.points) < 2:
        raise MachineError(f"{folder}: must hold two points to compare; {verdict.untested or 'it has one'}")
    if verdict.units < 2:
        raise MachineError(f"{folder}: must have two held-out rows, or groups of rows, to measure noise; it has one")
    runs = len(verdict.points[0].trials)
    unit = "valid/loss" if board.objective == "valid/perplexity" else board.objective
    rows = sealed.counted(verdict.rows, verdict.groups)
    source = f"{unit} of {len(verdict.points)} points, {runs} run{'s' * (runs > 1)} each, {rows}"
    found = verdict.comparison.spread
    parts = (0.0 if part <= pairs.NOTHING else part for part in (found.rows, found.seed, found.mixed))
    return noise.Spread(*parts), len(verdict.points), source, verdict.groups is not None


def answer(question: Question) -> Answer:
    """Work out rows for each number of seeds, and what the rows there are can do."""
    from ftexp.stats import noise

    q = question
    plans = () if q.effect is None else tuple(
        noise.needed(q.effect, q.spread, s, q.trials, q.alpha, q.target) for s in q.seeds
    )  # fmt: skip
    at = () if q.rows is None else tuple(
        (s, None if q.effect is None else noise.power(q.effect, q.rows, q.spread, s, q.trials, q.alpha),
         *_found(q, q.rows, s)) for s in q.seeds
    )  # fmt: skip
    return Answer(plans, at)


def _found(q: Question, rows: int, seeds: int) -> tuple[float, float]:
    """Return the smallest effect found, NaN where there is none, and the chance that equal points are told apart."""
    from ftexp.stats import noise

    false = noise.power(0.0, rows, q.spread, seeds, q.trials, q.alpha)
    smallest = noise.detectable(rows, q.spread, seeds, q.trials, q.alpha, q.target)
    return (math.nan if smallest == 0 and _often(q, false) else smallest), false


def _often(q: Question, false: float) -> bool:
    """Whether equal points are told apart more often than asked for."""
    return false > 1.05 * q.alpha


def lines(question: Question, found: Answer) -> list[str]:
    """Tell an answer in plain lines."""
    q = question
    mixed = f", run times row {q.spread.mixed:.3g}" if q.spread.mixed else ""
    over = "" if q.unit == "rows" else f" (over {q.unit})"
    told = [f"{q.trials} points, all pairs compared at {q.alpha:g}; noise from {q.source}: "
            f"sd_rows {q.spread.rows:.3g}{over}, sd_seed {q.spread.seed:.3g}{mixed}"]  # fmt: skip
    for plan in found.plans:
        runs = f"{plan.seeds} seed{'s' if plan.seeds > 1 else ''} a point"
        if plan.rows is None:
            told.append(
                f"{runs}: no number of {q.unit} finds {q.effect:g}; with endless {q.unit} the chance is "
                f"{plan.power:.2f}"
            )
        else:
            told.append(f"{runs}: {plan.rows} {q.unit} find {q.effect:g} with chance {plan.power:.2f}")
        if _often(q, plan.false):
            told[-1] += f"; equal points are told apart too, with chance {plan.false:.2f} a pair"
    for seeds, chance, smallest, false in found.at:
        runs = f"{q.rows} {q.unit}, {seeds} seed{'s' if seeds > 1 else ''} a point"
        finds = "" if chance is None else f": {q.effect:g} is found with chance {chance:.2f}"
        told.append(f"{runs}{finds}{':' if chance is None else ';'} {_least(q, smallest, false)}")
    if q.spread.seed == 0 and q.spread.mixed == 0:
        told.append("Training noise counts as 0: give sd_seed, or a sweep with sweep.replicates.")
    return told


def _least(q: Question, smallest: float, false: float) -> str:
    """Say what the rows there are find, and how often they find it where there is nothing."""
    apart = f"with chance {false:.2f} a pair"
    if math.isnan(smallest):
        few = f"too few {q.unit} to tell any difference"
        return f"equal points are told apart {apart}: no difference says anything" if _often(q, false) else few
    least = "any difference is found" if smallest == 0 else f"{smallest:.3g} is found with chance {q.target:g}"
    return f"{least}; equal points are told apart too, {apart}" if _often(q, false) else least


def main() -> int:
    """Run the command line; return the exit code."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    return verb.ended(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    given, seeds, folder, as_json = parse(argv)
    question = ask(given, seeds, folder)
    found = answer(question)
    if as_json:
        print(verb.as_json(asdict(question) | asdict(found), None))
    else:
        print("\n".join(lines(question, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
