"""The shape of the package: imports point one way, tests mirror modules, every key is documented."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ftexp

PACKAGE = Path(ftexp.__file__).parent
ORDER = ["errors", "files", "machine", "garbage", "progress", "ranks", "verb", "config", "defaults", "overrides", "data", "metrics", "own", "runs", "board",
         "handed", "model", "labels", "passes", "evaluate", "train", "estimate", "facts", "track", "registry", "experiment", "stats",
         "sealed", "sync", "probe", "sweep", "compare", "examples", "page", "report", "confirm", "notebooks", "power",
         "diff",
         "reproduce", "trained", "generate", "fidelity", "card", "export", "run", "api", "show", "plan", "doctor", "ui",
         "completion", "__main__"]  # fmt: skip
"""A module imports only from those to its left."""
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "mlflow", "sklearn", "numpy", "pandas", "pyarrow"}
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """Name the part of the order a module belongs to; a `__main__` anywhere is a command, and may import them all."""
    if path.stem == "__main__":
        return "__main__"
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Parts of ftexp that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ftexp":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ftexp."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ftexp.")}
    return found


def test_contributing_names_every_part_in_this_order():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("```")[1]
    lines = [line[2:] for line in page.splitlines() if line.startswith("  ") and line[2] != " "]
    named = [word.strip("/,") for line in lines for word in line.split("  ")[0].split()]
    assert [name for name in named if name in ORDER] == [name for name in ORDER if name != "__main__"]


def test_order_names_every_part():
    assert set(ORDER) == {part(p) for p in MODULES} - {"__init__"}


@pytest.mark.parametrize(
    "path", [p for p in MODULES if part(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_left(path):
    left = ORDER[: ORDER.index(part(path)) + 1]
    assert imported(path) <= set(left)


def test_the_command_imports_nothing_heavy():
    modules = "ftexp.run, ftexp.api, ftexp.report, ftexp.confirm, ftexp.power, ftexp.show, ftexp.plan, ftexp.doctor, ftexp.ui, ftexp.generate, ftexp.export, ftexp.sweep.__main__"
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_every_key_and_option_is_documented():
    tree = ast.parse((PACKAGE / "config.py").read_text())
    bare = []
    for cls in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(node, ast.AnnAssign | ast.Assign) and not documented:
                bare.append(f"{cls.name}: line {node.lineno}")
    assert not bare


@pytest.mark.parametrize(
    "path", [p for p in MODULES if part(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_every_module_has_its_tests(path):
    tests = Path(__file__).parent
    relative = path.relative_to(PACKAGE)
    if relative.name == "__init__.py":
        names = [tests / relative.parent / f"test_{relative.parent.name}.py"]
        names += list((tests / relative.parent).glob("test_*.py"))
    elif relative.stem == "__main__":
        names = [tests / "test_run.py" if relative.parent == Path() else tests / relative.parent / "test_main.py"]
    else:
        names = [tests / relative.parent / f"test_{relative.stem}.py"]
    assert any(name.exists() for name in names)


def test_no_config_object_behind_the_door():
    """Only what speaks to Hydra knows OmegaConf; everything behind gets plain dataclasses."""
    allowed = {"config.py", "run.py", "sweep/plugin.py", "sweep/frozen.py", "sweep/worker.py"}
    for path in MODULES:
        if str(path.relative_to(PACKAGE)) not in allowed:
            assert "omegaconf" not in path.read_text(), path


def test_a_wheel_holds_every_module_and_file_of_values(tmp_path):
    """Installed without the checkout, the command finds `conf/`, `sweeps/` and all modules."""
    import zipfile

    root = PACKAGE.parent
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ftexp", "conf", "sweeps", "pyproject.toml", "README.md", "LICENSE"):
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, source / name)
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    modules = {str(p.relative_to(root)) for p in MODULES}
    values = {f"ftexp/{p.relative_to(root)}" for folder in ("conf", "sweeps") for p in (root / folder).rglob("*.yaml")}
    data = {
        str(p.relative_to(root)) for p in PACKAGE.rglob("*") if p.suffix in (".json", ".yaml", ".css", ".js", ".txt")
    }
    assert modules | values | data <= names
