"""The error family and what helps to write its sentences."""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch

from attnkit import errors
from attnkit.errors import AttnkitError, MissingExtraError, did_you_mean, listing, load_extra, shown


@pytest.mark.parametrize(
    "name",
    [
        "ConfigError",
        "ShapeError",
        "PrimitiveError",
        "LayoutError",
        "BackendError",
        "DataError",
        "CheckpointError",
        "MissingExtraError",
    ],
)
def test_one_family(name):
    kind = getattr(errors, name)
    assert issubclass(kind, AttnkitError)
    assert issubclass(kind, ValueError)
    assert kind.__doc__


def test_a_missing_extra_is_an_import_error_too():
    assert issubclass(MissingExtraError, ImportError)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("windw", "; did you mean 'window'?"), ("dense", "; did you mean 'dense'?"), ("zzzz", ""), (3, ""), (None, "")],
)
def test_the_nearest_name(name, hint):
    assert did_you_mean(name, ["window", "dense", "random_window"]) == hint


def test_listing():
    assert listing(["a", "b"]) == "'a', 'b'"
    assert listing([]) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "'a'"),
        (torch.zeros(2, 3), "torch.float32 (2, 3)"),
        (torch.tensor(3), "tensor(3)"),
        (torch.nn.Parameter(torch.zeros(2)), "Parameter torch.float32 (2,)"),
        (torch.nn.Sequential(torch.nn.ReLU()), "Sequential( (0): ReLU() )"),
        ("a" * 200, f"'{'a' * 49} ... {'a' * 24}'"),
        (functools.reduce(lambda inner, _: [inner], range(100_000), 1), "a list nested without end"),
    ],
)
def test_values_in_messages(value, text):
    assert shown(value) == text


def test_an_extra_that_is_there():
    assert load_extra("json", extra="train", purpose="reading") is json


def test_an_extra_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        MissingExtraError,
        match=r"^drawing needs matplotlib, which is not installed \(.*\); run: pip install 'attnkit\[train\]'$",
    ):
        load_extra("matplotlib.pyplot", extra="train", purpose="drawing")
