"""A sweep as it was launched: points become the configs Hydra would have composed, and edits do not reach them."""

from dataclasses import replace
from itertools import product

import pytest
from conftest import UNWRITTEN
from omegaconf import OmegaConf

from ftexp import config
from ftexp.errors import ConfigError, MachineError
from ftexp.sweep import frozen, space
from ftexp.sweep.options import Options, Sampler


@pytest.fixture
def freeze(tmp_path, composed):
    """Freeze a space over the tiny model, composing as the command line does."""
    from hydra import compose, initialize_config_dir

    from ftexp import overrides

    composed()

    def hydra(point):
        with initialize_config_dir(str(overrides.CONF), **overrides.BASE):
            return compose("config", ["model=tiny", *point])

    def make(*given, **options):
        searched = space.parse(given)
        frozen.freeze(tmp_path, searched, searched.grid() if not options else frozen.corners(searched), hydra)
        sweep = frozen.Frozen(tmp_path, "s", searched, Options(**options), ["valid/loss"], "run", "uri", {"a": "b"})
        sweep.save()
        return sweep

    return make


def test_every_point_is_what_hydra_composes(freeze, composed):
    sweep = freeze("lora=default,rslora", "lora.r=4,8", "trainer.lr=1e-3", "lora.targets=[q_proj],[q_proj,v_proj]")
    for point in sweep.space.grid():
        expected = composed("model=tiny", *sweep.space.point(point))
        assert config.digest(sweep.run(point, 0)) == config.digest(expected), point


def test_alpha_follows_a_drawn_rank(freeze):
    sweep = freeze("lora.r=interval(4,64)", sampler=Sampler.tpe, n_trials=3)
    assert sweep.run({"lora.r": 13}, 0).lora.alpha == 26


def test_replicates_count_the_seed_up(freeze):
    sweep = freeze("lora.r=4", "seed=7")
    assert [sweep.run({}, n).seed for n in range(3)] == [7, 8, 9]


def test_sweep_is_read_back_as_it_was_saved(freeze, tmp_path):
    sweep = freeze("lora.r=4,8", "trainer.lr=tag(log,interval(1e-4,1e-2))", sampler=Sampler.tpe, n_trials=3)
    again = frozen.load(tmp_path)
    assert again == sweep
    assert again.options == sweep.options


def test_edit_after_the_launch_reaches_no_point(freeze, tmp_path):
    sweep = freeze("lora.r=4,8")
    before = config.digest(sweep.run({"lora.r": "4"}, 0))
    freeze("lora.r=4,8", "trainer.lr=0.5")  # the same folder, another config
    assert config.digest(frozen.load(tmp_path).run({"lora.r": "4"}, 0)) == before


def test_value_out_of_range_is_refused(freeze):
    with pytest.raises(ConfigError, match=r"lora\.r must be a rank"):
        freeze("lora.r=4,8").run({"lora.r": "0"}, 0)


def test_corners_show_every_value_and_both_ends():
    searched = space.parse(["lora=default,dora", "lora.r=4,8,16", "trainer.lr=interval(0.1,0.2)"])
    points = frozen.corners(searched)
    assert {p["lora.r"] for p in points} == {"4", "8", "16"}
    assert {p["trainer.lr"] for p in points} == {0.1, 0.2}
    assert {p["lora"] for p in points} == {"default", "dora"}


def test_corners_show_conditional_axes_with_what_they_depend_on():
    searched = space.parse(["lora=default,dora", "lora.r=2,4"], {"lora.r": {"lora": "dora"}})
    points = frozen.corners(searched)
    assert {"lora": "default"} in points
    assert {p["lora.r"] for p in points if p["lora"] == "dora"} == {"2", "4"}


def test_conditional_axis_survives_the_file(tmp_path):
    searched = space.parse(["lora=default,dora", "lora.r=2,4"], {"lora.r": {"lora": "dora"}})
    sweep = frozen.Frozen(tmp_path, "s", searched, Options(), ["valid/loss"], None, "", {}, 5, "abc")
    sweep.save()
    assert frozen.load(tmp_path) == sweep


def test_folder_without_a_sweep_is_named(tmp_path):
    with pytest.raises(MachineError, match="must be the folder of a sweep"):
        frozen.load(tmp_path)


def test_absurd_grid_is_refused():
    with pytest.raises(ConfigError, match="at most 10000 points, got 10001"):
        frozen.check_limit(10001)


def test_frozen_files_hold_no_code(freeze, tmp_path):
    freeze("lora.r=4,8")
    for path in (tmp_path / "frozen").glob("*.yaml"):
        assert "_target_" not in path.read_text()
        assert "hydra" not in OmegaConf.load(path)


def test_every_combination_of_groups_that_a_search_may_draw_is_frozen(freeze):
    """`eval` is searched under one scheduler alone: its values must be frozen with each `lora` all the same."""
    given = ["trainer.scheduler=linear,cosine", "lora=default,rslora", "eval=loss,default"]
    axes = space.parse(given).axes
    axes = (*axes[:2], replace(axes[2], when=(("trainer.scheduler", ("cosine",)),)))
    made = space.Space((), axes)
    wanted = {frozen.variant(made, made.trimmed(dict(zip([a.key for a in axes], point, strict=True))))
              for point in product(*(a.texts for a in axes))}  # fmt: skip
    assert {frozen.variant(made, point) for point in frozen.corners(made)} == wanted


def test_values_behind_a_chain_of_conditions_are_checked():
    axes = space.parse(["lora.r=2,4", "lora.alpha=8,16", "trainer.lr=0.1,0.2"]).axes
    chain = (axes[0], replace(axes[1], when=(("lora.r", ("4",)),)), replace(axes[2], when=(("lora.alpha", ("16",)),)))
    points = frozen.corners(space.Space((), chain))
    assert {"lora.r": "4", "lora.alpha": "16", "trainer.lr": "0.2"} in points


@pytest.mark.parametrize("held", ["[1]", "a: [", "7"])
def test_frozen_config_of_another_shape_is_named_by_a_second_launch(cli, tmp_path, held):
    given = [*UNWRITTEN, "track=none", "eval=loss", "name=s", "lora.r=2,4", "-m"]
    assert cli(*given)[0] == 0
    (path,) = (tmp_path / "outputs/sweeps/s/frozen").glob("*.yaml")
    path.write_text(held)
    code, _, err = cli(*given)
    assert (code, err.count("\n")) == (4, 1), err
    assert err.startswith(f"ftexp: {path}: is damaged, it must be a config as it was frozen")
