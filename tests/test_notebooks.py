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


def test_command_runs_a_notebook_in_place(tmp_path, monkeypatch, capsys):
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": [cell("from ftexp.notebooks import folder\nfolder().name")]}))
    monkeypatch.setenv("SWEEP", "")
    monkeypatch.setattr(sys, "argv", ["notebooks", str(sweep(tmp_path / "s")), str(path)])
    assert notebooks.main() == 0
    assert outputs(load(path))[0]["data"]["text/plain"] == ["'s'"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["notebooks", str(tmp_path / "s"), str(path), "--json"])
    assert notebooks.main() == 0
    assert json.loads(capsys.readouterr().out) == {"sweep": str(tmp_path / "s"), "notebooks": [os.path.relpath(path)]}
    monkeypatch.setattr(sys, "argv", ["notebooks", str(tmp_path / "gone"), str(NOTEBOOKS[0])])
    assert notebooks.main() == 4
    assert "must be the folder of a sweep" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0)])
def test_usage(argv, code, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebooks", *argv])
    assert notebooks.main() == code


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
