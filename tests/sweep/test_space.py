import pytest

from ftexp.errors import ConfigError
from ftexp.sweep import space


@pytest.mark.parametrize(
    ("given", "points"),
    [
        (["lora.r=8,16,64"], [{"lora.r": "8"}, {"lora.r": "16"}, {"lora.r": "64"}]),
        (["lora.r=8,8,16"], [{"lora.r": "8"}, {"lora.r": "16"}]),
        (["a=1,2", "b=x,y"], [{"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "2", "b": "x"}, {"a": "2", "b": "y"}]),
        (["a=choice(1,2)"], [{"a": "1"}, {"a": "2"}]),
        (["a=range(1,4)"], [{"a": "1"}, {"a": "2"}, {"a": "3"}]),
        (["a=[q],[q,k]"], [{"a": "[q]"}, {"a": "[q,k]"}]),
        (["a='x,y'"], [{}]),
        (["a=1,2", "a=3,4"], [{"a": "3"}, {"a": "4"}]),
    ],
)
def test_grid_is_every_combination_once(given, points):
    assert space.parse(given).grid() == points


def test_fixed_overrides_come_along_as_given():
    searched = space.parse(["lora.r=8,16", "seed=0", "data.prompt='{a} {b}'"])
    assert searched.point({"lora.r": "8"}) == ["lora.r=8", "seed=0", "data.prompt='{a} {b}'"]


def test_continuous_axes_keep_ends_kind_and_scale():
    from optuna.distributions import FloatDistribution, IntDistribution

    searched = space.parse(["lr=tag(log,interval(1e-5,1e-3))", "r=interval(4,64)", "n=interval(0.0,15.0)"])
    distributions = [axis.distribution() for axis in searched.axes]
    assert distributions == [FloatDistribution(1e-5, 1e-3, log=True), IntDistribution(4, 64), FloatDistribution(0, 15)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lr=interval(1,1)", "the lower end must be below the upper"),
        ("lr=tag(log,interval(0,1))", "a log range must be above 0"),
    ],
)
def test_impossible_range_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        space.parse([given])


def test_continuous_range_is_no_grid():
    with pytest.raises(ConfigError, match=r"trainer\.lr: a grid needs single values.*sweep\.sampler=tpe"):
        space.parse(["trainer.lr=interval(1e-4,1e-2)"]).grid()


DEPENDENT = (["lora=default,rslora,dora", "lora.alpha=16,32", "lora.r=2,4"], {"lora.alpha": {"lora": ["default", "dora"]},
             "lora.r": {"lora": "dora", "lora.alpha": 32}})  # fmt: skip


def test_conditional_axis_is_searched_only_where_its_condition_holds():
    assert space.parse(*DEPENDENT).grid() == [
        {"lora": "default", "lora.alpha": "16"},
        {"lora": "default", "lora.alpha": "32"},
        {"lora": "rslora"},
        {"lora": "dora", "lora.alpha": "16"},
        {"lora": "dora", "lora.alpha": "32", "lora.r": "2"},
        {"lora": "dora", "lora.alpha": "32", "lora.r": "4"},
    ]


def test_overrides_of_a_point_leave_out_what_is_not_searched_there():
    assert space.parse(*DEPENDENT).point({"lora": "rslora"}) == ["lora=rslora"]


def test_condition_is_part_of_what_a_sweep_is():
    assert space.parse(*DEPENDENT).told()["lora.r"] == "2,4 when lora is dora and lora.alpha is 32"


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"lora.r": {"seed": 0}}, r"sweep\.params\.lora\.r\.when: seed must be searched, in a line before lora\.r"),
        ({"lora": {"lora.r": 2}}, r"lora\.r must be searched, in a line before lora"),
        ({"lora.r": {"lora": "dra"}}, r"when\.lora must be among default,rslora,dora, got 'dra'"),
        ({"lora.r": {"lora": []}}, r"when\.lora must be among"),
    ],
)
def test_condition_on_what_is_not_searched_before_is_refused(conditions, message):
    with pytest.raises(ConfigError, match=message):
        space.parse(DEPENDENT[0], conditions)


def test_endless_grid_is_refused_before_it_is_listed():
    with pytest.raises(ConfigError, match="at most 10000 points, got 1000000000 combinations"):
        space.parse([f"a{n}=range(0,1000)" for n in range(3)]).grid()


def test_range_between_whole_numbers_of_a_key_that_takes_any_number():
    decay, rank, extra = space.parse(
        ["trainer.weight_decay=interval(0,1)", "lora.r=interval(4,8)", "+trainer.extra.x=interval(1,3)"]
    ).axes
    assert (decay.whole, rank.whole, extra.whole) == (False, True, True)
