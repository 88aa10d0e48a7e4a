"""Every YAML file of `conf/` and `sweeps/` composes into a checked run; a new file is tested without writing a test."""

import pytest
from conftest import TINY
from hydra import compose, initialize_config_dir

from ftexp import config, overrides
from ftexp.sweep import plugin
from ftexp.sweep.options import BY_ROWS

CHOICES = [f"{p.parent.name}={p.stem}" for p in sorted(overrides.CONF.glob("*/*.yaml"))]
NEEDED = {
    "model=hub": ["model.path=org/model"],
    "data=hub": ["data.path=org/rows"],
    **{f"data={kind.value}": ["data.path=rows.jsonl"] for kind in config.FILES},
    "quant=nf4": ["model=embedded"],
    "lora=loftq": ["quant=nf4"],
    "model=run": ["model.path=a-run"],
    "trainer=rloo": ["trainer.reward=a-run"],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_file_of_a_group_is_valid(composed, choice):
    composed(choice, *NEEDED.get(choice, []))


SWEEPS = sorted(p.stem for p in overrides.SWEEPS.glob("*.yaml"))


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_is_valid_and_says_its_question_and_command(name, tmp_path, monkeypatch, composed):
    """Everything up to the launch, with the launch itself left out."""
    from ftexp import run

    question, command = (overrides.SWEEPS / f"{name}.yaml").read_text().splitlines()[:2]
    assert question.endswith("?")
    assert command == f"# python -m ftexp.run sweep={name}"
    launched = []
    monkeypatch.setattr(
        plugin, "launch", lambda folder, searched, options, runs, *rest: launched.append((searched, options))
    )
    text = (overrides.SWEEPS / f"{name}.yaml").read_text()
    small = [given for given in TINY if f"{given.split('=')[0]}:" not in text]  # what is asked stays
    whole = "nf4" in text or "layers.2" in text  # the tiny model has no stored weights, and two layers
    small = [given for given in small if not whole or given != "model=tiny"]
    small += ["data.valid=24"] * any(f"pruner: {p.value}" in text for p in BY_ROWS)  # the fewest that they take
    monkeypatch.setattr("sys.argv", ["ftexp.run", f"sweep={name}", *small, "track=none"])
    monkeypatch.chdir(tmp_path)
    assert run.main() == 0
    searched, options = launched[0]
    assert options.n_trials is not None or searched.axes or options.replicates > 1


def test_command_line_wins_over_a_sweeps_file(tmp_path, monkeypatch, composed):
    from ftexp import run

    launched = []
    monkeypatch.setattr(plugin, "launch", lambda folder, searched, *rest: launched.append(searched))
    monkeypatch.setattr("sys.argv", ["ftexp.run", "sweep=rank", "lora.r=3,5", *TINY, "track=none"])
    monkeypatch.chdir(tmp_path)
    assert run.main() == 0
    assert launched[0].told() == {"lora.r": "3,5"}


def test_default_is_valid(composed):
    run = composed()
    assert run.objectives == ["valid/loss"]


@pytest.mark.parametrize("path", sorted(overrides.CONF.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_file_of_a_group_says_only_what_differs(path):
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    most = 45 if path.parent.name == "experiment" else 20  # a recipe says every value of its source
    assert 1 <= len(lines) <= most


def test_the_demo_is_an_experiment(composed):
    assert config.digest(composed("experiment=yoda_smollm2")) == config.digest(composed())


def test_data_of_ones_own_takes_the_general_trainer(composed):
    trainer = composed("data=jsonl", "data.path=x").trainer
    assert (trainer.lr, trainer.steps, trainer.epochs) == (2e-4, None, 1.0)
    assert composed("trainer=default").trainer.lr == 2e-4


def test_no_file_names_code():
    for path in overrides.CONF.rglob("*.yaml"):
        assert "_target_" not in path.read_text()


def test_folders_are_where_the_readme_says():
    config.register()
    plugin.register()
    with initialize_config_dir(str(overrides.CONF), **overrides.BASE):
        cfg = compose("config", ["name=x"], return_hydra_config=True)
    assert cfg.hydra.run.dir == "outputs/runs/x"
    assert cfg.hydra.sweep.dir == "outputs/sweeps/x"
