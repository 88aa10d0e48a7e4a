"""Racing, and halving that spares ties: rows are kept at each rung, and judged by those of the others."""

import numpy as np
import pytest
from conftest import TINY, UNWRITTEN
from test_worker import sweep  # noqa: F401

from ftexp import experiment
from ftexp.errors import ConfigError, Pruned
from ftexp.files import read_json, write_json
from ftexp.stats import racing
from ftexp.sweep import race, study, worker
from ftexp.sweep.options import Options, Pruner
from ftexp.train.control import Control, Rung

ROWS = 32
HARD = np.random.default_rng(0).gamma(1.0, 1.0, ROWS)


def run_trials(monkeypatch, shift, scores=None, units=()):
    """Replace training by rows that are `shift[trial]` worse than those of a perfect trial, give or take."""

    def execute(run, folder, label, parent, control):
        number = int(folder.name)
        for step in (10, 20):  # every ten, as the config says
            noise = np.random.default_rng(10 * number + step).normal(0, 0.05, ROWS)
            rows = HARD + shift[number] + noise
            reason = control.judge(Rung(float(rows.mean()), rows.tolist(), [1] * ROWS, units), step)
            if reason:
                raise Pruned(reason)
        return {"valid/loss": float(shift[number]), **(scores or {}).get(number, {})}

    monkeypatch.setattr(experiment, "execute", execute)


def states(record):
    return [t.state.name for t in study.counted(record)]


@pytest.fixture
def race_of(sweep, composed):  # noqa: F811
    return lambda *given, **more: sweep(*given, pruner=Pruner.race, **more)


def test_loser_is_stopped_and_one_that_chance_may_explain_is_not(race_of, monkeypatch):
    made, record = race_of("a=1,2,3,4")
    run_trials(monkeypatch, [0.3, 0.0, 0.001, 0.3])
    worker.work(made, record)
    assert states(record) == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED"]
    reason = study.counted(record)[3].user_attrs["ftexp:reason"]
    assert reason.startswith("pruned at step 10: valid/loss ")
    assert "trial 1 had" in reason
    kept = read_json(made.folder / "1" / race.FOLDER / "10.json")
    assert len(kept["nats"]) == ROWS
    assert set(kept["counts"]) == {1}


def test_blind_test_would_stop_the_near_equal_too(race_of, monkeypatch):
    """Twin: where any difference counts, the trial that chance may explain is stopped."""
    monkeypatch.setattr(racing, "level", lambda *_: 1.0)
    made, record = race_of("a=1,2,3,4")
    run_trials(monkeypatch, [0.3, 0.0, 0.03, 0.3])
    worker.work(made, record)
    assert states(record)[2] == "PRUNED"


def test_warm_up_stops_nothing_at_the_first_rungs(race_of, monkeypatch):
    made, record = race_of("a=1,2", pruner_args={"warm_up": 5})
    run_trials(monkeypatch, [0.0, 0.5])
    worker.work(made, record)
    assert states(record) == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(("args", "steps", "told"), [
    ({}, 50, "step 10"), ({}, 51, "step 20"), ({"spared": 0.4}, 50, "step 20"), ({"spared": 0.0}, 1000, "step 10"),
    ({"spared": 0.9, "warm_up": 1}, 22, "step 20"), ({"warm_up": 1}, 50, "step 20"),
])  # fmt: skip
def test_the_first_fifth_of_the_steps_stops_nothing(race_of, monkeypatch, args, steps, told):
    """A rung at a fifth of the steps is judged, and the first of those that are counts as the first."""
    made, record = race_of("a=1,2", pruner_args=args)
    levels = []
    monkeypatch.setattr(racing, "level", lambda alpha, rung, _: levels.append(rung) or alpha)
    run_trials(monkeypatch, [0.0, 0.5])
    told_by = experiment.execute

    def execute(run, folder, *more):
        write_json(folder / "trial.json", {"steps": steps})  # as a trial does before its first step
        return told_by(run, folder, *more)

    monkeypatch.setattr(experiment, "execute", execute)
    worker.work(made, record)
    assert study.counted(record)[1].user_attrs["ftexp:reason"].startswith(f"pruned at {told}:")
    assert set(levels) == {1}


@pytest.mark.parametrize(("spared", "steps", "rungs"), [(0.07, 100, 6), (0.2, 100, 19), (0.0, 100, 0)])
def test_a_rung_at_the_very_share_is_judged(spared, steps, rungs):
    assert spared * steps == pytest.approx(rungs + (1 if spared else 0))  # 0.07 * 100 is 7.000000000000001
    assert race.Race(spared=spared).passed(steps, 1) == rungs


@pytest.fixture
def halved(sweep, monkeypatch):  # noqa: F811
    """Trials that stand at each rung together, as in a pack: their shifts -> who goes on from each rung."""

    def run(shifts, steps=(10, 20, 40, 80), order=None, units=(), **args):
        made, record = sweep(f"a={','.join(map(str, range(len(shifts))))}", pruner=Pruner.halving, pruner_args=args)
        judges = {n: race.judge(made, study.claim(record), 10) for n in range(len(shifts))}
        left, kept = [*(order or range(len(shifts)))], []
        for step in steps:
            rungs = {}
            for n in left:
                rows = HARD + shifts[n] + np.random.default_rng(10 * n + step).normal(0, 0.05, ROWS)
                rungs[n] = Rung(float(rows.mean()), rows.tolist(), [1] * ROWS, units)
                judges[n].tell(rungs[n], step)
            left = [n for n in left if judges[n].ask(rungs[n], step) is None]
            kept.append(sorted(left))
        return kept

    return run


CLEAR = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
"""Two trials differ by 0.1 or more, where a paired test over 32 rows with noise of 0.05 sees 0.03."""


@pytest.mark.parametrize("order", [None, range(7, -1, -1), (3, 5, 1, 0, 7, 2, 6, 4)])
def test_halving_keeps_the_better_half_at_each_doubling_of_the_steps(halved, order):
    steps = (10, 20, 30, 40, 50, 80)
    kept = halved(CLEAR, steps, order)
    assert kept == [[0, 1, 2, 3], [0, 1], [0, 1], [0], [0], [0]]


def test_halving_by_four_goes_on_with_a_quarter(halved):
    kept = halved(CLEAR, (10, 20, 40, 80), reduction_factor=4)
    assert kept == [[0, 1], [0, 1], [0], [0]]


@pytest.mark.parametrize(("blind", "kept"), [(False, [4, 4, 4, 4]), (True, [4, 2, 1, 1])])
def test_halving_spares_whom_chance_may_explain(halved, monkeypatch, blind, kept):
    """Twin: where any difference counts, those of four equals go that the noise has put behind."""
    if blind:
        monkeypatch.setattr(racing, "behind", lambda *_: 0.0)
    assert [len(left) for left in halved([0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5])] == kept


@pytest.mark.parametrize(("shifts", "kept"), [([0.3], [[0], [0]]), ([0.0, 0.3, 0.4], [[0], [0]])])
def test_halving_of_few_keeps_one(halved, shifts, kept):
    assert halved(shifts, (10, 20)) == kept


def test_halving_reads_others_at_its_own_rungs_alone(halved, monkeypatch):
    steps, others = [], race.others
    monkeypatch.setattr(race, "others", lambda *given: steps.append(given[-1]) or others(*given))
    halved([0.0, 0.0], range(10, 100, 10))
    assert {*steps} == {10, 20, 40, 80}


def test_halving_by_three(halved):
    assert halved(CLEAR, (10, 20, 30, 90), reduction_factor=3) == [[0, 1], [0, 1], [0], [0]]


@pytest.mark.parametrize("bound", [None, 1.0, 0.1])
@pytest.mark.parametrize(
    ("shifts", "stopped"),
    [([0.3, 0.5, 0.0, 0.5, 0.6], {1: 10, 3: 10, 4: 10}), ([0.0, 0.5, 0.6, 0.2, 0.7], {1: 10, 2: 10, 3: 20, 4: 10})],
)
def test_halving_within_a_bound_counts_all_and_tests_against_who_keeps_it(
    sweep,  # noqa: F811
    monkeypatch,
    shifts,
    stopped,
    bound,
):
    """One by one; a bound that all keep changes nothing, who breaks one stops none.

    Of five the third is the new best. Of the others the fourth is in the better half at step 10, by those stopped there.
    """
    at_most, count = {} if bound is None else {"cost/memory_gib": bound}, len(shifts)
    made, record = sweep(f"a={','.join(map(str, range(count)))}", pruner=Pruner.halving, at_most=at_most)
    run_trials(monkeypatch, shifts, {n: {"cost/memory_gib": 0.5} for n in range(count)})
    worker.work(made, record)
    told = {n: t.user_attrs["ftexp:reason"] for n, t in enumerate(study.counted(record)) if t.state.name == "PRUNED"}
    at = {n: int(reason.split()[3].rstrip(":")) for n, reason in told.items()}
    assert at == (stopped if bound is None or bound > 0.5 else {})


def test_halving_takes_rows_of_one_document_for_one(halved):
    assert halved(CLEAR, (10,), units=[0] * ROWS) == [[*range(8)]]


def test_trial_that_breaks_a_bound_stops_nobody(race_of, monkeypatch):
    made, record = race_of("a=1,2,3", at_most={"cost/memory_gib": 1.0})
    memory = [9.0, 0.5, 0.5]
    run_trials(monkeypatch, [0.0, 0.5, 0.9], {n: {"cost/memory_gib": m} for n, m in enumerate(memory)})
    worker.work(made, record)
    assert states(record) == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert "trial 1 had" in study.counted(record)[2].user_attrs["ftexp:reason"]


def test_rows_of_one_document_are_one_row_of_the_test(race_of, monkeypatch):
    made, record = race_of("a=1,2")
    run_trials(monkeypatch, [0.0, 0.3], units=[0] * ROWS)
    worker.work(made, record)
    assert states(record) == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(
    "given", [[], ["trainer.engine=packed"], ["data=genres", "trainer=classify"], ["data=preference", "trainer=reward"],
              ["data=preference", "trainer=dpo"]],
)  # fmt: skip
def test_every_training_tells_the_units_of_its_rows(tiny, tmp_path, given):
    told = []
    run = tiny(*given, "data.rows=120", "trainer.steps=2", "trainer.report_steps=1", "eval.generate=false")
    experiment.execute(run, tmp_path / "run", "t", control=Control(judge=lambda rung, _: told.append(rung)))
    assert [list(rung.units) for rung in told] == [list(range(12))] * len(told) != []


def test_rung_before_a_kill_is_not_judged_again(race_of, monkeypatch):
    """What is left of it is the loss alone; its rows lie in the folder, for the others."""
    made, record = race_of("a=1,2")
    trial = study.claim(record)
    assert race.judge(made, trial, 10)(Rung(9.0), 10) is None
    assert not (made.folder / "0" / race.FOLDER).exists()


@pytest.mark.parametrize(
    ("args", "keys", "objectives", "rows", "told"),
    [
        ({"nope": 1}, [], ["valid/loss"], 99, "sweep.pruner_args.nope is not known to sweep.pruner=race, which takes alpha"),
        ({"alpha": 1.5}, [], ["valid/loss"], 99, "sweep.pruner_args.alpha must be above 0 and below 1, got 1.5"),
        ({"alpha": "x"}, [], ["valid/loss"], 99, "sweep.pruner_args.alpha must be a number, got 'x'"),
        ({}, [], ["valid/jaccard"], 99, r"needs objectives=\[valid/loss\], got valid/jaccard"),
        ({}, ["data.seed"], ["valid/loss"], 99, "the same held-out rows in all trials, so data.seed must be one value"),
        ({}, [], ["valid/loss"], 23, r"needs at least 24 independent held-out rows \(sweep.pruner_args.min_rows\), got 23"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pruner", race.RULES)
def test_sweep_that_cannot_be_raced_is_refused(pruner, args, keys, objectives, rows, told):
    with pytest.raises(ConfigError, match=told.replace("pruner=race", f"pruner={pruner.value}")):
        race.check(Options(pruner=pruner, pruner_args=args), keys, objectives, rows)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"spared": 0.1}, "sweep.pruner_args.spared is not known to sweep.pruner=halving, which takes alpha, reduction_f"),
        ({"reduction_factor": 1}, "sweep.pruner_args.reduction_factor must be a whole number of at least 2, got 1"),
        ({"reduction_factor": 2.5}, "sweep.pruner_args.reduction_factor must be a whole number of at least 2, got 2.5"),
        ({"every_rung": 0}, "sweep.pruner_args.every_rung must be true or false, got 0"),
        ({"alpha": True}, "sweep.pruner_args.alpha must be a number, got True"),
    ],
)  # fmt: skip
def test_keys_of_halving_are_checked(args, told):
    with pytest.raises(ConfigError, match=told):
        race.rule(Options(pruner=Pruner.halving, pruner_args=args))


@pytest.mark.parametrize(
    ("given", "keys", "told"),
    [
        ([[], []], {"replicates": 3}, "sweep.pruner=race needs sweep.replicates=1, got 3"),
        ([[], ["model=embedded"]], {}, "points 0 and 1 would be scored in tokens of different tokenizers; add"),
        ([["trainer=dpo", "data=preference"], []], {"pruner": Pruner.asha}, "points 0 and 1 would be scored by different trainer.kind"),
        ([["trainer=dpo", "data=preference"]] * 2 + [["trainer=dpo", "data=preference", "trainer.beta=0.7"]], {},
         "points 0 and 2 would be scored with different trainer.beta"),
        ([[], ["lora.r=2"], ["model.dtype=auto"]], {}, None),
    ],
)  # fmt: skip
def test_trials_whose_losses_are_not_alike_stop_none_another(tiny, given, keys, told):
    options, runs = Options(**{"pruner": Pruner.race} | keys), [tiny(*more) for more in given]
    if told is None:
        race.check_alike(options, runs)
        return
    with pytest.raises(ConfigError, match=told):
        race.check_alike(options, runs)


def test_a_sweep_of_unlike_losses_is_refused_with_any_pruner(cli):
    code, _, err = cli(*TINY, "track=none", "lora.r=2,4", "sweep.pruner=median", "sweep.replicates=2", "name=s", "-m")
    assert code == 2
    assert "sweep.pruner=median needs sweep.replicates=1" in err


def test_same_sweep_is_raced(race_of):
    race.check(Options(pruner=Pruner.race), ["lora.r"], ["valid/loss"], 24)


def test_sweep_of_a_model_is_raced_and_the_same_command_keeps_its_end(cli, tmp_path):
    """The last trial has a useless learning rate: every row says so at its first rung."""
    given = [*(t for t in UNWRITTEN if not t.startswith(("trainer.lr", "data.valid", "data.rows"))), "data.valid=24"]
    command = ("trainer.lr=2e-2,1e-2,1e-9", *given, "data.rows=140", "track=none", "name=s", "sweep.pruner=race",
               "eval=loss", "-m")  # fmt: skip
    code, _, err = cli(*command)
    assert code == 0, err
    last = tmp_path / "outputs/sweeps/s/2"
    told = read_json(last / "trial.json")
    assert told["state"] == "pruned"
    assert told["error"].startswith("pruned at step 2: valid/loss ")
    assert len(read_json(last / "rungs/2.json")["nats"]) == 24
    assert cli(*command)[0] == 0
    assert read_json(last / "trial.json") == told
