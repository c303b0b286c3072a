"""What the tests of models share: every recipe with one block per stage, and the micro models whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

import attnkit
from attnkit import factory

# Makes `with torch.device("meta")` look up torch's allocators now, before the suite puts poisoned ones in their place.
_device_constructors()


def shallow_model(name: str, **overrides: Any) -> torch.nn.Module:
    """A recipe at its full width with as few blocks as show every kind of block that it has."""
    isotropic = hasattr(factory.config(name), "depth")
    depth = {"depth": 2} if isotropic else {"stages[*].depth": 1}
    return attnkit.build(name, **{"num_classes": 5, **depth, **overrides})


@pytest.fixture
def shallow() -> Callable[..., torch.nn.Module]:
    """shallow(name, **overrides): see `shallow_model`."""
    return shallow_model


@pytest.fixture
def outline() -> Callable[..., torch.nn.Module]:
    """outline(name, **overrides): a shallow model in evaluation mode without numbers, on the meta device."""

    def make(name: str, **overrides: Any) -> torch.nn.Module:
        with torch.device("meta"):
            return shallow_model(name, **overrides).eval()

    return make


# `bigbird_vit` is another name of `bigbird_vit_tiny`.
@pytest.fixture(scope="module", params=[name for name in attnkit.list_models() if name != "bigbird_vit"])
def recipe(request: pytest.FixtureRequest) -> tuple[str, torch.nn.Module]:
    torch.manual_seed(0)
    return request.param, shallow_model(request.param)


@pytest.fixture
def model(recipe: tuple[str, torch.nn.Module]) -> torch.nn.Module:
    """Every recipe in turn, shallow, in evaluation mode."""
    return copy.deepcopy(recipe[1]).eval()


@pytest.fixture(params=attnkit.list_models("*_micro"))
def micro(request: pytest.FixtureRequest) -> torch.nn.Module:
    """Every micro model in turn, whole, for 10 classes of grey images, in evaluation mode."""
    return attnkit.build(request.param, num_classes=10, in_chans=1).eval()


@pytest.fixture
def images() -> Callable[..., torch.Tensor]:
    """images(batch, channels, height, width): the same normally distributed images every time."""

    def make(batch: int = 2, channels: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, channels, height, width, generator=generator)

    return make
