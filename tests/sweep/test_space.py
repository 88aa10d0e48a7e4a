import pytest

from ftexp.errors import ConfigError
from ftexp.sweep import space


@pytest.mark.parametrize(
    ("given", "points"),
    [
        (["lora.r=8,16,64"], [{"lora.r": "8"}, {"lora.r": "16"}, {"lora.r": "64"}]),
        (["lora.r=8,8,16"], [{"lora.r": "8"}, {"lora.r": "16"}]),
        (["lora.dropout=0,0.0,0.1,1e-1,-0.0"], [{"lora.dropout": "0"}, {"lora.dropout": "0.1"}]),
        (["trainer.lr=1e-3,0.001,0.0010,2e-3"], [{"trainer.lr": "0.001"}, {"trainer.lr": "0.002"}]),
        (
            ["trainer.extra.adam_beta1=0.9,0.90,1"],
            [{"trainer.extra.adam_beta1": "0.9"}, {"trainer.extra.adam_beta1": "1"}],
        ),
        (["a=1,1.0,true,'1',null"], [{"a": "1"}, {"a": "1.0"}, {"a": "True"}, {"a": "'1'"}, {"a": "null"}]),
        (["model.kind=tiny,'tiny'"], [{"model.kind": "tiny"}]),
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
        ("lora.r=interval(2.2,3.8)", "must hold two whole numbers or more"),
        ("lora.r=shuffle(2,4,8)", r"shuffle\(\) draws another order at each launch"),
        ("lora.r=shuffle(range(2,8))", r"shuffle\(\) draws another order at each launch"),
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


def test_condition_on_what_has_one_value_holds_or_drops_its_key():
    """`sweep=padding data.packing=none`: the command line fixes what a sweep's file searches."""
    keys, conditions = ["b=1,2", "c=3,4"], {"b": {"a": ["x", None]}, "c": {"b": 2}}
    assert space.parse(["a=x", *keys], conditions).grid() == [{"b": "1"}, {"b": "2", "c": "3"}, {"b": "2", "c": "4"}]
    assert space.parse(["a=null", *keys], conditions).grid() == space.parse(["a=x", *keys], conditions).grid()
    assert space.parse(["a=y", *keys], conditions).grid() == [{}]
    assert space.parse(["a=y", "b=2", "c=3,4"], {"c": {"b": 2}}).grid() == [{"c": "3"}, {"c": "4"}]


@pytest.mark.parametrize(
    ("given", "conditions"),
    [
        (["lora=default,dora", "lora.r=2,4", "lora=default"], {"lora.r": {"lora": "dorra"}}),
        (["lora.r=2,4", "lora=dora"], {"lora.r": {"lora": ["dora", "dorra"]}}),
        (["a=1,2", "b=3,4", "a=7"], {"b": {"a": 3}}),
        (["a=1,2", "b=3,4", "a=7"], {"b": {"a": []}}),
    ],
)
def test_condition_that_nothing_can_meet_is_refused_where_its_key_is_fixed_too(given, conditions):
    """The command line fixes what the file searches, or chooses of a group."""
    with pytest.raises(ConfigError, match=r"sweep\.params\.\S+\.when\.(a|lora) must be among"):
        space.parse(given, conditions)


def test_condition_on_a_group_without_a_choice_is_none_of_its_files():
    given = ["lora.r=2,4", "experiment=yoda_smollm2"]
    assert space.parse(given, {"lora.r": {"experiment": [None, "yoda_smollm2"]}}).grid() == [
        {"lora.r": "2"}, {"lora.r": "4"}
    ]  # fmt: skip


def test_condition_on_null_and_on_numbers_takes_them_as_they_are_written():
    searched = space.parse(["a=null,0.10", "b=1,2"], {"b": {"a": [None, 0.1]}})
    assert searched.axes[1].when == (("a", ("null", "0.1")),)
    with pytest.raises(ConfigError, match=r"when: lr must have single values, it has interval\(0.1, 0.2\)"):
        space.parse(["lr=interval(0.1,0.2)", "b=1,2"], {"b": {"lr": 0.1}})


def test_range_of_whole_numbers_stays_within_its_ends():
    (axis,) = space.parse(["lora.r=interval(2.5,4.5)"]).axes
    assert (axis.low, axis.high) == (3, 4)


@pytest.mark.parametrize("value", [4.5, None, True, [4], "4"])
def test_baseline_must_be_a_value_of_its_axis(value):
    with pytest.raises(ConfigError, match=r"sweep\.baselines: lora\.r must be among"):
        space.parse(["lora.r=interval(2,8)"]).baseline({"lora.r": value})


def test_baseline_of_lists_is_found_or_refused():
    searched = space.parse(["lora.targets=[q_proj],[q_proj,v_proj]"])
    assert searched.baseline({"lora.targets": ["q_proj", "v_proj"]}) == {"lora.targets": "[q_proj,v_proj]"}
    with pytest.raises(ConfigError, match=r"sweep\.baselines: lora\.targets must be among"):
        searched.baseline({"lora.targets": ["v_proj"]})


def test_endless_grid_is_refused_before_it_is_listed():
    with pytest.raises(ConfigError, match="at most 10000 points, got 1000000000 combinations"):
        space.parse([f"a{n}=range(0,1000)" for n in range(3)]).grid()


def test_range_between_whole_numbers_of_a_key_that_takes_any_number():
    decay, rank, extra = space.parse(
        ["trainer.weight_decay=interval(0,1)", "lora.r=interval(4,8)", "+trainer.extra.x=interval(1,3)"]
    ).axes
    assert (decay.whole, rank.whole, extra.whole) == (False, True, True)


@pytest.mark.parametrize(
    ("given", "ends", "whole"),
    [
        ("+trainer.extra.x=float(interval(0,1))", (0, 1), False),
        ("+trainer.extra.x=tag(log,float(interval(1,10)))", (1, 10), False),
        ("+trainer.extra.x=int(interval(0.0,10.0))", (0, 10), True),
        ("+trainer.extra.x=int(float(interval(0,10)))", (0, 10), True),
        ("+trainer.extra.x=float(int(interval(0,10)))", (0, 10), False),
        ("+trainer.extra.float=interval(0,10)", (0, 10), True),
        ("+trainer.extra.x=interval(0,1.5)", (0, 1.5), False),
        ("trainer.epochs=int(interval(1.0,4.0))", (1, 4), True),
        ("lora.r=float(interval(2,8))", (2, 8), True),
    ],
)
def test_cast_of_a_range_decides_about_its_numbers(given, ends, whole):
    (axis,) = space.parse([given]).axes
    assert ((axis.low, axis.high), axis.whole) == (ends, whole)


def points(*given, conditions=None):
    return [tuple(point.values()) for point in space.parse(list(given), conditions).grid()]


def test_keys_of_an_adapter_are_searched_where_there_is_one():
    assert points("lora.variant=none,lora", "lora.r=2,4") == [("none",), ("lora", "2"), ("lora", "4")]
    assert points("seed=1,2", "lora.r=2,4", "lora=none,dora")[:3] == [("none", "1"), ("none", "2"), ("dora", "1", "2")]
    assert points("lora=none,dora", "lora.train=[],[layers.1]", "lora.r=2,4")[-1] == ("dora", "[layers.1]", "4")
    assert len(points("lora=none,dora", "trainer.lr=1,2")) == 4
    assert len(points("lora=none", "lora.r=2,4")) == 2  # refused elsewhere: the key has no effect at all
    given = {"lora.r": {"trainer.lr": 1}}
    told = points("lora=none,dora", "trainer.lr=1,2", "lora.r=2,4", conditions=given)
    assert told == [("none", "1"), ("none", "2"), ("dora", "1", "2"), ("dora", "1", "4"), ("dora", "2")]
    narrower = {"lora.r": {"lora": "dora"}}
    assert len(points("lora=none,default,dora", "lora.r=2,4", conditions=narrower)) == 4


def test_a_sampler_draws_no_rank_without_an_adapter():
    searched = space.parse(["lora=none,default", "lora.r=interval(2,8)"])
    assert searched.trimmed({"lora": "none", "lora.r": 3}) == {"lora": "none"}
    assert searched.trimmed({"lora": "default", "lora.r": 3}) == {"lora": "default", "lora.r": 3}
