"""Mixes and blocks of random head groups: built, run, trained a step, saved, loaded, now and then exported."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnkit import Block, Grid, HeadMix, use_backend
from attnkit.blocks import BlockStyle
from attnkit.primitives import MaskPredictor, PrimitiveOptions
from attnkit.registry import BACKENDS, list_primitives
from attnkit.testing import random_options, random_tensor, randomize_parameters
from tests.fuzz.agreement import check_export, check_module
from tests.fuzz.mutation import ODDITIES, any_of

DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXPORTED = 0.3


class Called(nn.Module):
    """A mix or block with everything of a call but x."""

    def __init__(self, inner: nn.Module, **rest: Any) -> None:
        super().__init__()
        self.inner = inner
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, **self.rest)


def case(dice: random.Random, folder: Path) -> None:
    grid, as_map = _grid(dice)
    groups = _groups(dice, grid)
    heads = sum(group.heads for group in groups)
    width = dice.choice((1, 2, 4, 4, 8))
    dim = width * heads if dice.random() < 0.9 else dice.randint(1, 40)
    extra = _extra(dice, width, dim)
    dtype = dice.choice(DTYPES)
    make = _maker(dice, dim, groups, extra)
    seed = dice.randrange(10_000)
    inner = make().to(dtype)
    if dice.random() < 0.5:
        randomize_parameters(inner, seed=seed, scale=0.3)
    rest = _rest(dice, grid, as_map, seed)
    x = _inputs(dice, grid, as_map, dim, dtype, seed)
    with _backend(dice):
        model, fresh = Called(inner, **rest), Called(make().to(dtype), **rest)
        check_module(model, fresh, x, folder / "mix.safetensors", dice)
        if dice.random() < EXPORTED:
            check_export(model, x)


def _grid(dice: random.Random) -> tuple[Grid, bool]:
    """A grid, and whether x comes as a map, which says its own grid."""
    most = 16 if dice.random() < 0.1 else 8
    sizes = (dice.randint(1, most), dice.randint(1, most))
    if dice.random() < 0.06:
        sizes = dice.choice(((dice.randint(1, 40),), (dice.randint(1, 3), *sizes)))
    as_map = dice.random() < 0.3 and len(sizes) > 1
    return Grid(*sizes, prefix=0 if as_map else dice.choice((0, 0, 1, 2, 3))), as_map


def _groups(dice: random.Random, grid: Grid) -> list[PrimitiveOptions]:
    names = [dice.choice(list_primitives()) for _ in range(dice.randint(1, 3))]
    drawn = [random_options(name, seed=dice.randrange(10**6)) for name in names]
    if dice.random() < 0.15:
        # As drawn: strides and prefixes that may not fit each other.
        return drawn
    if len({(group.output_stride(), group.output_scale()) for group in drawn}) > 1:
        drawn = [replace(group, stride=1) if hasattr(group, "stride") else group for group in drawn]
        drawn = [group for group in drawn if group.output_stride() == group.output_scale() == 1] or drawn[:1]
    return [_fitted(group, grid, len(drawn)) for group in drawn]


def _fitted(group: Any, grid: Grid, groups: int) -> PrimitiveOptions:
    """The group without what only some mixes and grids can have."""
    changes: dict[str, Any] = {}
    if isinstance(group, MaskPredictor) and group.prefix not in (0, grid.prefix):
        changes["prefix"] = grid.prefix
    if groups > 1 and getattr(group, "lepe_on", "v") == "x":
        changes["lepe_on"] = "v"
    return replace(group, **changes)


def _extra(dice: random.Random, width: int, dim: int) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if dice.random() < 0.2:
        extra["head_dim"] = width
    if dice.random() < 0.1:
        extra["out_dim"] = dice.choice((dim, dim + 3))
    if dice.random() < 0.2:
        extra[dice.choice(("qkv_bias", "proj_bias"))] = dice.random() < 0.5
    if dice.random() < 0.15:
        extra |= dice.choice(({"projection": "none"}, {"pad_multiple": dice.randint(1, 5)}))
    if dice.random() < 0.05:
        names = ("head_dim", "out_dim", "qkv_bias", "proj_bias", "layer", "projection", "pad_multiple")
        extra[dice.choice(names)] = any_of(dice, ODDITIES)
    return extra


def _maker(dice: random.Random, dim: int, groups: list[PrimitiveOptions], extra: dict[str, Any]) -> Any:
    if dice.random() < 0.6:
        return lambda: HeadMix(dim, groups, **extra)
    layer = {"layer": extra["layer"]} if "layer" in extra else {}
    style: dict[str, Any] = {}
    if dice.random() < 0.7:
        style = {
            "mlp_ratio": dice.choice((0.1, 1.0, 2, 4.0)),
            "norm": dice.choice(("pre", "pre", "post")),
            "activation": dice.choice(("gelu", "gelu_tanh", "relu", "silu")),
            "layer_scale": dice.choice((None, 1e-3)),
            "residual_scale": dice.choice((1.0, 2.0)),
            "position_conv": dice.choice((0, 0, 3)),
            "mlp_conv": dice.choice((0, 0, 3)),
        }
    if dice.random() < 0.06:
        style[dice.choice(list(BlockStyle.__dataclass_fields__))] = any_of(dice, ODDITIES)
    return lambda: Block(dim, groups, **layer, **style)


def _rest(dice: random.Random, grid: Grid, as_map: bool, seed: int) -> dict[str, Any]:
    """What a call takes beside x."""
    rest: dict[str, Any] = {} if as_map else {"grid": grid}
    if dice.random() < 0.3 and not as_map:
        rest["token_mask"] = random_tensor(2, grid.tokens, seed=seed) > dice.choice((-1.0, 0.0, 9.0))
    if dice.random() < 0.04:
        wrong = (torch.ones(2, grid.tokens), torch.ones(1, dtype=torch.bool), torch.ones(3, grid.tokens).bool())
        rest["token_mask"] = any_of(dice, (*ODDITIES, *wrong))
    if dice.random() < 0.02:
        rest["grid"] = any_of(dice, (Grid(2, 2), *ODDITIES))
    return rest


def _inputs(dice: random.Random, grid: Grid, as_map: bool, dim: int, dtype: torch.dtype, seed: int) -> Any:
    shape = (2, *grid.sizes, dim) if as_map else (2, grid.tokens, dim)
    if dice.random() < 0.04:
        wrong = (shape[:-1], (*shape, 1), (2, 0, dim), (0, *shape[1:]), (*shape[:-1], dim + 1))
        shape = dice.choice(wrong)
    if dice.random() < 0.03:
        dtype = dice.choice((torch.int64, torch.bool, torch.float64, torch.complex64))
    if dice.random() < 0.02:
        return any_of(dice, ODDITIES)
    return random_tensor(*shape, seed=seed + 1).to(dtype)


def _backend(dice: random.Random) -> Any:
    if dice.random() < 0.85:
        return contextlib.nullcontext()
    return use_backend(dice.choice([name for name in BACKENDS if name not in ("flex", "triton", "xformers")]))
