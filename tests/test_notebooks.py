"""The notebooks of `analysis/`: they run from top to bottom on any sweep, and what is committed names no machine."""

import json
import os
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import TINY
from made import HOSTILE, sweep

from ftexp import notebooks

NOTEBOOKS = sorted(notebooks.HOME.glob("*.ipynb"))


def load(path):
    return json.loads(path.read_text())


def outputs(notebook):
    return [out for cell in notebook["cells"] for out in cell.get("outputs", [])]


def cell(source):
    return {"cell_type": "code", "source": [source], "outputs": [], "metadata": {}, "execution_count": None}


@pytest.fixture
def on(monkeypatch):
    return lambda folder: monkeypatch.setenv("SWEEP", str(folder))


def test_all_four_are_there():
    assert [p.stem for p in NOTEBOOKS] == ["compare", "cost", "errors", "sensitivity"]


def test_notebooks_run_on_a_real_sweep(cli, tmp_path, on):
    code, _, err = cli("lora.r=2,4", *TINY, "track=none", "name=s", "-m")
    assert code == 0, err
    on(tmp_path / "outputs" / "sweeps" / "s")
    for path in NOTEBOOKS:
        done = notebooks.execute(load(path), path.name)
        assert any("image/svg+xml" in out.get("data", {}) for out in outputs(done)), path.name


@pytest.mark.parametrize(
    "keys", [{"kind": "labels"}, {"kind": "loss", "failed": 1}, {"count": 12, "pruned": 4}, {"hostile": HOSTILE},
             {"count": 1}, {"count": 2, "failed": 2}], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run_on_other_sweeps(path, keys, tmp_path, on):
    on(sweep(tmp_path / "s", **keys))
    for out in outputs(notebooks.execute(load(path), path.name)):
        if svg := out.get("data", {}).get("image/svg+xml"):
            ElementTree.fromstring("".join(svg))
        assert "<script" not in "".join(out.get("data", {}).get("text/markdown", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_show_something_and_name_no_machine(path):
    text, notebook = path.read_text(), load(path)
    assert [c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code"] == list(
        range(1, sum(c["cell_type"] == "code" for c in notebook["cells"]) + 1)
    )
    assert any("image/svg+xml" in out.get("data", {}) for out in outputs(notebook))
    assert not re.search(r"/(home|root|tmp|work|Users)/", text) and str(Path.home()) not in text
    assert os.uname().nodename not in text
    assert len(text) < 120_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_thin(path):
    source = "".join("".join(c["source"]) for c in load(path)["cells"] if c["cell_type"] == "code")
    assert not re.search(r"^\s*(class|import numpy|import pandas|from scipy)", source, re.MULTILINE)


def test_cells_share_names_print_and_show():
    done = notebooks.execute(
        {"cells": [cell("a = 2\nprint('told')"), {"cell_type": "markdown", "source": []}, cell("a + 1")]}
    )
    assert [o.get("text") or o["data"]["text/plain"] for o in outputs(done)] == [["told\n"], ["3"]]
    assert [c.get("execution_count") for c in done["cells"]] == [1, None, 2]


def test_a_cell_that_breaks_is_named():
    with pytest.raises(ZeroDivisionError) as told:
        notebooks.execute({"cells": [cell("1"), cell("1 / 0")]}, "x.ipynb")
    assert told.value.__notes__ == ["in x.ipynb, code cell 2"]


def test_table_is_text_only():
    told = notebooks.Table(["a", "b"], [("x|y\nz", 0.123456), ("<b>", 3)])._repr_markdown_()
    assert told.splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y z | 0.1235 |", "| &lt;b> | 3 |"]


def test_a_copy_of_a_notebook_of_ones_own_is_run(tmp_path, monkeypatch, capsys):
    path, there = tmp_path / "n.ipynb", tmp_path / "s" / "notebooks" / "n.ipynb"
    path.write_text(json.dumps({"cells": [cell("from ftexp.notebooks import folder\nfolder().name")]}))
    before = path.read_bytes()
    monkeypatch.setenv("SWEEP", "")
    monkeypatch.setattr(sys, "argv", ["notebooks", str(sweep(tmp_path / "s")), str(path)])
    assert notebooks.main() == 0
    assert outputs(load(there))[0]["data"]["text/plain"] == ["'s'"]
    assert path.read_bytes() == before
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["notebooks", str(tmp_path / "s"), str(path), "--json"])
    assert notebooks.main() == 0
    assert json.loads(capsys.readouterr().out) == {"sweep": str(tmp_path / "s"), "notebooks": [os.path.relpath(there)]}
    monkeypatch.setattr(sys, "argv", ["notebooks", str(tmp_path / "gone"), str(NOTEBOOKS[0])])
    assert notebooks.main() == 4
    assert "must be the folder of a sweep" in capsys.readouterr().err


def test_ours_and_the_sweep_are_found_by_name(tmp_path, monkeypatch, capsys):
    folder = sweep(tmp_path / "outputs" / "sweeps" / "s")
    monkeypatch.setenv("SWEEP", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebooks", "s", "compare", "cost.ipynb", "cost"])
    assert notebooks.main() == 0
    assert sorted(p.name for p in (folder / "notebooks").iterdir()) == ["compare.ipynb", "cost.ipynb"]
    assert "outputs/sweeps/s/notebooks/cost.ipynb: ran on s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        (
            ["s", "comparr"],
            2,
            "comparr: must be a notebook that is there, or one of compare, cost, errors, sensitivity",
        ),
        (["s", "a/n.ipynb", "n.ipynb"], 2, "n.ipynb: must have a name of its own, a/n.ipynb is copied to the same"),
        (["s", "scores.py"], 2, "scores.py: must be a notebook, it is no JSON ("),
        (["s", "n.ipynb"], 2, "n.ipynb: must be a notebook, it has no cells"),
        (["ss"], 4, "there is no sweep.json or trial.json; did you mean s?; there are: sweeps s"),
    ],
)
def test_wrong_names_end_in_one_line(tmp_path, monkeypatch, capsys, given, code, told):
    sweep(tmp_path / "outputs" / "sweeps" / "s")
    (tmp_path / "a").mkdir()
    for name in ("a/n.ipynb", "n.ipynb"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "scores.py").write_text("x")
    monkeypatch.setenv("SWEEP", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebooks", *given])
    assert notebooks.main() == code
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("bad", "told"),
    [(cell("1\n%matplotlib inline"),
      "n.ipynb, code cell 2: line 2 must be Python, got %matplotlib inline; commands of Jupyter are not run"),
     ({"cell_type": "code"}, "n.ipynb: must be a notebook, its cell 2 has no cell_type or no source"),
     (cell("import sys\nsys.exit(0)"), "n.ipynb, code cell 2: must not end the program, exit(0)")],
)  # fmt: skip
def test_cell_that_cannot_be_run_ends_in_one_line(tmp_path, monkeypatch, capsys, bad, told):
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": [cell("1"), bad]}))
    monkeypatch.setenv("SWEEP", "")
    monkeypatch.setattr(sys, "argv", ["notebooks", str(sweep(tmp_path / "s")), str(path)])
    assert notebooks.main() == 2
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0)])
def test_usage(argv, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["notebooks", *argv])
    assert notebooks.main() == code
    out, err = capsys.readouterr()
    assert (err if code else out).startswith("usage: ") and not (out if code else err)


def test_notebooks_of_the_installation_stay_as_they_are(tmp_path, monkeypatch, capsys):
    """From any folder but the checkout the sweep gets copies of its own."""
    folder = sweep(tmp_path / "s", count=8)
    before = {path: path.read_bytes() for path in NOTEBOOKS}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebooks", "s"])
    assert notebooks.main() == 0
    assert {path: path.read_bytes() for path in NOTEBOOKS} == before
    there = sorted((folder / "notebooks").glob("*.ipynb"))
    assert [p.name for p in there] == [p.name for p in NOTEBOOKS]
    assert all(any(cell.get("outputs") for cell in json.loads(p.read_text())["cells"]) for p in there)
    assert "s/notebooks/compare.ipynb: ran on s" in capsys.readouterr().out
