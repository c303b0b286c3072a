"""Options: plain dicts there and back, and every mistake named with its path and the nearest right name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import pickle
import types
import typing
from typing import Literal, Union

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Conv, CrossShaped, Dense, MaskPredictor, Mix, RandomWindow, Window
from attnkit.annotations import described
from attnkit.blocks import BlockConfig
from attnkit.errors import ConfigError
from attnkit.options import Options, field_types
from attnkit.primitives import PrimitiveOptions
from attnkit.registry import PRIMITIVES, STRUCTURES, load, primitive_class
from attnkit.testing import random_options

# A small valid value for every option that has no default.
NEEDED = {"heads": 2, "window": 4, "kernel": 3, "stripe": 2, "pool": 2, "regions": 2, "topk": 1}
NEEDED |= {"tokens": 16, "keep": 0.5, "rank": 4}


def required(name):
    fields = dataclasses.fields(primitive_class(name))
    return {field.name: NEEDED[field.name] for field in fields if field.default is dataclasses.MISSING}


def values(annotation):
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return st.one_of([values(one) for one in inner])
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is tuple:
        return st.lists(st.integers(-1, 9), min_size=1, max_size=3).map(tuple)
    return {
        int: st.integers(-2, 64),
        float: st.floats(-0.5, 2.0) | st.integers(0, 2),
        bool: st.booleans(),
        type(None): st.none(),
    }[annotation]


@st.composite
def accepted(draw):
    """Options of any primitive; fields that do not go together are left at their defaults."""
    name = draw(st.sampled_from(sorted(PRIMITIVES)))
    cls, chosen = primitive_class(name), required(name)
    for field, annotation in field_types(cls).items():
        tried = {**chosen, field: draw(values(annotation))}
        try:
            cls(**tried)
        except ConfigError:
            continue
        chosen = tried
    return cls(**chosen)


@given(options=accepted(), full=st.booleans())
def test_a_dict_makes_the_same_options(options, full):
    plain = options.to_dict(full=full)
    assert next(iter(plain)) == "kind" and plain["kind"] == options.kind
    assert type(options).from_dict(plain) == options
    assert type(options).from_dict(json.loads(json.dumps(plain))) == options
    named = {field.name for field in dataclasses.fields(options)}
    if full:
        assert set(plain) == {"kind", *named}
    else:
        defaults = {one.name for one in dataclasses.fields(options) if getattr(options, one.name) == one.default}
        assert set(plain) == {"kind", *named} - defaults


@given(options=accepted())
def test_options_are_values(options):
    for other in (pickle.loads(pickle.dumps(options)), copy.deepcopy(options), dataclasses.replace(options)):
        assert other == options and hash(other) == hash(options)


@pytest.mark.parametrize("name", sorted(PRIMITIVES))
def test_first_arguments_come_by_position_and_the_rest_by_keyword(name):
    cls = primitive_class(name)
    parameters = list(inspect.signature(cls).parameters.values())
    positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert positional == list(required(name)) and positional[0] == "heads"
    assert all(one.kind is one.KEYWORD_ONLY for one in parameters[len(positional) :])
    options = cls(*required(name).values())
    assert options == cls(**required(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.heads = 3
    assert cls.kind == name and load(PRIMITIVES[name]) is cls


@pytest.mark.parametrize("name", sorted(PRIMITIVES))
def test_random_options_are_accepted_and_survive(name):
    for seed in range(10):
        options = random_options(name, seed=seed)
        assert options == random_options(name, seed=seed)
        assert type(options).from_dict(options.to_dict(full=True)) == options


def misspellings(field, others):
    """The name without each of its letters, with each pair of neighbours swapped, and with one letter more."""
    found = {field[:at] + field[at + 1 :] for at in range(len(field))}
    found |= {field[:at] + field[at + 1] + field[at] + field[at + 2 :] for at in range(len(field) - 1)}
    found |= {f"{field}s", f"_{field}"}
    return sorted(found - {"", *others})


@pytest.mark.parametrize("name", sorted(PRIMITIVES))
def test_a_misspelt_option_names_the_right_one(name):
    cls = primitive_class(name)
    known = field_types(cls)
    full = cls(**required(name)).to_dict(full=True)
    for field in known:
        for wrong in misspellings(field, known):
            plain = {key: value for key, value in full.items() if key != field}
            with pytest.raises(ConfigError) as caught:
                Options.from_dict({**plain, wrong: full[field]})
            text = str(caught.value)
            assert f"unknown option {wrong!r} for {name!r}; did you mean {field!r}?" in text
            assert "is missing" not in text
            assert "\n" not in text


def test_all_mistakes_come_together_with_their_paths():
    plain = {
        "kind": "block",
        "dim": 0,
        "norm": "pree",
        "mix": {
            "kind": "mix",
            "groups": [
                {"kind": "random_window", "heads": 2, "windw": 49},
                {"kind": "conv", "heads": "two"},
                {"kind": "dens", "heads": 1},
                {"kind": "topk_region", "heads": 2, "regions": 0, "topk": -1},
                {"heads": 2},
                {"kind": "pooled_global", "heads": 2},
            ],
        },
    }
    with pytest.raises(ConfigError) as caught:
        BlockConfig.from_dict(plain)
    text = str(caught.value)
    for part in (
        "norm must be one of 'pre', 'post', but got 'pree'; did you mean 'pre'?",
        "mix.groups[0]: unknown option 'windw' for 'random_window'; did you mean 'window'?",
        "mix.groups[1].heads must be an integer, but got 'two'",
        "mix.groups[2]: unknown primitive 'dens'; did you mean 'dense'?",
        "mix.groups[3].regions=0: must be >= 1",
        "mix.groups[3].topk=-1: must be >= 1",
        "dim=0: must be >= 1",
        "mix.groups[4]: 'kind' is missing",
        "mix.groups[5]: option 'pool' of 'pooled_global' is missing; it is an integer",
    ):
        assert part in text
    assert "\n" not in text


def test_a_path_from_outside_stands_before_every_mistake():
    with pytest.raises(ConfigError) as caught:
        Mix.from_dict({"groups": [{"kind": "conv", "heads": 1, "kernal": 3}]}, path="stages[1].mix")
    assert str(caught.value).startswith("stages[1].mix.groups[0]: unknown option 'kernal'")


def nested(levels):
    """A list of a list of a list."""
    return functools.reduce(lambda inner, _: [inner], range(levels), 1)


WRONG_TYPES = [
    (lambda: Dense(heads="4"), "Dense(heads=...) must be an integer, but got '4'"),
    (lambda: Dense(heads=2.0), "Dense(heads=...) must be an integer, but got 2.0"),
    (lambda: Dense(heads=True), "Dense(heads=...) must be an integer, but got True"),
    (lambda: Dense(heads=None), "Dense(heads=...) must be an integer, but got None"),
    (lambda: Conv(2, pointwise=1), "Conv(pointwise=...) must be true or false, but got 1"),
    (lambda: Window(2, (7, "7")), "Window(window[1]=...) must be an integer, but got '7'"),
    (lambda: MaskPredictor(2, 16, "half"), "MaskPredictor(keep=...) must be a number, but got 'half'"),
    (lambda: Dense(2, scale="heads"), "but got 'heads'; did you mean 'head'?"),
    (lambda: Window(2, 7, partition="shift"), "'shifted', 'grid', but got 'shift'; did you mean 'shifted'?"),
    (lambda: Mix(Dense(2)), "Mix(groups=...) must be a list of primitive options, but got Dense"),
    (lambda: Mix((Dense(2), 3)), "Mix(groups[1]=...) must be primitive options, but got 3"),
    (lambda: Dense(10**30), f"Dense(heads=...) must be an integer, but got {10**30}"),
    (lambda: Dense(2, scale=10**400), "Dense(scale=...) must be a number or one of 'head', 'group', but got 1000000"),
    (lambda: Window(2, nested(100_000)), "but got a tuple nested without end"),
    (lambda: Dense.from_dict({"heads": nested(100_000)}), "must be an integer, but got a list nested without end"),
    (lambda: Dense.from_dict({"kind": nested(100_000)}), "is a name such as 'dense', but got a list nested without"),
]

WRONG_RANGES = [
    (lambda: Dense(0), "Dense(heads=0): must be >= 1"),
    (lambda: Dense(-3), "Dense(heads=-3): must be >= 1"),
    (lambda: Dense(2**31), "Dense(heads=2147483648): must be <= 2147483647"),
    (lambda: Conv(2, kernel=2**31 + 1), "Conv(kernel=2147483649): must be <= 2147483647"),
    (lambda: CrossShaped(3, 2), "CrossShaped(heads=3): must be even"),
    (lambda: Conv(2, kernel=4), "Conv(kernel=4): must be odd"),
    (lambda: Conv(2, stride=0), "Conv(stride=0): must be >= 1"),
    (lambda: RandomWindow(2, 0), "RandomWindow(window=0): must be >= 1"),
    (lambda: RandomWindow(2, 4, seed=-1), "RandomWindow(seed=-1): must be >= 0"),
    (lambda: Window(2, (3, 0)), "Window(window=0): must be >= 1"),
    (lambda: Window(2, 4, partition="grid", relative_bias=True), "Window(relative_bias=True): a grid partition"),
    (lambda: MaskPredictor(2, 16, 0.0), "MaskPredictor(keep=0.0): must be a share in (0, 1]"),
    (lambda: MaskPredictor(2, 16, 1.5), "MaskPredictor(keep=1.5): must be a share in (0, 1]"),
    (lambda: Dense(2, scale=0.0), "Dense(scale=0.0): must be a finite number > 0"),
    (lambda: Dense(2, scale=float("nan")), "Dense(scale=nan): must be a finite number > 0"),
    (lambda: Dense(2, lepe=2), "Dense(lepe=2): must be odd"),
    (lambda: RandomWindow(0, 0), "RandomWindow(heads=0): must be >= 1; RandomWindow(window=0): must be >= 1"),
]


@pytest.mark.parametrize("make, said", [*WRONG_TYPES, *WRONG_RANGES], ids=lambda one: one if callable(one) else None)
def test_wrong_values(make, said):
    with pytest.raises(ConfigError) as caught:
        make()
    assert said in str(caught.value)


@pytest.mark.parametrize("name", sorted(PRIMITIVES))
def test_every_option_of_a_wrong_type_is_refused_by_name(name):
    cls = primitive_class(name)
    for field in field_types(cls):
        for wrong in (object(), {"a": 1}, b"3"):
            with pytest.raises(ConfigError) as caught:
                cls(**{**required(name), field: wrong})
            assert f"{cls.__name__}({field}=...) must be" in str(caught.value) and repr(wrong) in str(caught.value)


@pytest.mark.parametrize("name", sorted(PRIMITIVES))
def test_a_missing_option_is_named(name):
    cls = primitive_class(name)
    for field in required(name):
        plain = {key: value for key, value in required(name).items() if key != field}
        with pytest.raises(ConfigError, match=f"option '{field}' of '{name}' is missing"):
            cls.from_dict(plain)


def test_kinds_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"kind 'conv' does not fit here; Dense is expected"):
        Dense.from_dict({"kind": "conv", "heads": 2})
    with pytest.raises(ConfigError, match=r"groups\[0\]: kind 'mix' does not fit here"):
        Mix.from_dict({"groups": [{"kind": "mix", "groups": []}]})
    with pytest.raises(ConfigError, match="'kind' is missing"):
        Options.from_dict({"heads": 2})
    with pytest.raises(ConfigError, match=r"groups\[0\].*'hello'|groups must be"):
        Mix.from_dict({"groups": ["hello"]})


@pytest.mark.parametrize("kind", [3, None, ["dense"], {"a": 1}, "", "a" * 10_000])
def test_a_kind_that_is_no_name(kind):
    for base in (Options, PrimitiveOptions):
        with pytest.raises(ConfigError) as caught:
            base.from_dict({"kind": kind, "heads": 2})
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("plain", [None, 3, "dense", [("heads", 2)], Dense(2)])
def test_what_is_no_dict_is_refused(plain):
    with pytest.raises(ConfigError, match=r"stages\[0\]: options come as a dict .*but got"):
        Dense.from_dict(plain, path="stages[0]")


def test_lists_become_tuples():
    options = Window.from_dict({"heads": 2, "window": [7, 5]})
    assert options == Window(2, (7, 5)) and options.window == (7, 5)
    assert options.to_dict()["window"] == [7, 5]
    assert Mix([Dense(2)]) == Mix((Dense(2),))


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_structures_know_their_kind(name):
    assert load(STRUCTURES[name]).kind == name


def test_an_unknown_option_hides_no_other_mistake():
    plain = {"kind": "random_window", "heads": 0, "windw": 7, "seed": "a", "lepe": 2, "resample": True}
    with pytest.raises(ConfigError) as caught:
        Mix.from_dict({"groups": [plain, {"kind": "conv", "heads": 1}, 3], "dim": 0})
    assert str(caught.value).split("; ")[2:] == [
        "groups[0].seed must be an integer, but got 'a'",
        "groups[0].resample must be an integer, but got True",
        "groups[0].heads=0: must be >= 1",
        "groups[0].lepe=2: must be odd and >= 1, such as 3, 5 or 7",
        "groups[2] must be primitive options, but got 3",
        "dim=0: must be >= 1",
    ]


def test_a_missing_or_mistyped_option_hides_no_other_mistake():
    text = "topk=-1: must be >= 1"
    for plain in ({"heads": 2, "topk": -1}, {"heads": 2, "regions": "7", "topk": -1}):
        with pytest.raises(ConfigError) as caught:
            Options.from_dict({"kind": "topk_region", **plain})
        assert "regions" in str(caught.value) and text in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"\(heads=\.\.\.\) must be an integer, .*TopKRegion\(topk=-1\): must be >= 1"
    ):
        primitive_class("topk_region")("2", 7, -1)


def test_nothing_is_held_against_the_other_values_of_a_mistake():
    with pytest.raises(ConfigError) as caught:
        CrossShaped.from_dict({"heads": "4", "stripe": 2})
    assert str(caught.value) == "heads must be an integer, but got '4'"
    stem = {"dim": 8, "kernel": 3, "stride": 2}
    plain = {"kind": "isotropic", "stem": [stem], "depth": 0, "mix": {"groups": [Dense(2)]}, "out_indices": [0]}
    with pytest.raises(ConfigError, match=r"out_indices=\(0,\): goes with features_only=True.*depth=0"):
        Options.from_dict(plain)
    with pytest.raises(ConfigError, match=r"did you mean 'features_only'.*depth=0") as caught:
        Options.from_dict({**plain, "featurs_only": True})
    assert "out_indices=" not in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int | None, "an integer or None"),
        (int | tuple[int, ...], "an integer or a list of integers"),
        (tuple[int, int], "a list of 2 integers"),
        (tuple[float, ...] | str, "a list of numbers or a string"),
        (tuple[PrimitiveOptions, ...], "a list of primitive options"),
        (Mix | None, "Mix options or None"),
        (Literal["a", "b"], "one of 'a', 'b'"),
        (bool, "true or false"),
    ],
)
def test_types_in_words(annotation, text):
    assert described(annotation) == text


def test_long_values_are_cut_and_stay_in_one_line():
    many = [Dense(2)] * 40
    for wrong in (torch.zeros(40, 40), torch.nn.Sequential(*[torch.nn.Linear(2, 2)] * 9), many, {"a": many}):
        with pytest.raises(ConfigError) as caught:
            Dense(heads=wrong)
        text = str(caught.value)
        assert len(text) < 200 and "\n" not in text
    with pytest.raises(ConfigError, match=r"but got torch\.float32 \(40, 40\)$"):
        Dense(heads=torch.zeros(40, 40))
    with pytest.raises(ConfigError, match=r"^Mix\(groups\[40\]=\.\.\.\) must be primitive options, but got 1$"):
        Mix([*many, 1])
