"""Drawings as SVG text: lines, dots and strips, with axes of round numbers. Whatever comes from data is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ftexp.page import style
from ftexp.page.text import escape

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 30, 26, 46
STRIP = 240
"""Width of a strip in a table's cell."""
MOST_NAME = 32
"""Characters of a name beside a mark."""
DENSE = 24
"""Lines above which each is drawn thin and pale."""
MOST_STEPS = 120
"""Points a line is drawn with."""


class Svg(str):
    """A drawing; a notebook shows it as a picture that stands alone."""

    def _repr_svg_(self) -> str:
        rules = f"<style>{style.LIGHT}{style.PLOT}</style>"
        start = self.index(">") + 1
        return f'{self[:start]}{rules}<rect width="100%" height="100%" class="paper"/>{self[start:]}'


@dataclass(frozen=True)
class Series:
    """One line."""

    name: str
    """What a pointer on it tells."""
    points: Sequence[tuple[float, float]]
    """(x, y), by x."""
    look: str = "plain"
    """Class of the line: `best`, `plain`, `pruned`, `failed` or `s0` to `s7`."""
    tag: str = ""
    """Short text at its end; none where empty."""
    mark: str = ""
    """Sign at its end: `cross`, `square`, or none."""


@dataclass(frozen=True)
class Dot:
    """One mark of a scatter."""

    name: str
    """What a pointer on it tells."""
    x: float
    y: float
    look: str = "plain"
    """Class of the mark: `best`, `front`, `base` or `plain`."""
    tag: str = ""
    """Short text beside it."""


@dataclass(frozen=True)
class Scale:
    """Numbers to places along an axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the place of a number."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def scale(values: Iterable[float], start: float, end: float, log: bool | None = None, pad: float = 0.05) -> Scale:
    """Fit an axis to finite numbers; logarithmic where they are above 0 and span more than a factor of 8.

    >>> scale([1, 100], 0, 10, pad=0).at(10)
    5.0
    """
    known = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(known), max(known)
    log = low > 1e-12 and high / low > 8 if log is None else log and low > 1e-12
    if log:
        room = (high / low) ** pad if high > low else 1.2
        return Scale(low / room, high * room, start, end, True)
    room = pad * (high - low) if high > low else abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start, end)


def ticks(axis: Scale, most: int = 5) -> list[float]:
    """Choose round numbers within an axis: 1, 2 or 5 times a power of ten.

    >>> ticks(Scale(0.0, 0.9, 0, 1)), ticks(Scale(0.05, 3, 0, 1, True))
    ([0.0, 0.2, 0.4, 0.6, 0.8], [0.05, 0.1, 0.2, 0.5, 1.0, 2.0])
    """
    if axis.log:
        tens = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [float(f"{m}e{t}") for t in tens for m in steps if axis.low <= float(f"{m}e{t}") <= axis.high]
            if len(found) <= most + 1:
                break
        if len(found) > 1:
            return found[:: math.ceil(len(found) / most)] if len(found) > most + 1 else found
    raw = (axis.high - axis.low) / most
    power = 10 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(axis.low / step - 1e-9)
    count = math.floor(axis.high / step + 1e-9) - first + 1
    return [round((first + n) * step, 12) for n in range(count)]


def apart(values: Sequence[float]) -> list[str]:
    """Write the numbers of an axis in three digits, or in as many as it takes to tell them apart.

    >>> apart([0.3050, 0.3052]), apart([1.0, 2.0])
    (['0.305', '0.3052'], ['1', '2'])
    """
    told = [[short(v, digits) for v in values] for digits in range(3, 13)]
    return next((names for names in told if len(set(names)) == len(set(values))), told[-1])


def short(value: float, digits: int = 3) -> str:
    """Write a number for an axis.

    >>> [short(v) for v in (0, 0.0002, 0.25, 12, 2500, 4884480, 1.2e34)]
    ['0', '2e-4', '0.25', '12', '2.5 k', '4.88 M', '1.2e34']
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:.{digits}g}{unit}"
    if 0.001 <= abs(value) < 1e12:
        return f"{value:.{digits}g}"
    leading, power = f"{value:.{digits - 1}e}".split("e")
    return f"{float(leading):.{digits}g}e{int(power)}"


def lines(series: Sequence[Series], x: str, y: str, title: str, level: tuple[str, float] | None = None) -> Svg:
    """Draw curves over a shared x, the last on top.

    Args:
        series: what to draw; points that are not finite are left out.
        x: what runs to the right.
        y: what runs upwards.
        title: what a screen reader says.
        level: name and height of a line to compare with.
    """
    kept = [(s, _thinned([p for p in s.points if math.isfinite(p[1])])) for s in series]
    heights = [v for _, points in kept for _, v in points] + ([level[1]] if level else [])
    across = scale((v for _, points in kept for v, _ in points), LEFT, WIDTH - RIGHT, log=False, pad=0.02)
    up = scale(heights, HEIGHT - BOTTOM, TOP)
    drawn = [_axes(across, up, x, y)]
    if level and math.isfinite(level[1]):
        at = up.at(level[1])
        drawn.append(f'<path class="line level" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        drawn.append(_text(WIDTH - RIGHT, at - 5, level[0], "end soft"))
    drawn += [_curve(s, points, across, up) for s, points in kept if points]
    tagged = [(up.at(points[-1][1]), across.at(points[-1][0]), s) for s, points in kept if points and s.tag]
    drawn += [_text(left + 7, at, s.tag, f"tag {s.look}") for at, left, s in _apart(tagged)]
    return _framed("".join(drawn), title, " dense" if len(kept) > DENSE else "")


def dots(marks: Sequence[Dot], x: str, y: str, title: str, front: Sequence[tuple[float, float]] = ()) -> Svg:
    """Draw a scatter, with the steps of a front where there is one, from its best along x; the last mark on top."""
    kept = [m for m in marks if math.isfinite(m.x) and math.isfinite(m.y)]
    across = scale((m.x for m in kept), LEFT, WIDTH - RIGHT, pad=0.08)
    up = scale((m.y for m in kept), HEIGHT - BOTTOM, TOP, pad=0.08)
    drawn = [_axes(across, up, x, y)]
    if len(front) > 1:
        places = [(across.at(a), up.at(b)) for a, b in front]
        steps = "".join(f"H{a}V{b}" for a, b in places[1:])
        drawn.append(f'<path class="line front" d="M{places[0][0]} {places[0][1]}{steps}"/>')
    for m in kept:
        a, b = across.at(m.x), up.at(m.y)
        sign = f'<rect class="dot {m.look}" x="{a - 5}" y="{b - 5}" width="10" height="10">' if m.look == "best" else \
            f'<circle class="dot {m.look}" cx="{a}" cy="{b}" r="{5 if m.look == "front" else 4}">'  # fmt: skip
        drawn.append(f"{sign}<title>{escape(m.name)}</title></{'rect' if m.look == 'best' else 'circle'}>")
    placed: list[tuple[float, float]] = []
    for m in reversed([m for m in kept if m.tag]):
        a, b, far = across.at(m.x), up.at(m.y), across.at(m.x) > WIDTH * 0.75
        if all(abs(a - other) > 26 or abs(b - beside) > 13 for other, beside in placed):  # else one covers the other
            placed.append((a, b))
            drawn.append(_text(a - 9 if far else a + 9, b - 7, m.tag, f"tag{' end' if far else ''}"))
    return _framed("".join(drawn), title)


def ladder(rows: Sequence[tuple[str, float, float, float, str]], x: str, title: str) -> Svg:
    """Draw values with their intervals below one another.

    Args:
        rows: name, value, lower and upper end (NaN where there is none), and class of the mark.
        x: what runs to the right.
        title: what a screen reader says.
    """
    left, step = 232, 24
    bottom = TOP + step * len(rows)
    across = scale([v for row in rows for v in row[1:4]], left, WIDTH - RIGHT, log=False)
    drawn = [_text(WIDTH - RIGHT, bottom + 36, x, "end title")]
    for value in ticks(across):
        at = across.at(value)
        drawn.append(f'<path class="grid" d="M{at} {TOP}V{bottom}"/>{_text(at, bottom + 18, short(value), "mid")}')
    for n, (name, value, low, high, look) in enumerate(rows):
        at = TOP + step * (n + 0.5)
        told = name if len(name) <= MOST_NAME else f"{name[: MOST_NAME - 1]}\u2026"
        drawn.append(_text(left - 10, at + 4, told, "end"))
        if math.isfinite(low) and math.isfinite(high):
            drawn.append(f'<path class="span {look}" d="M{across.at(low)} {at}H{across.at(high)}"/>')
        mark = f'<circle class="dot {look}" cx="{across.at(value)}" cy="{at}" r="5">'
        drawn.append(f"{mark}<title>{escape(name)}: {value:.4g}</title></circle>")
    return _framed("".join(drawn), title, height=bottom + BOTTOM)


def strip(value: float, low: float, high: float, axis: Scale, look: str = "plain", bar: bool = False) -> str:
    """Draw a value and its interval for a cell of a table, which holds the numbers as text.

    Args:
        value: the dot, or the end of the bar.
        low: lower end of the interval; NaN where there is none.
        high: upper end.
        axis: shared by the rows of the table.
        look: class of the dot.
        bar: fill from the left end.
    """
    parts = [f'<path class="rail" d="M0 10H{STRIP}"/>']
    if bar:
        parts.append(f'<rect class="bar {look}" x="0" y="4" width="{max(1.0, axis.at(value))}" height="12"/>')
    if math.isfinite(low) and math.isfinite(high):
        a, b = (min(max(axis.at(v), 0.0), STRIP) for v in (low, high))
        parts.append(f'<path class="span {look}" d="M{a} 10H{b}M{a} 5V15M{b} 5V15"/>')
    if not bar and math.isfinite(value):
        parts.append(f'<circle class="dot {look}" cx="{axis.at(value)}" cy="10" r="4.5"/>')
    return (
        f'<svg class="plot strip" viewBox="-6 0 {STRIP + 12} 20" width="{STRIP}" height="20" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )


def _framed(inner: str, title: str, look: str = "", height: int = HEIGHT) -> Svg:
    return Svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot{look}" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{inner}</svg>'
    )


def _text(x: float, y: float, text: str, look: str = "") -> str:
    return f'<text class="{look}" x="{round(x, 1)}" y="{round(y, 1)}">{escape(text)}</text>'


def _axes(across: Scale, up: Scale, x: str, y: str) -> str:
    drawn = []
    rungs, marks = ticks(up), ticks(across)
    for value, name in zip(rungs, apart(rungs), strict=True):
        at = up.at(value)
        drawn.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>{_text(LEFT - 8, at + 4, name, "end")}')
    for value, name in zip(marks, apart(marks), strict=True):
        at = across.at(value)
        drawn.append(f'<path class="tick" d="M{at} {HEIGHT - BOTTOM}v5"/>')
        drawn.append(_text(at, HEIGHT - BOTTOM + 19, name, "mid"))
    drawn.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    drawn.append(_text(4, 14, y, "title"))
    drawn.append(_text(WIDTH - RIGHT, HEIGHT - 6, x, "end title"))
    return "".join(drawn)


def _curve(series: Series, points: list[tuple[float, float]], across: Scale, up: Scale) -> str:
    places = [(across.at(a), up.at(b)) for a, b in points]
    path = "M" + "L".join(f"{a} {b}" for a, b in places)
    a, b = places[-1]
    signs = {
        "cross": f'<path class="sign {series.look}" d="M{a - 4} {b - 4}l8 8m0-8l-8 8"/>',
        "square": f'<rect class="sign {series.look}" x="{a - 3.5}" y="{b - 3.5}" width="7" height="7"/>',
    }
    alone = f'<circle class="dot {series.look}" cx="{a}" cy="{b}" r="3"/>' if len(places) == 1 else ""
    name = f"<title>{escape(series.name)}</title>"
    return f'<g class="run {series.look}">{name}<path class="line" d="{path}"/>{alone}{signs.get(series.mark, "")}</g>'


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep at most `MOST_STEPS` points, the first and the last among them."""
    if len(points) <= MOST_STEPS:
        return points
    last = len(points) - 1
    return [points[round(n * last / (MOST_STEPS - 1))] for n in range(MOST_STEPS)]


def _apart(tags: list[tuple[float, float, Series]], gap: float = 15) -> list[tuple[float, float, Series]]:
    """Move texts down that would stand on one another."""
    placed: list[tuple[float, float, Series]] = []
    for at, left, series in sorted(tags, key=lambda t: t[0]):
        floor = placed[-1][0] + gap if placed else -math.inf
        placed.append((max(at + 4, floor), left, series))
    over = max(0.0, placed[-1][0] - (HEIGHT - BOTTOM)) if placed else 0.0
    return [(at - over, left, series) for at, left, series in placed]
