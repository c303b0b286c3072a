"""Constructors: arguments that are misspelt, missing or too many get one sentence with the right names."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Conv, Dense, Grid, Mix, Window, layouts
from attnkit.blocks import BlockConfig, BlockStyle
from attnkit.errors import ConfigError, LayoutError, ShapeError
from attnkit.options import field_types
from attnkit.primitives.base import PrimitiveOptions
from attnkit.registry import PRIMITIVES, STRUCTURES, load
from attnkit.testing import random_options

CLASSES = [load(target) for target in (*PRIMITIVES.values(), *STRUCTURES.values())]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.kind)


def good(cls):
    """Valid values for all fields that have no default."""
    mix = Mix([Dense(2)])
    stem = load(STRUCTURES["conv_norm"])(8, 3, 2)
    stage = load(STRUCTURES["stage"])(8, 1, mix)
    structures = {
        "mix": {"groups": [Dense(2)]},
        "block": {"mix": mix},
        "block_style": {},
        "conv_norm": {"dim": 8, "kernel": 3, "stride": 2},
        "stage": {"dim": 8, "depth": 1, "mix": mix},
        "pyramid": {"stem": [stem], "stages": [stage]},
        "isotropic": {"stem": [stem], "depth": 1, "mix": mix},
    }
    if cls.kind in structures:
        return structures[cls.kind]
    options = random_options(cls.kind)
    required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    return {name: getattr(options, name) for name in required}


def refused(cls, *args, **kwargs):
    with pytest.raises(cls._refusal) as caught:
        cls(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and caught.value.__cause__ is None and caught.value.__suppress_context__ is False
    assert caught.value.__context__ is None
    return text


@every_class
def test_a_misspelt_argument_names_the_right_one(cls):
    for field in field_types(cls):
        wrong = field[:-1] + "_" + field[-1]
        text = refused(cls, **{**good(cls), wrong: 1})
        assert f"unknown option {wrong!r} for {cls.__name__}; did you mean {field!r}? (options: " in text
        assert "is missing" not in text
    assert "(options: " in refused(cls, **good(cls), zzzzzz=1)
    assert "did you mean" not in refused(cls, **good(cls), zzzzzz=1)


@every_class
def test_a_misspelling_of_a_needed_argument_is_not_called_missing_too(cls):
    for name in good(cls):
        rest = {other: value for other, value in good(cls).items() if other != name}
        text = refused(cls, **rest, **{f"{name}_": good(cls)[name]})
        assert f"did you mean {name!r}?" in text and "missing" not in text


@every_class
def test_missing_arguments_are_all_named(cls):
    if good(cls):
        text = refused(cls)
        assert all(f"option {name!r} of {cls.__name__} is missing; it is" in text for name in good(cls))


@every_class
def test_too_many_arguments_by_position(cls):
    values = list(good(cls).values())
    assert isinstance(cls(*values), cls)
    text = refused(cls, *values, 1)
    assert text.startswith(f"{cls.__name__} takes ") and f"but got {len(values) + 1} by position" in text
    assert all(name in text for name in good(cls))


@every_class
def test_an_argument_given_twice(cls):
    if good(cls):
        first = next(iter(good(cls)))
        assert (
            refused(cls, *good(cls).values(), **{first: 1})
            == f"{cls.__name__} got {first!r} twice, by position and by name"
        )


def test_mistakes_in_the_values_come_with_those_in_the_names():
    text = refused(Window, 0, windw=7, partition="girds", lepe=2)
    for part in (
        "unknown option 'windw' for Window; did you mean 'window'?",
        "Window(heads=0): must be >= 1",
        "Window(lepe=2): must be odd",
        "Window(partition=...) must be one of 'plain', 'shifted', 'grid', but got 'girds'; did you mean 'grid'?",
    ):
        assert part in text
    text = refused(Mix, group=[Dense(2), 3], dim=0)
    assert "did you mean 'groups'?" in text and "Mix(dim=0): must be >= 1" in text and "groups=()" not in text


@given(data=st.data())
def test_whatever_is_passed_only_the_own_error_comes(data):
    cls = data.draw(st.sampled_from(CLASSES))
    value = st.one_of(st.integers(-2, 9), st.text(max_size=2), st.none(), st.just([Dense(2)]), st.just((3, "a")))
    names = st.sampled_from([*field_types(cls), "windw", "kind"])
    args = data.draw(st.lists(value, max_size=4))
    kwargs = data.draw(st.dictionaries(names, value, max_size=3))
    try:
        cls(*args, **kwargs)
    except ConfigError as error:
        assert str(error) and "\n" not in str(error)


def test_the_signature_is_the_constructors_own():
    assert list(inspect.signature(Window).parameters)[:2] == ["heads", "window"]
    assert list(inspect.signature(Grid).parameters) == ["sizes", "prefix", "height", "width"]


INDEX = torch.zeros(3, 2, dtype=torch.int64)
MASK = torch.ones(3, 4, dtype=torch.bool)

WRONG_NAMES = [
    (
        lambda: Grid(14, hight=3),
        "unknown option 'hight' for Grid; did you mean 'height'? (options: prefix, height, width)",
    ),
    (lambda: Grid(14, 14, prefx=1), "unknown option 'prefx' for Grid; did you mean 'prefix'?"),
    (layouts.Dense, "option 'queries' of Dense is missing"),
    (lambda: layouts.Dense(3, kays=4), "unknown option 'kays' for Dense; did you mean 'keys'?"),
    (lambda: layouts.Stencil(Grid(3), 3, 2), "Stencil takes grid, kernel by position and the others by name"),
    (lambda: layouts.Stencil(Grid(3), 3, dilatoin=2), "did you mean 'dilation'?"),
    (lambda: layouts.Stencil(kernel=3), "option 'grid' of Stencil is missing"),
    (layouts.Blocks, "option 'order' of Blocks is missing"),
    (lambda: layouts.TokenSets(INDEX, key=4), "did you mean 'keys'?"),
    (lambda: layouts.TokenSets(INDEX, 4, index=INDEX), "TokenSets got 'index' twice"),
    (lambda: layouts.TokenMask(MASK, MASK), "TokenMask takes mask by position and the others by name, but got 2"),
    (lambda: layouts.RelativeTable(torch.zeros(2, 3), grd=Grid(3)), "did you mean 'grid'?"),
]


@pytest.mark.parametrize(("make", "said"), WRONG_NAMES, ids=[said for _, said in WRONG_NAMES])
def test_grids_and_layouts(make, said):
    with pytest.raises((ShapeError, LayoutError)) as caught:
        make()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_grids_and_layouts_are_made_in_a_compiled_graph():
    def seen(x):
        grid = Grid(*x.shape[1:], prefix=1)
        made = [
            layouts.Dense(grid.tokens, keys=grid.tokens),
            layouts.Stencil(grid, 3, border="clamp"),
            layouts.Blocks.windows(grid, 2, shift=1),
            layouts.TokenSets(INDEX, keys=4, keys_all=1).restrict(x[0, 0] > 0),
            layouts.TokenMask(mask=x[0] > 0),
        ]
        table = layouts.RelativeTable(x.new_ones(1, 3, 3), grid)
        return [one.visible() for one in made], table.dense(grid.tokens)

    x = torch.randn(1, 3, 4)
    torch.testing.assert_close(torch.compile(seen, fullgraph=True, backend="eager")(x), seen(x))


def test_other_type_errors_stay():
    with pytest.raises(TypeError, match="abstract"):
        PrimitiveOptions(2)

    @dataclasses.dataclass(frozen=True)
    class Broken(BlockStyle):
        kind = "broken"

        def problems(self):
            raise TypeError("a fault of its own")

    with pytest.raises(TypeError, match="a fault of its own"):
        Broken()
    assert "unknown option 'norn'" in refused(Broken, norn="pre")


def test_classes_of_options_are_still_ordinary_ones():
    assert BlockConfig.from_dict({"mix": Mix([Conv(1)])}) == BlockConfig(Mix([Conv(1)]))
    assert dataclasses.replace(Window(2, 7), window=5) == Window(2, 5)
    with pytest.raises(ConfigError, match="did you mean 'window'"):
        dataclasses.replace(Window(2, 7), windw=5)
