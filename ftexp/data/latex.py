r"""English descriptions of formulas and the same in LaTeX, from a grammar of ours.

A formula is built as a tree and written out twice, so one right answer exists for each description: arguments of
functions and fractions are single terms, never sums, and a description has no second reading within the grammar.

| frame      | English                                                  | LaTeX                                   |
|------------|----------------------------------------------------------|-----------------------------------------|
| integral   | the integral from 0 to two of x squared with respect ... | \int_{0}^{2} x^{2} \, dx                |
| sum        | the sum from k equals 1 to n of k cubed                  | \sum_{k=1}^{n} k^{3}                    |
| limit      | the limit as t approaches infinity of 3 over t           | \lim_{t \to \infty} \frac{3}{t}         |
| derivative | the derivative of the sine of y with respect to y        | \frac{d}{dy} \sin\left(y\right)         |
| function   | g of x equals five x minus the square root of x          | g(x) = 5 x - \sqrt{x}                   |
| equation   | x squared plus 4 x equals 7                              | x^{2} + 4 x = 7                         |
| inequality | 2 t is less than or equal to the cosine of t             | 2 t \leq \cos\left(t\right)             |
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

Node = tuple[Any, ...]
"""`("var", name)`, `("num", digits)`, `("pow", base, exponent)`, `("mul", number, factor)`, `(function, argument)`,
`("over", top, bottom)`, `("plus", one, other)` or `("minus", one, other)`."""

FUNCTIONS = {"sin": "the sine of", "cos": "the cosine of", "tan": "the tangent of", "ln": "the natural logarithm of",
             "exp": "the exponential of", "sqrt": "the square root of"}  # fmt: skip
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
POWERS = {"2": "squared", "3": "cubed"}
RELATIONS = [("is less than", "<"), ("is greater than", ">"), ("is less than or equal to", r"\leq"),
             ("is greater than or equal to", r"\geq"), ("is not equal to", r"\neq")]  # fmt: skip

LIMITS = [("infinity", r"\infty"), ("minus infinity", r"-\infty"), ("a", "a"), ("zero", "0"), ("1", "1")]


def simple(r: random.Random, v: str) -> Node:
    """Draw a power of a variable, perhaps with a factor."""
    power: Node = ("var", v) if r.random() < 0.4 else ("pow", ("var", v), ("num", str(r.randint(2, 6))))
    return power if r.random() < 0.5 else ("mul", ("num", str(r.randint(2, 12))), power)


def term(r: random.Random, v: str) -> Node:
    """Draw a simple term, a function of one, or a fraction of two."""
    kind = r.randrange(4)
    if kind < 2:
        return simple(r, v)
    if kind == 2:
        return (r.choice(list(FUNCTIONS)), simple(r, v))
    return ("over", ("num", str(r.randint(1, 9))) if r.random() < 0.4 else simple(r, v), simple(r, v))


def expression(r: random.Random, v: str) -> Node:
    """Draw a term, or the sum or difference of two."""
    return term(r, v) if r.random() < 0.5 else (r.choice(["plus", "minus"]), term(r, v), term(r, v))


def english(node: Node, r: random.Random) -> str:
    """Describe a formula; numbers are digits or words by chance."""
    match node:
        case ("num", str(digits)):
            return NUMBERS[int(digits)] if r.random() < 0.5 else digits
        case ("var", str(name)):
            return name
        case ("pow", base, ("num", str(power))):
            return f"{english(base, r)} {POWERS.get(power) or f'to the power {power}'}"
        case ("mul", number, factor):
            return f"{english(number, r)} {r.choice(['', 'times '])}{english(factor, r)}"
        case ("over", top, bottom):
            return f"{english(top, r)} over {english(bottom, r)}"
        case ("plus" | "minus" as sign, one, other):
            return f"{english(one, r)} {sign} {english(other, r)}"
        case (str(name), argument):
            return f"{FUNCTIONS[name]} {english(argument, r)}"
    raise AssertionError(node)


def latex(node: Node) -> str:
    r"""Write a formula.

    >>> print(latex(("minus", ("mul", ("num", "5"), ("var", "x")), ("sqrt", ("pow", ("var", "x"), ("num", "3"))))))
    5 x - \sqrt{x^{3}}
    """
    match node:
        case ("num" | "var", str(text)):
            return text
        case ("pow", base, power):
            return f"{latex(base)}^{{{latex(power)}}}"
        case ("mul", number, factor):
            return f"{latex(number)} {latex(factor)}"
        case ("over", top, bottom):
            return rf"\frac{{{latex(top)}}}{{{latex(bottom)}}}"
        case ("plus", one, other):
            return f"{latex(one)} + {latex(other)}"
        case ("minus", one, other):
            return f"{latex(one)} - {latex(other)}"
        case ("sqrt", argument):
            return rf"\sqrt{{{latex(argument)}}}"
        case (str(name), argument):
            return rf"\{name}\left({latex(argument)}\right)"
    raise AssertionError(node)


def _grouped(node: Node) -> str:
    """Write a formula as one factor."""
    return rf"\left({latex(node)}\right)" if node[0] in ("plus", "minus") else latex(node)


def _integral(r: random.Random, v: str) -> tuple[str, str]:
    low, high = sorted(r.sample(range(10), 2))
    body = expression(r, v)
    ends = [english(("num", str(end)), r) for end in (low, high)]
    told = f"the integral from {ends[0]} to {ends[1]} of {english(body, r)} with respect to {v}"
    return told, rf"\int_{{{low}}}^{{{high}}} {_grouped(body)} \, d{v}"


def _sum(r: random.Random, _: str) -> tuple[str, str]:
    i, top = r.choice("ijk"), r.choice(["n", "m", "10", "20", "100"])
    begin, body = r.randint(0, 3), simple(r, i)
    told = f"the sum from {i} equals {english(('num', str(begin)), r)} to {top} of {english(body, r)}"
    return told, rf"\sum_{{{i}={begin}}}^{{{top}}} {latex(body)}"


def _limit(r: random.Random, v: str) -> tuple[str, str]:
    to, sign = r.choice(
        [("infinity", r"\infty"), ("minus infinity", r"-\infty"), ("a", "a"), ("zero", "0"), ("1", "1")]
    )
    body = expression(r, v)
    return f"the limit as {v} approaches {to} of {english(body, r)}", rf"\lim_{{{v} \to {sign}}} {_grouped(body)}"


def _derivative(r: random.Random, v: str) -> tuple[str, str]:
    body = expression(r, v)
    return f"the derivative of {english(body, r)} with respect to {v}", rf"\frac{{d}}{{d{v}}} {_grouped(body)}"


def _function(r: random.Random, v: str) -> tuple[str, str]:
    name, body = r.choice("fgh"), expression(r, v)
    return f"{name} of {v} equals {english(body, r)}", f"{name}({v}) = {latex(body)}"


def _equation(r: random.Random, v: str) -> tuple[str, str]:
    one, other = expression(r, v), expression(r, v)
    return f"{english(one, r)} equals {english(other, r)}", f"{latex(one)} = {latex(other)}"


def _inequality(r: random.Random, v: str) -> tuple[str, str]:
    one, other, (words, sign) = expression(r, v), term(r, v), r.choice(RELATIONS)
    return f"{english(one, r)} {words} {english(other, r)}", f"{latex(one)} {sign} {latex(other)}"


FRAMES = (_integral, _sum, _limit, _derivative, _function, _equation, _inequality)


def pairs(seed: int) -> Iterator[tuple[str, str]]:
    r"""Yield (English, LaTeX) pairs without end and without repeating a formula.

    >>> print(*next(pairs(0)), sep="\n")
    8 y minus the natural logarithm of five y is less than or equal to 11 times y
    8 y - \ln\left(5 y\right) \leq 11 y
    """
    r = random.Random(seed)
    seen: set[str] = set()
    while True:
        told, formula = r.choice(FRAMES)(r, r.choice("xyt"))
        if formula not in seen:
            seen.add(formula)
            yield told, formula
