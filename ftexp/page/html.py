"""A sweep as one HTML page that needs nothing beside itself: no network, no script, no second file.

Every function returns HTML text; what comes from data goes through `_e` and nowhere else.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ftexp import board as boards
from ftexp import compare, config, examples, sealed
from ftexp.board import Line, Point
from ftexp.config import Method
from ftexp.examples import Example
from ftexp.metrics import LOSS_UNITS, METRICS, SCORES, Direction
from ftexp.page import figures, style, svg
from ftexp.page.figures import Sweep
from ftexp.page.text import escape as _e
from ftexp.stats import pairs

MOST_ROWS = 200
"""Held-out rows on the page: those that broke first, then those that got better."""
MOST_TEXT = 4000
"""Characters of a text on the page."""
EXACT = ("trainable", "total", "steps", "flops")
"""Of a plan: what is counted, and must be met."""
OUTCOMES = {examples.WIN: "better", examples.LOSS: "worse", examples.SAME: "same"}


def page(sweep: Sweep) -> str:
    """Write the whole page; equal sweeps give equal pages."""
    costly = all(name.startswith("cost/") for name in sweep.board.objectives[1:])
    drawn = "Quality against cost" if costly else "Quality against cost and other objectives"
    made = [
        ("decision", "Decision", decision(sweep)), ("confirmation", "Confirmation", confirmation(sweep)),
        ("leaderboard", "Leaderboard", leaderboard(sweep)),
        ("intervals", "How sure", intervals(sweep)), ("curves", "Held-out curves", curves(sweep)),
        ("effects", "What each key did", effects(sweep)), ("cost", drawn, cost(sweep)),
        ("labels", "Labels", labels(sweep)), ("examples", "Examples", rows(sweep)),
        ("ended", "Trials that ended early", ended(sweep)), ("plan", "Plan against real", plan(sweep)),
        ("made", "How it was made", provenance(sweep)),
    ]  # fmt: skip
    there = [(key, title, body) for key, title, body in made if body]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in there)
    body = "".join(
        f'<section id="{k}" aria-labelledby="{k}-h"><h2 id="{k}-h">{t}</h2>{b}</section>' for k, t, b in there
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{style.POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{_e(sweep.name)}: ftexp report</title><style>{style.SHEET}</style></head><body>'
        f'<a class="skip" href="#decision">To the decision</a>{_header(sweep)}<nav aria-label="Sections">'
        f"<ul>{links}</ul></nav></header><main>{body}</main><script>{style.SCRIPT}</script></body></html>\n"
    )


def _header(sweep: Sweep) -> str:
    states = Counter(t["state"] for t in sweep.board.trials)
    told = ", ".join(f"{count} {state}" for state, count in states.items()) or "no trials yet"
    told += f", {sweep.board.absent} not begun" if sweep.board.absent else ""
    metric, count = METRICS[sweep.board.objective], len(sweep.board.trials) + sweep.board.absent
    plural = "" if count == 1 else "s"
    unit = metric.unit
    if sweep.board.objective == "valid/loss":
        usual = Method.classify if _rival(sweep) == "TF-IDF" else Method.sft
        kinds = {t.get("config", {}).get("trainer.kind", usual.value) for t in sweep.board.trials}
        unit = " or ".join(LOSS_UNITS[Method(kind)] for kind in sorted(kinds)) or unit
    way = "lower" if metric.direction is Direction.minimize else "higher"
    return (
        f"<header><h1>{_e(sweep.name)}</h1><p>{count} trial{plural}: {_e(told)}. Ranked by "
        f"{_e(sweep.board.ranking)} ({_e(unit)}; {way} is better).</p>"
    )


def decision(sweep: Sweep) -> str:
    """Write the card a reader decides by, and what the ranking is worth in plain sentences."""
    if isinstance(sweep.verdict.untested, compare.Unlike):
        told = [*filter(None, [sweep.board.line()]), *compare.lines(sweep.verdict)]
        return "".join(f'<p class="warn">{_e(line)}</p>' for line in told)
    if sweep.winner is None:
        return f"<p>{_e(sweep.verdict.nothing)}</p>"
    items = [
        ("Best point", _best(sweep, sweep.winner), ""),
        ("Cannot be told from it", _same(sweep), ""),
        ("Noise", _noise(sweep), ""),
        ("Sealed rows", _sealed(sweep), ""),
        ("Cost of the best point", _cost(sweep, sweep.winner), ""),
        ("Rows", _receipt(sweep), ""),
        ("Run the best point again", _again(sweep), ' class="wide"'),
    ]
    card = "".join(f"<div{kind}><dt>{title}</dt><dd>{body}</dd></div>" for title, body, kind in items if body)
    listed = [*filter(None, [sweep.board.line()]), *compare.lines(sweep.verdict)]
    lines = "".join(f"<li>{_e(line)}</li>" for line in listed)
    first = sweep.board.first or sweep.winner
    note = "" if first is sweep.winner else (
        f'<p class="warn">{_e(boards.label(first))} stands first on the leaderboard and is above a bound of '
        "sweep.at_most.</p>"
    )  # fmt: skip
    return f'<dl class="card">{card}</dl>{note}{f"<ul class=told>{lines}</ul>" if lines else ""}'


def _best(sweep: Sweep, winner: Point) -> str:
    name, verdict = sweep.board.objective, sweep.verdict
    score = None if verdict.best is None else verdict.points[verdict.best].score
    sure = f", 95&nbsp;% interval {_span(score.low, score.high)}" if score and math.isfinite(score.low) else ""
    metric = name.split("/")[1]
    kinds = ("base", "tfidf") if name.startswith("valid/") else ()
    rival = next((s for s in kinds if f"{s}/{metric}" in winner.scores), None)
    beside = "" if rival is None else f"<br>{rival} {_number(winner.scores[f'{rival}/{metric}'])}"
    trials = ("trials " if len(winner.trials) > 1 else "trial ") + winner.numbers
    told = f"{trials}: {_e(name)} {_number(winner.scores[name])}{sure}{beside}"
    return f"<strong>{_e(boards.label(winner))}</strong><br>{told}"


def _same(sweep: Sweep) -> str:
    verdict = sweep.verdict
    if len(verdict.points) < 2:
        return "There is no other point to compare with."
    if verdict.untested is not None:
        return f"Not tested: {_e(verdict.untested)}."
    others = [verdict.points[n] for n in verdict.same if n != verdict.best]
    if not others:
        rest = len(verdict.points) - 1
        compared = " that were compared" if verdict.behind else ""
        return f"Not the other point{compared}." if rest == 1 else f"None of the other {rest} points{compared}."
    listed = "".join(f"<li>{_e(p.label)} (p={_e(_p(p.p))})</li>" for p in others[:6])
    more = f"<li>and {len(others) - 6} more, below</li>" if len(others) > 6 else ""
    cheap = None if verdict.cheapest is None else verdict.points[verdict.cheapest]
    told = "" if cheap is None else (
        f"Cheapest of these {len(verdict.same)} by {_e((verdict.cost or '').removeprefix('cost/'))}: "
        f"<strong>{_e(cheap.label)}</strong>"
    )  # fmt: skip
    return f"<ul>{listed}{more}</ul>{told}"


def _noise(sweep: Sweep) -> str:
    verdict = sweep.verdict
    if verdict.comparison is None or len(verdict.points) < 2:
        return ""
    unit = " nats" if verdict.objective == "valid/perplexity" else ""
    seeds = verdict.comparison.seeds
    if seeds is None:
        floor = "Between seeds: not measured, one run a point (sweep.replicates=3)."
    elif seeds.sd <= pairs.NOTHING:
        floor = "Between seeds: no difference."
    else:
        floor = f"Between seeds: standard deviation {_number(seeds.sd)}{unit} ({_span(seeds.low, seeds.high)})."
    floor += f"<br>{_e(line)}" if (line := compare.noisier(verdict)) else ""
    rows = sealed.counted(verdict.rows, verdict.groups)
    if verdict.alike is not None:
        return f"{floor}<br>{verdict.alike[0].upper()}{verdict.alike[1:]}: {rows}"
    if not math.isfinite(verdict.detectable):
        few = "rows" if verdict.groups is None else "groups"
        return f"{floor}<br>Too few {few} to tell any difference: {rows}"
    return (
        f"{floor}<br>Smallest difference found in four of five cases, with {rows}: "
        f"<strong>{_number(verdict.detectable)}{unit}</strong>"
    )


def _sealed(sweep: Sweep) -> str:
    """Say in the card what the winner was worth on rows that no trial saw, or how to learn it."""
    trials = [t for t in sweep.board.trials if t.get("facts", {}).get("rows", {}).get("test")]
    if not sweep.openings:
        board = sweep.board
        unconfirmed = board.asked is not None and board.objective.removeprefix("valid/") not in SCORES
        if (
            unconfirmed or "seed" in sweep.axes or len(board.seeds) > 1
        ):  # by no score that is confirmed, or no point without its seed
            return "Not opened." if trials else ""
        by = "" if board.asked is None else f" --by {board.objective}"
        told = f"Not opened. <code>ftexp confirm {_e(sweep.name + by)}</code> scores the winner on them once."
        return told if trials else ""
    last = dict(sweep.openings[-1])
    if "result" not in last:
        return _e(sealed.line(last))
    winner, result = last["result"]["members"][0], last["result"]
    name = result["objective"].removeprefix("valid/")
    return (
        f"{_e(winner['label'])}: test/{_e(name)} <strong>{_e(sealed.ranged(winner['test'][name]))}</strong><br>"
        f"{sealed.counted(result['rows'], result.get('groups'))}, {sealed.fresh(winner)}, "
        f"opened {sealed.times(last)}"
    )


def confirmation(sweep: Sweep) -> str:
    """Write what `ftexp confirm` found: the winner again, on fresh seeds and on the sealed rows."""
    if not sweep.openings:
        return ""
    last = dict(sweep.openings[-1])
    told = "".join(f"<li>{_e(line)}</li>" for line in figures.confirmed(sweep))
    if "result" not in last:
        return f'<ul class="told">{told}</ul>'
    result = last["result"]
    name, unit = result["objective"].removeprefix("valid/"), result["unit"]
    heads = _heads("point", "in the sweep", "fresh seeds", f"sealed rows, test/{name}", f"optimism{unit}", "seeds")
    body = ""
    for member in result["members"]:
        diverged = f", {member['failed']} diverged" if member["failed"] else ""
        before = (sealed.number(member["valid"]), sealed.number(member["valid_again"]))
        after = (sealed.ranged(member["test"][name]), sealed.ranged(member["optimism"]))
        cells = (*before, *after, f"{len(member['seeds'])}{diverged}")
        body += _cells(f"{member['role']}: {member['label']}", *cells)
    every = "".join(
        _cells(f"test/{key}", *(sealed.ranged(m["test"][key]) for m in result["members"]))
        for key in result["members"][0]["test"]
    )
    table = f"<table><thead>{heads}</thead><tbody>{body}</tbody></table>"
    heads = _heads("score", *(member["role"] for member in result["members"]))
    others = f'<table class="slim"><thead>{heads}</thead><tbody>{every}</tbody></table>'
    return (
        f'{_scroll("Confirmation", table)}<ul class="told">{told}</ul><h3>Every score on the sealed rows</h3>'
        + _scroll("Scores on the sealed rows", others)
    )


def labels(sweep: Sweep) -> str:
    """Write what the winner knows of each label, on held-out rows and on sealed ones that were opened."""
    if not sweep.labels or sweep.winner is None:
        return ""
    trial = sweep.winner.trials[0]
    told = f"<p>Trial {trial['number']} ({_e(trial['label'])}) on the held-out rows. An empty cell is undefined.</p>"
    found = told + _scroll("Labels on held-out rows", _label_table(sweep.labels))
    if sweep.sealed_labels:
        found += "<h3>On the sealed rows</h3><p>The confirmed point; means over its fresh seeds.</p>"
        found += _scroll("Labels on sealed rows", _label_table(sweep.sealed_labels))
    return found


def _label_table(lines: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in lines[0] if key == "label" or any(line.get(key) is not None for line in lines)]
    titles = {"roc_auc": "ROC-AUC", "f1": "F1", "base_f1": "F1 of the base", "tfidf_f1": "F1 of TF-IDF"}
    heads = "".join(f'<th scope="col"{_num(key != "label")}>{_e(titles.get(key, key))}</th>' for key in keys)
    body = "".join(
        _cells(line["label"], *(_figure(key, line[key]) for key in keys if key != "label")) for line in lines
    )
    return f'<table class="sort small"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:g}" if key in ("true", "predicted") else f"{value:.3f}"


def plan(sweep: Sweep) -> str:
    """Set the plan of each trial beside what it took; what is counted exactly is listed only where it was missed."""
    known = [t for t in sweep.board.trials if "plan" in t]
    if not known:
        return ""
    missed = {t["number"]: [k for k in EXACT if t["plan"][k]["planned"] != t["plan"][k]["real"]] for t in known}
    right = sum(not keys for keys in missed.values())
    body = "".join(_planned(trial, missed[trial["number"]]) for trial in known)
    titles = ("trial", "overrides", "trainable", "total", "steps", "TFLOP", "GiB planned", "GiB real", "error")
    heads = "".join(f'<th scope="col"{_num(n > 1)}>{title}</th>' for n, title in enumerate(titles))
    table = f'<table class="sort"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    told = f"Parameters, steps and operations of {right} of {len(known)} trials are as planned"
    told += "." if right == len(known) else "; the others show planned &rarr; real."
    return (
        f"<p>{told} Memory is that of training: on a GPU all that is allocated, on a CPU what the process grew by over "
        "the loaded base, to which its allocator and scoring add.</p>" + _scroll("Plan against real", table)
    )


def _planned(trial: dict[str, Any], missed: list[str]) -> str:
    told = trial["plan"]
    counts = []
    for key in EXACT:
        ways = ("planned", "real") if key in missed else ("real",)
        shown = [f"{told[key][way] / 1e12:,.4g}" if key == "flops" else f"{told[key][way]:,}" for way in ways]
        counts.append(f'<td class="num{" warn" if key in missed else ""}">{" &rarr; ".join(shown)}</td>')
    memory = told["memory_gib"]
    error = "" if memory["error"] is None else f"{100 * memory['error']:+.0f} %"
    sizes = "".join(
        f'<td class="num">{cell}</td>' for cell in (*(f"{memory[w]:.3f}" for w in ("planned", "real")), error)
    )
    name = f'<td>{trial["number"]}</td><th scope="row">{_e(trial["label"])}</th>'
    return f"<tr>{name}{''.join(counts)}{sizes}</tr>"


def _cells(name: str, *cells: str) -> str:
    numbers = "".join(f'<td class="num">{_e(cell)}</td>' for cell in cells)
    return f'<tr><th scope="row">{_e(name)}</th>{numbers}</tr>'


def _cost(sweep: Sweep, winner: Point) -> str:
    scores, facts = winner.scores, winner.trials[0].get("facts", {})
    of = facts.get("parameters", {}).get("total")
    whole = f" of {boards.millions(of)}" if of else ""
    memory = scores.get("cost/gpu_memory_gib", scores["cost/memory_gib"])
    spent = math.fsum(t.get("scores", {}).get("cost/seconds", 0.0) for t in sweep.board.trials)
    kind = "GPU memory" if "cost/gpu_memory_gib" in scores else "memory of the process"
    return (
        f"{boards.millions(scores['cost/trainable'])} weights trained{whole}<br>{scores['cost/seconds']:.0f} s, "
        f"{memory:.1f} GiB {kind}<br>all complete trials together: {spent:.0f} s"
    )


def _receipt(sweep: Sweep) -> str:
    """Show that no row was lost: read is what was kept and what was dropped, by reason."""
    found = {}
    for trial in sweep.board.trials:
        counts = trial.get("facts", {}).get("rows")
        if counts:
            found.setdefault(counts.get("sha256"), counts)
    return "<br>".join(_counted(counts) for counts in found.values())


def _counted(counts: dict[str, Any]) -> str:
    dropped = counts.get("dropped", {})
    parts = {name: counts.get(name, 0) for name in ("train", "valid", "test")} | {"dropped": sum(dropped.values())}
    sums = sum(parts.values()) == counts["read"]
    told = " + ".join(f"{count} {name}" for name, count in parts.items())
    why = f" ({_e(', '.join(f'{count} {reason}' for reason, count in dropped.items()))})" if dropped else ""
    end = "Every row is accounted for." if sums else '<strong class="warn">This does not add up.</strong>'
    return f"{counts['read']} read {'=' if sums else '&ne;'} {told}{why}<br>{end}"


def _again(sweep: Sweep) -> str:
    return f"<pre>{_e(shlex.join(sweep.command))}</pre>" if sweep.command else ""


def leaderboard(sweep: Sweep) -> str:
    """Write the table that `ftexp report` prints."""
    titles = boards.titles(sweep.board)
    heads = "".join(f'<th scope="col"{_num(n > 1)}>{_e(title)}</th>' for n, title in enumerate(titles))
    body = "".join(map(_line, boards.lines(sweep.board)))
    table = f'<table class="sort"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return _scroll("Leaderboard", table)


def _line(line: Line) -> str:
    lead = " lead" if line.ends else ""
    cells = [f'<td>{_e(line.cells[0])}</td><th scope="row">{_e(line.cells[1])}</th>']
    cells += [f"<td{_num(True)}>{_e(cell)}</td>" for cell in line.cells[2:]]
    return f'<tr class="{line.kind}{lead}">{"".join(cells)}</tr>'


def intervals(sweep: Sweep) -> str:
    """Write each compared point's score with its interval, best first."""
    verdict = sweep.verdict
    if verdict.comparison is None or len(verdict.points) < 2:
        return ""
    sign = 1 if METRICS[verdict.objective].direction is Direction.minimize else -1
    order = sorted(range(len(verdict.points)), key=lambda n: sign * verdict.points[n].score.value)
    ends = [v for p in verdict.points for v in (p.score.low, p.score.high, p.score.value)]
    axis = svg.scale(ends, 0, svg.STRIP, pad=0.02)
    body = ""
    for n in order:
        point = verdict.points[n]
        look = "best" if n == verdict.best else "same" if n in verdict.same else "plain"
        said = "best" if n == verdict.best else _p(point.p)
        score = point.score
        strip = svg.strip(score.value, score.low, score.high, axis, look)
        body += _measured(look, point.label, _number(score.value), _span(score.low, score.high), said, strip)
    heads = _heads("point", verdict.objective, "95 % interval", "p against the best", "")
    note = "Filled marks cannot be told from the best. " if len(verdict.same) > 1 else ""
    return (
        f"<p>{note}Intervals are of each point alone; two may overlap although a paired test tells them apart. p is "
        "the largest error rate at which a point is not told from the best, corrected for all pairs.</p>"
        + _scroll("Intervals", f"<table><thead>{heads}</thead><tbody>{body}</tbody></table>")
    )


def curves(sweep: Sweep) -> str:
    """Draw the held-out losses, with a key."""
    drawn = figures.curves(sweep)
    if drawn is None:
        return ""
    looks, shown = figures.look(sweep), [t for t in sweep.board.trials if sweep.curves.get(t["number"])]
    if len(shown) <= figures.FEW + 1:
        entries = [(looks[t["number"]], f"{t['number']}: {t['label']}, {t['state']}") for t in shown]
    else:
        found = Counter(looks[t["number"]] for t in shown)
        said = {"best": "best point", "plain": "other trials", "pruned": "pruned, a cross at the last step",
                "failed": "failed, a square at the last step"}  # fmt: skip
        entries = [(look, f"{text} ({found[look]})") for look, text in said.items() if found[look]]
    key = "".join(f"<li>{_sample(look)}{_e(text)}</li>" for look, text in entries)
    return f'<div class="pair"><figure>{drawn}</figure><ul class="key" aria-label="Key">{key}</ul></div>'


def _sample(look: str) -> str:
    sign = {"pruned": '<path class="sign pruned" d="M24 2l8 8m0-8l-8 8"/>',
            "failed": '<rect class="sign failed" x="24" y="3" width="7" height="7"/>'}.get(look, "")  # fmt: skip
    line = f'<g class="run {look}"><path class="line" d="M0 6H28"/>{sign}</g>'
    return f'<svg class="plot" viewBox="0 0 34 12" aria-hidden="true">{line}</svg>'


def effects(sweep: Sweep) -> str:
    """Write what each searched key did to the objective, and its share in what sets the best points apart."""
    if why := figures.unlike(sweep):
        return f"<p>No mean over values of a key is drawn: {_e(why)}.</p>"
    found = figures.effects(sweep)
    if not found:
        return ""
    ends = [v for bins in found.values() for b in bins for v in (*b.ends, b.mean)]
    axis = svg.scale(ends, 0, svg.STRIP, pad=0.02)
    rate = sweep.verdict.rate
    told = importance(sweep) + ("" if rate is None else f"<p>{_e(compare.rate_line(rate))}</p>")
    told += "".join(effect(sweep, key, bins, axis) for key, bins in found.items())
    left = len(sweep.board.points) - len(sweep.complete)
    without = f" {left} points that are not complete, or were drawn again, are left out." if left else ""
    if any(b.low == figures.NOT for bins in found.values() for b in bins):
        without += f" Points {figures.NOT} did not meet the key's condition and had its value of the config."
    return (
        f"<p>Mean {_e(sweep.board.objective)} over the {len(sweep.complete)} complete points with each value, whatever "
        f"the other keys were; the interval therefore holds the effect of the others too.{without}</p>{told}"
    )


def effect(sweep: Sweep, key: str, bins: Sequence[Any], axis: svg.Scale | None = None) -> str:
    """Write the table of one key, and a drawing where it has many values."""
    axis = axis or svg.scale([v for b in bins for v in (*b.ends, b.mean)], 0, svg.STRIP, pad=0.02)
    body = ""
    for b in bins:
        name = _value(b.low) if b.low == b.high else f"{_value(b.low)} to {_value(b.high)}"
        sure = _span(*b.ends) if math.isfinite(b.ends[0]) else "one point"
        low, high = b.ends
        body += _measured("plain", name, str(b.trials), _number(b.mean), sure, svg.strip(b.mean, low, high, axis))
    heads = _heads("value", "points", "mean", "95 % interval", "")
    table = _scroll(key, f'<table class="small"><thead>{heads}</thead><tbody>{body}</tbody></table>')
    drawn = figures.spread(sweep, key)
    return f"<h3>{_e(key)}</h3>{table}{f'<figure>{drawn}</figure>' if drawn else ''}"


def importance(sweep: Sweep) -> str:
    """Write the share of each key; nothing where there are too few points to say."""
    found = sweep.verdict.importance
    if not found:
        return ""
    axis, body = svg.Scale(0, 1, 0, svg.STRIP), ""
    for key, share in found.items():
        sure = f"{_percent(share.low)} to {_percent(share.high)}"
        strip = svg.strip(share.value, share.low, share.high, axis, bar=True)
        body += _measured("plain", key, _percent(share.value), sure, strip)
    heads = _heads("key", "share", "95 % interval", "")
    return (
        "<h3>Importance</h3><p>Share of each key in what sets the best quarter apart (PED-ANOVA). Believe an order "
        "only where intervals part.</p>"
        + _scroll("Importance", f'<table class="small"><thead>{heads}</thead><tbody>{body}</tbody></table>')
    )


def cost(sweep: Sweep) -> str:
    """Draw the objective against costs and further objectives of the sweep, and name the points on each front."""
    found = []
    for name, what in figures.against(sweep).items():
        drawn = figures.pareto(sweep, name)
        if drawn is not None:
            on = figures.front(sweep, name)
            listed = "; ".join(f"{p.numbers} {boards.label(p)}" for p in on[:8])
            more = f" and {len(on) - 8} more" if len(on) > 8 else ""
            cheap, good = f"both cheaper in {what} and better", f"better in both {sweep.board.objective} and {what}"
            both = cheap if name.startswith("cost/") else good
            told = f"On the front, no other is {both}: {listed}{more}." if on else "No point is on the front."
            found.append(f"<figure>{drawn}<figcaption>{_e(told)}</figcaption></figure>")
    over = "" if all(p.within for p in sweep.complete) else " Points above a bound of sweep.at_most are on none."
    note = f"<p>The filled square is the best point, rings are on the front.{over}</p>"
    return f'{note}<div class="pair">{"".join(found)}</div>' if found else ""


def rows(sweep: Sweep) -> str:
    """Write held-out rows with both outputs; plain radio buttons choose which are shown."""
    if not sweep.rows or sweep.winner is None:
        return ""
    told, shown = examples.count(sweep.rows), examples.chosen(sweep.rows, MOST_ROWS)
    trial = sweep.winner.trials[0]
    cut = (
        f" Shown are {len(shown)}: first what got worse, then what got better." if len(shown) < len(sweep.rows) else ""
    )
    here = examples.count(shown)
    choices = [("all", "all", len(shown)), *((o, OUTCOMES[o], here[o]) for o in OUTCOMES)]
    radios = "".join(
        f'<span><input type="radio" name="show" id="show-{key}"{" checked" if key == "all" else ""}> '
        f'<label for="show-{key}">{said} ({count})</label></span>'
        for key, said, count in choices
    )
    return (
        f"<p>Trial {trial['number']} ({_e(trial['label'])}) against {_rival(sweep)}, {len(sweep.rows)} rows: "
        f"{told['win']} better, {told['loss']} worse, {told['same']} the same, judged by "
        f"{_e(examples.rule(sweep.rows))}.{cut}</p>"
        f'<fieldset class="show"><legend>Show rows that are</legend>{radios}</fieldset>'
        f'<p class="printed">In print: the first 12.</p><ol class="rows">{"".join(_row(e, sweep) for e in shown)}</ol>'
    )


def _rival(sweep: Sweep) -> str:
    return "TF-IDF" if sweep.winner and "tfidf/loss" in sweep.winner.scores else "the base model"


def _row(row: Example, sweep: Sweep) -> str:
    scores = [m for m in (*row.measures, row.nats) if m is not row.nats or row.nats not in row.measures] + [row.nats]
    told = "; ".join(f"{m.name} {_score(m.before)} &rarr; {_score(m.after)}" for m in dict.fromkeys(scores))
    texts = [("wanted", row.reference)]
    if row.before is not None and row.after is not None:
        texts += [(_rival(sweep).removeprefix("the "), row.before), ("tuned", row.after)]
    shown = "".join(f'<div><dt>{title}</dt><dd dir="auto">{_text(text)}</dd></div>' for title, text in texts)
    return (
        f'<li class="{row.outcome}"><p class="head"><span class="what">{OUTCOMES[row.outcome]}</span>'
        f'<span>{_e(row.where)}</span><span>{told}</span></p><p class="asked" dir="auto">{_text(row.prompt)}</p>'
        f'<dl class="texts">{shown}</dl></li>'
    )


def _text(text: str) -> str:
    if not text.strip():
        return '<span class="soft">(nothing)</span>'
    cut = f' <span class="soft">({len(text) - MOST_TEXT} more characters)</span>' if len(text) > MOST_TEXT else ""
    return _e(text[:MOST_TEXT]) + cut


def ended(sweep: Sweep) -> str:
    """List trials that are not complete with their reasons, failures first, and those that ran out of memory."""
    order = {"failed": 0, "preempted": 1, "running": 2, "skipped": 3, "pruned": 4}
    off = [t for t in sweep.board.trials if t["state"] != "complete" or "out_of_memory" in t]
    body = ""
    for trial in sorted(off, key=lambda t: (order.get(t["state"], 5), t["number"])):
        short = "; ".join(
            f"out of memory with trainer.batch={o['batch']}: went on with half or less, same effective batch"
            for o in trial.get("out_of_memory", [])
        )
        why = "; ".join(part for part in (trial.get("error", ""), short) if part)
        body += (
            f'<tr><td>{trial["number"]}</td><th scope="row">{_e(trial["label"])}</th><td>{_e(trial["state"])}</td>'
            f"<td>{_e(why)}</td></tr>"
        )
    if not body:
        return ""
    heads = "".join(f'<th scope="col">{title}</th>' for title in ("trial", "overrides", "state", "reason"))
    table = f'<table class="sort"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return _scroll("Trials that ended early", table)


def provenance(sweep: Sweep) -> str:
    """Write what the best point's result depends on beside its config, and in what other trials differ."""
    known = [t for t in sweep.board.trials if "facts" in t]
    if not known:
        return ""
    first = next((t for t in (sweep.winner.trials if sweep.winner else []) if "facts" in t), known[0])
    told = _facts(first)
    differ = sorted({k for t in known for k in told.keys() | _facts(t).keys() if _facts(t).get(k) != told.get(k)})
    warn = f'<p class="warn">Trials differ in {_e(", ".join(differ))}.</p>' if differ else ""
    body = "".join(f'<tr><th scope="row">{_e(k)}</th><td>{_e(v)}</td></tr>' for k, v in told.items())
    heads = '<tr><th scope="col">fact</th><th scope="col">value</th></tr>'
    table = _scroll("Facts", f"<table><thead>{heads}</thead><tbody>{body}</tbody></table>")
    return f"{warn}<p>Facts of trial {first['number']}; trial.json in its folder holds its whole config.</p>{table}"


def _facts(trial: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in trial["facts"].items() if k != "parameters"}
    kept["rows"] = {"sha256": kept.get("rows", {}).get("sha256", "")}
    return {key: value for key, value in config.flat(kept).items() if value != {}}


def _measured(look: str, name: str, *cells: str) -> str:
    """Write a row of a table of intervals: its name, numbers, and at last its strip."""
    numbers = "".join(f'<td class="num">{_e(cell)}</td>' for cell in cells[:-1])
    return f'<tr class="{look}"><th scope="row">{_e(name)}</th>{numbers}<td>{cells[-1]}</td></tr>'


def _scroll(name: str, table: str) -> str:
    """Let a table scroll by itself, also by keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{_e(name)}">{table}</div>'


def _heads(*titles: str) -> str:
    cells = [
        f'<th scope="col"{_num(n > 0 and bool(t))}>{_e(t)}</th>' if t else "<td></td>" for n, t in enumerate(titles)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _num(number: bool) -> str:
    return ' class="num"' if number else ""


def _number(value: float) -> str:
    return f"{value:.4f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.2g}"


def _span(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}" if math.isfinite(low) and math.isfinite(high) else ""


def _p(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}" if value >= 0.001 else "<0.001"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _score(value: float) -> str:
    return f"{value:.3g}"


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
