import subprocess

import torch

from ftexp import facts
from ftexp.model import compute


def test_versions_name_the_libraries_that_decide_a_result():
    told = facts.versions()
    assert told["torch"] == torch.__version__.split("+")[0] or told["torch"] == torch.__version__
    assert "not installed" not in {told[name] for name in ("transformers", "trl", "peft", "hydra-core")}


def test_git_tells_commit_and_dirt(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert facts.git(tmp_path) == {}
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    told = facts.git(tmp_path)
    assert len(told["commit"]) == 40
    assert told["dirty"] == "False"
    (tmp_path / "new").write_text("x")
    assert facts.git(tmp_path)["dirty"] == "True"


def test_peak_memory_starts_anew():
    compute.keep_pages()  # as a model that is loaded does: without it what is freed here is given back at once
    facts.reset_peak_memory()
    before = facts.peak_memory_gib()["memory_gib"]
    block = torch.ones(100, 2**20)  # 400 MiB
    held = facts.peak_memory_gib()["memory_gib"]
    assert held - before > 0.3
    del block
    facts.reset_peak_memory()
    assert facts.peak_memory_gib()["memory_gib"] < held - 0.3
