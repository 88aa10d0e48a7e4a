"""`python -m ftexp.notebooks FOLDER [NOTEBOOK ...]`: run those of `analysis/` on a sweep and keep what they show.

A notebook opens in Jupyter as any other. Here its cells run in order in this process, which needs no Jupyter, and a
copy with what they show goes to `notebooks/` in the sweep's folder. In the checkout, where none is named, those of
`analysis/` keep it themselves: so they are brought up to date.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftexp import runs, verb
from ftexp.errors import ConfigError, MachineError
from ftexp.overrides import ROOT
from ftexp.report import markdown

HOME = ROOT / "analysis"
VARIABLE = "SWEEP"
"""Environment variable that names the sweep's folder to a notebook."""
DEMO = "outputs/sweeps/lora.r-8-16-64"
USAGE = """usage: python -m ftexp.notebooks FOLDER [NOTEBOOK ...] [--json]

  FOLDER    of a sweep or a run, or its name
  NOTEBOOK  compare, cost, errors or sensitivity, or a file of your own; default: these four
  --json    for scripts

Copies with what the cells show go to FOLDER/notebooks/, the notebooks stay as they are. In the checkout, without
NOTEBOOK, those of analysis/ keep it themselves.
"""
SHOWN = {"_repr_svg_": "image/svg+xml", "_repr_markdown_": "text/markdown", "_repr_html_": "text/html"}


def folder() -> Path:
    """Return the folder of the sweep a notebook is about: `$SWEEP`, else the demo's; relative to the checkout."""
    return ROOT / os.environ.get(VARIABLE, DEMO)


@dataclass(frozen=True)
class Table:
    """Rows that a notebook, and GitHub, show as a table; all of it is text."""

    titles: Sequence[str]
    rows: Iterable[Sequence[Any]]

    def _repr_markdown_(self) -> str:
        lines = [self.titles, ["---"] * len(self.titles), *([_told(v) for v in row] for row in self.rows)]
        head, rule, *body = ("| " + " | ".join(map(str, line)) + " |" for line in lines)
        return "\n".join([head, rule, *body])


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else markdown(str(value))


def execute(notebook: dict[str, Any], name: str = "notebook") -> dict[str, Any]:
    """Run the code cells in order, and return the notebook with what they print and show.

    An exception of a cell leaves with the cell's number noted.

    Raises:
        ConfigError: a cell is no Python, or ends the program.
    """
    space: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            tree = _parsed("".join(cell["source"]), f"{name}, code cell {count}")
            try:
                outputs = _run(tree, space, count)
            except SystemExit as error:
                raise ConfigError(f"{name}, code cell {count}: must not end the program, exit({error.code})") from error
            except Exception as error:
                error.add_note(f"in {name}, code cell {count}")
                raise
            cell = cell | {"outputs": outputs, "execution_count": count}
        cells.append(cell)
    return notebook | {"cells": cells}


def _parsed(source: str, where: str) -> ast.Module:
    try:
        compile(source, "<cell>", "exec")  # refuses more than the parser, as `return` outside a function
        return ast.parse(source)
    except SyntaxError as error:
        line = (error.text or "").strip()
        hint = "; commands of Jupyter are not run" if line.startswith(("%", "!")) else ""
        raise ConfigError(f"{where}: line {error.lineno} must be Python, got {line}{hint}") from error


def _run(tree: ast.Module, space: dict[str, Any], count: int) -> list[dict[str, Any]]:
    out, value = io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(out):
        exec(compile(tree, "<cell>", "exec"), space)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), space)
    printed = [{"name": "stdout", "output_type": "stream", "text": _lines(out.getvalue())}] if out.getvalue() else []
    return printed if value is None else [*printed, _shown(value, count)]


def _shown(value: Any, count: int) -> dict[str, Any]:
    data = {kind: _lines(getattr(value, way)()) for way, kind in SHOWN.items() if hasattr(value, way)}
    data["text/plain"] = _lines(f"<{type(value).__name__}>" if data else repr(value))
    return {"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def chosen(names: Sequence[str]) -> list[Path]:
    """Return the notebooks of the names: files, or those of `analysis/` with or without `.ipynb`; all these of none.

    Raises:
        ConfigError: there is no such notebook, or two have one name.
        MachineError: `analysis/` has none.
    """
    ours = {path.stem: path for path in sorted(HOME.glob("*.ipynb"))}
    if not names and not ours:
        raise MachineError(f"{HOME}: there are no notebooks")
    found: dict[str, Path] = {}
    for name in names or ours:
        path = Path(name) if Path(name).is_file() else ours.get(name.removesuffix(".ipynb"))
        if path is None:
            raise ConfigError(f"{name}: must be a notebook that is there, or one of {', '.join(ours)}")
        if (first := found.setdefault(path.name, path)).resolve() != path.resolve():
            raise ConfigError(f"{path}: must have a name of its own, {first} is copied to the same")
    return list(found.values())


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: must be a notebook, it is no JSON ({error})") from error
    if not isinstance(told, dict) or "cells" not in told:
        raise ConfigError(f"{path}: must be a notebook, it has no cells")
    for number, cell in enumerate(told["cells"], 1):
        if not isinstance(cell, dict) or not {"cell_type", "source"} <= cell.keys():
            raise ConfigError(f"{path}: must be a notebook, its cell {number} has no cell_type or no source")
    return told


def main() -> int:
    """Run the command line; return the exit code."""
    words = [word for word in sys.argv[1:] if word != "--json"]
    if not words or words[0].startswith("-"):
        asked = words in (["-h"], ["--help"])
        print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return verb.ended(lambda: _main(words[0], words[1:], "--json" in sys.argv[1:]))


def _main(where: str, names: list[str], plain: bool) -> int:
    paths, sweep = chosen(names), runs.shown(where)
    os.environ[VARIABLE] = str(sweep.absolute())
    inside = not names and Path.cwd() == ROOT
    made = [path if inside else sweep / "notebooks" / path.name for path in paths]
    for path, to in zip(paths, made, strict=True):
        done = execute(_read(path), path.name)
        to.parent.mkdir(exist_ok=True)
        to.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if not plain:
            print(f"{os.path.relpath(to)}: ran on {where}")
    if plain:
        print(verb.as_json({"sweep": where, "notebooks": [os.path.relpath(to) for to in made]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
