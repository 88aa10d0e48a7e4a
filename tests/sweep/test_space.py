import pytest

from ftexp.errors import ConfigError
from ftexp.sweep import space


@pytest.mark.parametrize(
    ("given", "points"),
    [
        (["lora.r=8,16,64"], [["lora.r=8"], ["lora.r=16"], ["lora.r=64"]]),
        (["lora.r=8,8,16"], [["lora.r=8"], ["lora.r=16"]]),
        (["a=1,2", "b=x,y"], [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]),
        (["a=choice(1,2)"], [["a=1"], ["a=2"]]),
        (["a=range(1,4)"], [["a=1"], ["a=2"], ["a=3"]]),
        (["a=[q],[q,k]"], [["a=[q]"], ["a=[q,k]"]]),
        (["a='x,y'"], [["a='x,y'"]]),
        ([], [[]]),
    ],
)
def test_grid_is_every_combination_once(given, points):
    assert space.grid(given) == points


def test_continuous_range_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.lr=.*a grid needs single values"):
        space.grid(["trainer.lr=interval(1e-4,1e-2)"])


def test_labels_show_what_differs():
    points = space.grid(["lora.r=8,16", "trainer.lr=1e-3,2e-3", "seed=0"])
    assert space.swept(points)[1] == "lora.r=8 trainer.lr=0.002"
    assert space.swept([["lora.r=8", "seed=0"]]) == ["lora.r=8 seed=0"]
