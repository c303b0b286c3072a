"""Models: the small recipes whole, the large ones cut down, under random overrides, right and wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnkit
from attnkit import factory, list_models
from attnkit.errors import AttnkitError
from attnkit.options import Options
from attnkit.testing import random_tensor
from attnkit_models.backbones import FeaturesOnly, VisionModel
from tests.fuzz.agreement import check_export, check_module
from tests.fuzz.case import agree, must_work
from tests.fuzz.mutation import ODDITIES, any_of, misspelt, nearby
from tests.fuzz.options import random_path

EXPORTED = 0.2
# Numbers that set how much a model holds and computes stay below this.
MOST = 70
MOST_PARAMETERS = 12_000_000


class Shown(nn.Module):
    """A model whose images all have one size, as `check_module` wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def case(dice: random.Random, folder: Path) -> None:
    name = dice.choice(list_models("*_micro")) if dice.random() < 0.6 else dice.choice(list_models())
    start = factory.config(name)
    overrides = _small(name, start, dice)
    size = (dice.randint(1, 48), dice.randint(1, 48)) if dice.random() < 0.3 else dice.choice((16, 24, 32, (16, 40)))
    if dice.random() < 0.9:
        overrides["img_size"] = size
    for _ in range(dice.choice((0, 0, 0, 1, 1, 2))):
        path, value = _change(start, dice)
        overrides[path] = value
    if _parameters(name, overrides) > MOST_PARAMETERS:
        name, overrides = "vit_micro", {}
    model = Shown(attnkit.build(name, **overrides))
    fresh = Shown(attnkit.build(name, **overrides))
    x = _images(dice, model.model, size)
    check_module(model, fresh, x, folder / "model.safetensors", dice)
    if dice.random() < EXPORTED:
        check_export(model, x)
    if isinstance(model.model, VisionModel) and dice.random() < 0.3:
        _check_features(model.model.eval(), x, dice)


def _parameters(name: str, overrides: dict[str, Any]) -> int:
    """How large a model would be; 0 if it is refused."""
    try:
        with torch.device("meta"):
            return sum(one.numel() for one in attnkit.build(name, **overrides).parameters())
    except AttnkitError:
        return 0


def _small(name: str, start: Options, dice: random.Random) -> dict[str, Any]:
    if name.endswith("_micro") and dice.random() < 0.5:
        return {}
    overrides: dict[str, Any] = {"depth": 1} if hasattr(start, "depth") else {"stages[*].depth": 1}
    if dice.random() < 0.8:
        overrides["num_classes"] = dice.choice((0, 1, 2, 10))
    if dice.random() < 0.3:
        overrides["in_chans"] = dice.choice((1, 2, 4))
    return overrides


def _change(start: Options, dice: random.Random) -> tuple[str, Any]:
    """One override: of a value to one of its kind, to something odd, or of a path that there is not."""
    path, value = random_path(start, dice)
    odd = dice.random()
    if odd < 0.08:
        return misspelt(path, dice), value
    if odd < 0.2:
        return path, any_of(dice, ODDITIES)
    changed = nearby(value, dice)
    if isinstance(changed, int) and not isinstance(changed, bool) and not -MOST < changed < MOST:
        changed = value
    if isinstance(changed, list) and all(isinstance(one, int) for one in changed):
        changed = [min(one, MOST) for one in changed]
    return path, changed


def _images(dice: random.Random, model: nn.Module, size: Any) -> Any:
    height, width = size if isinstance(size, tuple) else (size, size)
    if dice.random() < 0.2:
        height, width = dice.randint(1, 48), dice.randint(1, 48)
    inner: Any = model.model if isinstance(model, FeaturesOnly) else model
    shape = (dice.choice((1, 2)), inner.in_chans, height, width)
    dtype = torch.float32
    if dice.random() < 0.05:
        wrong = (shape[1:], (0, *shape[1:]), (2, shape[1] + 1, height, width), (*shape[:2], 0, width), (*shape, 1))
        shape = dice.choice(wrong)
    if dice.random() < 0.03:
        dtype = dice.choice((torch.float64, torch.uint8, torch.bfloat16))
    if dice.random() < 0.02:
        return any_of(dice, ODDITIES)
    return random_tensor(*shape, seed=dice.randrange(10_000)).to(dtype)


@torch.no_grad()
def _check_features(model: VisionModel[Any], x: Tensor, dice: random.Random) -> None:
    """The ways into a model's inside agree with each other, or refuse what they are asked."""
    levels = len(model.feature_info)
    with must_work("forward_intermediates"):
        last, maps = model.forward_intermediates(x)
    agree(torch.equal(last, model.forward_features(x)), "forward_intermediates and forward_features differ")
    agree(len(maps) == levels, "there are more or fewer maps than feature_info says")
    indices: Any = dice.choice((1, [0], [-1], levels, None, range(levels)))
    if dice.random() < 0.3:
        indices = any_of(dice, (levels + 1, [levels], 0, *ODDITIES))
    found = model.forward_intermediates(x, indices, norm=dice.random() < 0.5, intermediates_only=True)
    agree(all(one.isfinite().all() for one in found), "a feature map is not finite")
    classes = dice.choice((0, 3, 5)) if dice.random() < 0.8 else any_of(dice, ODDITIES)
    model.reset_classifier(classes, dice.choice((None, None, "avg", "token", "x")))
    agree(bool(model(x).isfinite().all()), "a model with another classifier gives something that is not finite")
