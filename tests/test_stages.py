"""What a run saves is what it scored: taken up by a second run, its base scores are the first one's."""

import json
import signal

import pytest
import torch
from conftest import TINY, UNWRITTEN
from safetensors.torch import load_file

from ftexp import api, errors, evaluate, experiment, labels, model
from ftexp.config import Kind, Model, Quant
from ftexp.errors import ConfigError
from ftexp.model import compute, loftq
from ftexp.train import control, rewarder

SHORT = [t for t in UNWRITTEN if not t.startswith("trainer.lr")] + ["track=none", "eval=loss", "trainer.lr=5e-2"]


@pytest.mark.parametrize(
    "given",
    [
        ["lora.targets=[embed_tokens]"],
        ["lora.targets=[lm_head,q_proj]"],
        ["lora.targets=[q_proj,embed_tokens]", "lora=pissa"],
        ["lora=pissa", "lora.extra={alpha_pattern: {q_proj: 200, v_proj: 200}}"],
        ["lora=pissa", "lora.extra={rank_pattern: {q_proj: 4}}"],
        ["lora=loraplus", "lora.targets=[q_proj,embed_tokens]"],
    ],
    ids=" ".join,
)
def test_a_run_that_begins_with_another_begins_with_its_scores(cli, tmp_path, given):
    """Also where the embedding, which the tied head shares, or a pattern of ranks was learned."""
    code, _, err = cli(*SHORT, *given, "lora.r=8", "name=first")
    assert code == 0, err
    code, _, err = cli(*SHORT[1:], "model=run", "model.path=first", "trainer.steps=1", "name=second")
    assert code == 0, err
    first, second = (
        json.loads((tmp_path / f"outputs/runs/{n}/trial.json").read_text())["scores"] for n in ("first", "second")
    )
    assert second["base/loss"] == pytest.approx(first["valid/loss"], rel=2e-5)
    assert abs(first["valid/loss"] - first["base/loss"]) > 1e-3
    if "lora=loraplus" in given:
        kept = load_file(tmp_path / "outputs/runs/first/adapter/adapter_model.safetensors")
        assert max(v.abs().max() for k, v in kept.items() if "lora_embedding_A" in k) > 1e-2  # it learned at the rate


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["lora=pissa", "lora.r=64"],
            "lora.r must be at most 32 with lora.variant=pissa: model.layers.0.self_attn.k_proj",
        ),
        (
            ["lora=pissa", "lora.r=4", "lora.extra={rank_pattern: {k_proj: 64}}"],
            "lora.extra.rank_pattern must be at most 32",
        ),
        (
            ["lora=pissa", "lora.r=4", "lora.targets=[lm_head,q_proj]"],
            "lora.targets must not name lm_head with lora.variant=pissa",
        ),
        (["lora.extra={bias: all}"], "lora.extra.bias must be none, got all"),
        (["lora.extra={init_lora_weights: eva}"], "lora.extra.init_lora_weights must not be eva"),
        (
            ["trainer.extra={logging_strategy: 'no'}"],
            "trainer.extra.logging_strategy must not be set, it has a key of its own",
        ),
        (["trainer=reward", "data=preference", "lora.extra={modules_to_save: [score]}"], "it is set by ftexp"),
    ],
)
def test_what_would_be_saved_wrong_or_lost_is_refused(cli, given, told):
    small = [t for t in SHORT if not t.startswith("trainer.") or "trainer=reward" not in given]
    code, _, err = cli(*small, *given, "name=x")
    assert code == 2
    assert told in err
    assert "Traceback" not in err


@pytest.mark.parametrize("given", [["trainer=classify", "data=genres"], ["trainer=reward", "data=preference"]])
def test_pissa_leaves_the_head_of_a_classifier_alone(composed, given):
    """It has as many rows as there are labels, fewer than a usual rank; it is trained whole."""
    experiment.prepare(composed(*given, *SHORT[:1], "data.max_length=512", "data.rows=120", "lora=pissa", "lora.r=8"))


@pytest.mark.parametrize(
    "given", [["objectives=[cost/gpu_memory_gib]"], ["lora.r=2,4", "sweep.at_most={cost/gpu_memory_gib: 20}", "-m"]]
)
def test_memory_of_a_gpu_is_refused_without_one(cli, monkeypatch, given):
    monkeypatch.setattr(compute, "has_gpu", lambda: False)
    code, _, err = cli(*TINY, "track=none", "name=s", *given)
    key = "sweep.at_most" if "-m" in given else "objectives"
    assert (code, f"{key}: cost/gpu_memory_gib needs a GPU, there is none here" in err) == (2, True), err


def test_other_machines_may_have_a_gpu(tiny, monkeypatch):
    monkeypatch.setattr(compute, "has_gpu", lambda: False)
    run = tiny("objectives=[cost/gpu_memory_gib]")
    experiment.prepare(run, elsewhere=True)
    with pytest.raises(ConfigError, match="needs a GPU"):
        experiment.prepare(run)


def test_dora_on_int8_weights_is_refused_on_a_cpu(cli, tmp_path):
    base = model.load(Model(kind=Kind.tiny), Quant())
    base.model.save_pretrained(tmp_path / "m")
    base.tokenizer.save_pretrained(tmp_path / "m")
    given = [t for t in SHORT if t != "model=tiny"] + ["model=hub", "model.path=./m", "quant=int8", "lora=dora"]
    code, _, err = cli(*given, "name=x")
    assert (code, "lora.variant must not be dora with quant=int8 on a CPU" in err) == (2, True), err


def test_halves_of_more_rank_than_a_matrix_has_are_exact():
    for shape in ((6, 4), (4, 6)):
        matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        b, a = loftq.halves(matrix, 9)
        assert (b.shape, a.shape) == ((shape[0], 9), (9, shape[1]))
        assert torch.allclose(b @ a, matrix, atol=1e-5)


def test_references_are_those_of_the_rows_as_they_are_now(tmp_path, monkeypatch):
    """A notebook: the file is written anew between two runs of one process."""
    monkeypatch.chdir(tmp_path)

    def write(words):
        rows = [
            {"prompt": f"{words} {n}", "chosen": f"{words} yes {n}", "rejected": f"no {n} {words}"} for n in range(60)
        ]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    given = ["model=tiny", "model.dtype=float32", "data=jsonl", "data.path=p.jsonl", "trainer=dpo", "trainer.steps=2",
             "data.shuffle=false", "trainer.lr=1e-2", "track=none", "eval=loss", "data.valid=10"]  # fmt: skip
    write("sun")
    api.run(*given, "name=a")
    write("a longer row about rain")
    second = api.run(*given, "name=b")
    experiment._references.clear()
    alone = api.run(*given, "name=c")
    assert second["valid/loss"] == alone["valid/loss"]
    assert second["valid/accuracy"] == alone["valid/accuracy"]


def test_what_a_template_opens_an_answer_with_earns_nothing_in_training(trained_stages, tmp_path, monkeypatch):
    """As it earns nothing on held-out rows: Qwen3 opens with empty thoughts, which its reward template writes itself."""
    monkeypatch.chdir(trained_stages)
    seen = {}
    rewards = rewarder.Rewarder.rewards

    def watched(self, rows, texts, batch, label):
        seen.setdefault(label, []).extend(texts)
        return rewards(self, rows, texts, batch, label)

    monkeypatch.setattr(rewarder.Rewarder, "rewards", watched)
    monkeypatch.setattr(evaluate, "opening", lambda *_: "O")
    monkeypatch.setattr(evaluate, "answer", lambda text, opening: f"answer without {opening}")
    small = [t for t in TINY if not t.startswith("trainer.")]
    api.run(*small, "trainer=rloo", "trainer.reward=judge", "trainer.steps=1", "track=none", folder=tmp_path / "r")
    assert set(seen["sampled"]) == {"answer without O"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_exit_code_tells_who_asked_to_leave(monkeypatch, number, code):
    """A scheduler starts again what ended in 75; what a person stopped stays stopped."""
    monkeypatch.setattr(control, "_training", True)
    monkeypatch.setattr(control, "_by_hand", False)
    control.LEAVE.clear()
    try:
        control._asked(number, None)
        assert control.left("asked to leave").exit_code == code
        assert isinstance(control.left("x"), errors.Preempted)
    finally:
        control.LEAVE.clear()


def test_threshold_of_a_label_that_every_row_has_gives_it_to_a_row_that_scores_a_little_less():
    assert labels.threshold([True, True, True], [0.7, 0.9, 0.8]) == pytest.approx(0.35)
    assert labels.threshold([True, False, True], [0.9, 0.2, 0.6]) == pytest.approx(0.4)


def test_files_that_are_not_what_a_run_scored_are_not_exported(cli, tmp_path, monkeypatch, capsys):
    """Before and after a merge would agree: both come from the files."""
    import sys

    from safetensors.torch import save_file

    from ftexp import export

    assert cli(*SHORT, "name=one")[0] == 0
    path = tmp_path / "outputs/runs/one/adapter/adapter_model.safetensors"
    kept = load_file(path)
    monkeypatch.setattr(sys, "argv", ["ftexp export", "one", "--form", "merged", "--to", str(tmp_path / "good")])
    assert export.main() == 0
    save_file({name: value * 0.5 for name, value in kept.items()}, path, metadata={"format": "pt"})
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["ftexp export", "one", "--form", "merged", "--to", str(tmp_path / "bad")])
    assert export.main() == errors.Unfaithful.exit_code
    assert "they are not what it scored; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_notebook_is_spared_what_libraries_tell_their_callers(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    api.run(*SHORT, "name=w")
    assert not [w for w in recwarn if "deprecated" in str(w.message) and "transformers" in str(w.filename)]
