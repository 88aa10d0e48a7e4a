"""The command: what it prints, what it refuses and when, limits, and that it starts nothing."""

import json
import subprocess
import sys

import pytest
from conftest import TINY

from ftexp import estimate, facts, model, plan
from ftexp.estimate import Rows

PHI3 = ["model=hub", "model.path=microsoft/Phi-3-mini-4k-instruct", "model.dtype=float32", "quant=nf4", "lora.r=8",
        "lora.targets=[o_proj,qkv_proj,gate_up_proj,down_proj]", "trainer=default", "trainer.batch=16",
        "trainer.epochs=10", "trainer.optimizer=paged_adamw_8bit", "--rows", "341", "--tokens", "64"]  # fmt: skip
"""The recipe that prints most numbers, in overrides."""


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["ftexp plan", *argv])
        code = plan.main()
        return code, *capsys.readouterr()

    run.folder = tmp_path
    return run


def told(planned, *argv):
    code, out, err = planned(*argv, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_recipe_is_planned_to_the_byte_without_its_data_or_a_hub(planned):
    code, out, err = planned(*PHI3)
    assert code == 0, err
    for number in ("3,833,662,464", "12,582,912, 0.3282%", "2651.074752 MB", "220 of 16 rows", "218,240",
                   "4,890,970,340,720,640"):  # fmt: skip
        assert number in out


def test_a_run_is_planned_and_nothing_is_written(planned, monkeypatch):
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("loaded weights"))
    one = told(planned, *TINY, "trainer.steps=4")
    assert (one["count"], one["steps"], one["seconds"], one["over"]) == (1, 4, None, [])
    assert one["trials"][0]["counted"] == "by the tokenizer"
    assert not list(planned.folder.iterdir())


def test_a_sweep_is_planned_trial_by_trial_and_nothing_is_written(planned):
    sweep = told(planned, *TINY, "lora.r=4,8", "sweep.replicates=2", "-m")
    assert [t["overrides"] for t in sweep["trials"]] == ["lora.r=4", "lora.r=4 seed=1", "lora.r=8", "lora.r=8 seed=1"]
    assert sweep["trials"][2]["trainable"] == 2 * sweep["trials"][0]["trainable"]
    assert sweep["flops"] == sum(t["flops"] for t in sweep["trials"])
    assert sweep["memory"] == max(t["memory"] for t in sweep["trials"])
    assert not list(planned.folder.iterdir())


def test_a_search_counts_each_trial_as_the_dearest(planned):
    sweep = told(planned, *TINY, "lora.r=4,8", "trainer.lr=tag(log,interval(1e-4,1e-2))", "sweep.sampler=random",
                 "sweep.n_trials=7", "-m")  # fmt: skip
    assert sweep["count"] == 7
    assert sweep["flops"] == 7 * max(t["flops"] for t in sweep["trials"])


def test_a_sweep_is_a_table(planned):
    code, out, _ = planned(*TINY, "lora.r=4,8", "-m", "--tokens-per-second", "100", "--usd-per-hour", "0.29")
    assert code == 0
    assert all(text in out for text in ("lora.r=4", "lora.r=8", "dollars", "2 trials:", "hours"))


def test_time_and_money_follow_from_a_rate(planned):
    """218 240 tokens at 12.124 4/9 a second are five hours, at 0.29 dollars 1.45."""
    one = told(planned, *PHI3, "--tokens-per-second", str(218_240 / 18_000), "--usd-per-hour", "0.29")
    assert one["trials"][0]["seconds"] == pytest.approx(18_000)
    assert one["dollars"] == 1.45


def test_what_passes_a_limit_is_named(planned):
    priced = [*TINY, "lora.r=4,8,16", "-m", "--tokens-per-second", "1", "--usd-per-hour", "1"]
    dear = told(planned, *priced)
    two = dear["trials"][0]["dollars"] + dear["trials"][1]["dollars"]
    code, out, err = planned(*priced, "--budget-usd", str(two + 0.0001))
    assert code == plan.OVER
    assert "trial 2 (lora.r=16) brings the price to" in err
    assert "trial 1" not in err
    assert planned(*priced, "--budget-usd", str(dear["dollars"] + 0.0001))[0] == 0
    least = min(t["memory"] for t in dear["trials"]) / estimate.GIB
    code, _, err = planned(*priced, "--memory-gib", f"{least * 1.0001:.9f}")
    assert code == plan.OVER
    assert "trial 2 (lora.r=16) takes" in err
    assert "trial 0" not in err


def test_a_search_is_held_to_its_budget_as_a_whole(planned):
    given = [*TINY, "trainer.lr=tag(log,interval(1e-4,1e-2))", "sweep.sampler=random", "sweep.n_trials=50", "-m",
             "--tokens-per-second", "1", "--usd-per-hour", "1"]  # fmt: skip
    one = told(planned, *given)["trials"][0]["dollars"]
    code, _, err = planned(*given, "--budget-usd", str(10 * one))
    assert (code, "50 trials take up to" in err) == (plan.OVER, True)


@pytest.mark.parametrize(
    ("argv", "text"),
    [(["lora.rr=8"], "unknown key lora.rr in lora.rr=8; did you mean lora.r?"),
     (["lora.r=0"], "lora.r must be a rank between 1 and 4096, got 0"),
     (["lora.r=0,8", "-m"], "lora.r must be a rank between 1 and 4096, got 0"),
     (["data=jsonl", "data.path=none.jsonl"], "none.jsonl"),
     (["trainer.epochs=2"], "trainer.epochs would change nothing, got 2: trainer.steps=20 goes before"),
     (["--rows", "5"], "--rows and --tokens must be given together"),
     (["--rows", "0", "--tokens", "4"], "--rows must be above 0, got 0"),
     (["--usd-per-hour", "0.29"], "--usd-per-hour needs the time"),
     (["--tokens-per-second", "9", "--budget-usd", "2"], "--budget-usd needs --usd-per-hour"),
     (["--probe", "--tokens-per-second", "9"], "--probe trains on the rows of the data"),
     (["--cfg", "job"], "plan takes overrides and -m"),
     (["--prob"], "--prob")],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_mistakes_are_told_before_anything_heavy(argv, text):
    code = ("import sys, ftexp.plan as p; sys.argv[1:] = " + repr(argv) + "\n"
            "try: code = p.main()\nexcept SystemExit as e: code = e.code\n"
            "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert text in done.stderr
    assert done.stdout.split()[-2:] == ["False", "False"]
    assert int(done.stdout.split()[-3]) in (2, 3, 4)


@pytest.mark.parametrize("more", [[], ["lora.r=4,8", "-m"]])
def test_stdout_of_a_fresh_process_is_json_and_nothing_else(more, tmp_path):
    command = [sys.executable, "-m", "ftexp.plan", *TINY, *more, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout)["count"] == max(len(more), 1)
    assert not list(tmp_path.iterdir())


def test_keywords_of_the_libraries_are_refused(planned):
    code, _, err = planned(*TINY, "trainer.extra.nonsense=1")
    assert (code, "nonsense" in err) == (2, True)
    code, _, err = planned(*TINY, "lora.targets=[q_prj]")
    assert (code, "did you mean q_proj" in err) == (2, True)


def test_rows_are_counted_from_above_where_the_tokenizer_is_not_here(planned):
    """A token of a byte-level tokenizer has at least a byte; chat markers are granted 64."""
    real = told(planned, *TINY)["trials"][0]
    elsewhere = [o for o in TINY if o != "model=tiny"] + ["model=hub", "model.path=mistralai/Mistral-7B-v0.1"]
    bound = told(planned, *elsewhere)["trials"][0]
    assert "at most" in bound["counted"]
    assert bound["tokens"] >= real["tokens"]
    assert bound["steps"] == real["steps"]


def test_a_classifier_is_planned_with_its_head(planned):
    given = ["model=tiny", "data=genres", "data.rows=80", "data.valid=10", "trainer=classify", "trainer.steps=2"]
    plain = ["model=tiny", "data=genres", "data.rows=80", "data.valid=10", "trainer.steps=2", "data.max_length=512"]
    with_head, without = (told(planned, *g)["trials"][0] for g in (given, plain))
    assert with_head["trainable"] - without["trainable"] == 20 * 64  # twenty genres


def test_labels_stand_for_those_of_rows_that_are_not_here(planned):
    given = [
        "model=smollm2_135m",
        "data=file",
        "data.path=none.csv",
        "trainer=classify",
        "--rows",
        "64",
        "--tokens",
        "20",
    ]
    heads = [told(planned, *given, "--labels", str(n))["trials"][0]["trainable"] for n in (3, 5)]
    assert heads[1] - heads[0] == 2 * 576
    code, _, err = planned(*TINY, "--labels", "3")
    assert (code, "--labels needs --rows and --tokens" in err) == (2, True)
    code, _, err = planned(*TINY, "--rows", "9", "--tokens", "9", "--labels", "3")
    assert (code, "--labels=3 needs trainer.kind=classify, got sft" in err) == (2, True)


def test_speed_leaves_the_first_step_out(composed):
    """Two rows a step, ten tokens a row: nine steps of 20 tokens in 18 seconds are 10 a second."""
    run = composed("model=tiny", "trainer.steps=10", "trainer.batch=2")
    assert plan.speed(Rows((10,) * 40, (5,) * 40), run, [100.0 + 2 * n for n in range(10)]) == 10


def test_a_probe_trains_ten_steps_and_keeps_nothing(planned, monkeypatch):
    ends = []
    monkeypatch.setattr(plan, "speed", lambda rows, run, at: ends.append(len(at)) or 50.0)
    sweep = told(planned, *TINY, "lora.r=2,4", "-m", "--probe", "--usd-per-hour", "3600")
    assert ends == [10]  # one probe: both have the same model, data and batch
    assert sweep["dollars"] == pytest.approx(sweep["padded"] / 50)
    assert not list(planned.folder.iterdir())


def test_a_real_run_records_plan_against_real(cli, tmp_path):
    code, _, err = cli(*TINY, "track=none", "name=a")
    assert code == 0, err
    kept = json.loads((tmp_path / "outputs/runs/a/trial.json").read_text())["plan"]
    for key in ("trainable", "total", "steps", "flops"):
        assert kept[key]["planned"] == kept[key]["real"] > 0
    assert kept["memory_gib"]["planned"] > 0
    assert kept["memory_gib"]["real"] >= 0  # so small a model may fit into what is there
    metrics = (tmp_path / "outputs/runs/a/metrics.jsonl").read_text()
    assert "plan/memory_gib_real" in metrics


def test_a_wrong_plan_is_said(cli, monkeypatch, tmp_path):
    from dataclasses import replace

    usual = estimate.trial
    monkeypatch.setattr(estimate, "trial", lambda *given: replace(usual(*given), total=1))
    code, out, err = cli(*TINY, "track=none", "name=b")
    assert code == 0
    assert "warning: the plan is wrong: total 1 planned" in out + err


@pytest.mark.slow
def test_memory_of_the_embedded_model(tmp_path):
    """Growth of resident memory, after another trial as much as after none: within a factor of three.

    What libraries and the allocator add differs from chip to chip.
    """
    given = ["trainer.steps=2", "trainer.report_steps=0", "eval=loss", "track=none", "name=a", "seed=0,1", "-m"]
    subprocess.run([sys.executable, "-m", "ftexp.run", *given], cwd=tmp_path, check=True, capture_output=True)
    for trial in (0, 1):
        kept = json.loads((tmp_path / f"outputs/sweeps/a/{trial}/trial.json").read_text())["plan"]
        assert -0.67 < kept["memory_gib"]["error"] < 2.0


def test_resident_memory_is_below_its_peak():
    assert 0 < facts.resident_gib() <= facts.peak_memory_gib()["memory_gib"]
