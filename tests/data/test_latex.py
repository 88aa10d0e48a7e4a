"""Formulas say what their descriptions say: read back by SymPy, a second implementation."""

import math
import random
import re
from itertools import islice

import pytest
import sympy
from sympy.parsing.sympy_parser import implicit_multiplication, parse_expr, standard_transformations

from ftexp.data import latex

NAMES = {name: sympy.Symbol(name, positive=True) for name in "xytijkn"}
FUNCTIONS = {name: getattr(sympy, name) for name in ("sin", "cos", "tan", "exp", "sqrt")} | {"ln": sympy.log}


def from_latex(text: str) -> sympy.Expr:
    """Read what our formulas are made of, by rewriting LaTeX to Python."""
    while (found := re.search(r"\\frac\{((?:[^{}]|\{[^{}]*\})*)\}\{((?:[^{}]|\{[^{}]*\})*)\}", text)) is not None:
        text = text.replace(found[0], f"(({found[1]})/({found[2]}))")
    text = re.sub(r"\\sqrt\{((?:[^{}]|\{[^{}]*\})*)\}", r"sqrt(\1)", text)
    text = text.replace(r"\left", "").replace(r"\right", "").replace("\\", "")
    text = re.sub(r"\^\{(\d+)\}", r"**\1", text)
    return parse_expr(text, NAMES | FUNCTIONS, (*standard_transformations, implicit_multiplication))


def to_sympy(node) -> sympy.Expr:
    kind, *parts = node
    if kind in ("num", "var"):
        return NAMES[parts[0]] if kind == "var" else sympy.Integer(parts[0])
    values = [to_sympy(part) for part in parts]
    return {"pow": lambda a, b: a**b, "mul": lambda a, b: a * b, "over": lambda a, b: a / b,
            "plus": lambda a, b: a + b, "minus": lambda a, b: a - b, **FUNCTIONS}[kind](*values)  # fmt: skip


def test_formula_of_any_tree_is_read_back_as_the_tree():
    r = random.Random(7)
    for _ in range(400):
        tree = latex.expression(r, "x")
        one, other = from_latex(latex.latex(tree)), to_sympy(tree)
        values = [complex(e.subs(NAMES["x"], sympy.Rational(7, 10)).evalf()) for e in (one, other)]
        assert math.isclose(values[0].real, values[1].real, rel_tol=1e-9), tree


def test_sabotage_a_lost_brace_is_noticed():
    tree = ("pow", ("var", "x"), ("num", "12"))
    assert from_latex(latex.latex(tree)) == to_sympy(tree)
    assert from_latex(latex.latex(tree).replace("{12}", "{1}")) != to_sympy(tree)


def test_one_description_has_one_formula_and_words_and_digits_are_both_there():
    made = list(islice(latex.pairs(0), 5000))
    assert len({formula for _, formula in made}) == 5000
    by_words = {}
    for told, formula in made:
        assert by_words.setdefault(told, formula) == formula
    text = " ".join(told for told, _ in made)
    assert " seven " in text and " 7 " in text


@pytest.mark.parametrize(
    ("begins", "holds"),
    [("the integral from", r"\int_{"), ("the sum from", r"\sum_{"), ("the limit as", r"\lim_{"),
     ("the derivative of", r"\frac{d}{d"), ("f of", "f("), ("", r" \leq ")],
)  # fmt: skip
def test_every_frame_is_there(begins, holds):
    assert any(told.startswith(begins) and holds in formula for told, formula in islice(latex.pairs(1), 300))


def test_bounds_of_an_integral_rise_and_sums_stand_in_brackets():
    for _, formula in islice(latex.pairs(2), 2000):
        if formula.startswith(r"\int"):
            low, high = re.match(r"\\int_\{(\d)\}\^\{(\d)\}", formula).groups()
            assert low < high
        if formula.startswith((r"\int", r"\lim", r"\frac{d}")) and re.search(r" [+-] ", formula):
            assert r"\left(" in formula
        assert formula.count("{") == formula.count("}")
        assert formula.count(r"\left") == formula.count(r"\right")


def test_same_seed_same_formulas():
    assert list(islice(latex.pairs(3), 50)) == list(islice(latex.pairs(3), 50))
    assert list(islice(latex.pairs(3), 50)) != list(islice(latex.pairs(4), 50))
