"""reach: which inputs can influence which outputs, by gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkit.analysis.scene import scene_mix
from attnkit.analysis.tracing import ImageSize, example_inputs, layer_width, prepared, reported, sizes_of, unmarked
from attnkit.arguments import is_count
from attnkit.blocks import BlockConfig
from attnkit.errors import ConfigError, ShapeError, shown
from attnkit.grid import Grid
from attnkit.heads import HeadMix
from attnkit.mixes import Mix
from attnkit.primitives import PrimitiveOptions

MOST_LAYERS = 1000


def reach(model_or_mix: Any, grid: ImageSize, layers: int = 1, *, outputs: Sequence[int] | None = None) -> Tensor:
    """Which inputs can influence which outputs: True where the derivative is not zero.

    For head groups it answers how many layers it takes until every token has heard of every other: with the residual
    connection around each layer, `reach(groups, grid, n).all()` says whether n layers suffice. What only takes part in
    a choice (routing, predicted masks) has no derivative and does not count.

    Args:
        model_or_mix: options of head groups (one, a list, a `Mix`): `layers` mixes of them, each behind the other with
            a residual connection; or a `HeadMix` or `Block`; or a model with `forward_features`.
        grid: tokens of the layer's grid, or pixels of the model's image: a number, (height, width) or a `Grid`.
        layers: how often the layer is applied, 1 to 1000; mixes made from options count their layers, so that random
            windows differ.
        outputs: numbers of the output tokens to ask about, one row of the result each; all where not given. Each
            costs a backward pass, so that a few of a large grid are much faster.

    Returns:
        bool (output tokens, N), prefix tokens first, for layers; bool (outputs, H, W) with an entry per pixel for a
        model, outputs being the tokens of its last feature map.

    Raises:
        ConfigError: for something else, `layers` below 1, or an output that is not there.
        ShapeError: if layers that change the grid or width are to be applied more than once.
    """
    if not is_count(layers, 1) or layers > MOST_LAYERS:
        raise ConfigError(f"reach(layers=...) is a number of layers, 1 to {MOST_LAYERS}, but got {shown(layers)}")
    on = grid if isinstance(grid, Grid) else Grid(*sizes_of(grid))
    stack, residual = _stack(model_or_mix, on, layers)
    if layer_width(stack[0]) is None:
        return _of_model(stack[0], grid, layers, outputs)
    x = example_inputs(stack[0], on)[0].reshape(1, on.tokens, -1).requires_grad_()
    out = x
    for module in stack:
        with reported("reach", module, (out, on)), unmarked(module), torch.enable_grad():
            found = module(out, on)
            if layers > 1 and found.shape != out.shape:
                raise ShapeError(
                    f"a layer that turns {tuple(out.shape)} into {tuple(found.shape)} cannot be applied {layers} times"
                )
            out = out + found if residual and found.shape == out.shape else found
    return torch.stack([_touched(one, x)[0] for one in _chosen(out[0], outputs)])


def _stack(what: Any, grid: Grid, layers: int) -> tuple[list[nn.Module], bool]:
    """The layers to apply, and whether they need a residual connection around each."""
    if isinstance(what, BlockConfig):
        what = what.mix
    if isinstance(what, PrimitiveOptions):
        what = [what]
    if isinstance(what, Mix) or (isinstance(what, Sequence) and not isinstance(what, str)):
        return [scene_mix(what, grid, layer) for layer in range(layers)], True
    module = prepared(what, "reach")
    return [module] * layers, isinstance(module, HeadMix)


def _of_model(module: nn.Module, size: ImageSize, layers: int, outputs: Sequence[int] | None) -> Tensor:
    if layers != 1 or not hasattr(module, "forward_features"):
        raise ConfigError(
            f"reach takes head groups, a HeadMix, a Block, or with layers=1 a model with forward_features, "
            f"but got {type(module).__name__} and layers={layers}"
        )
    image = example_inputs(module, size)[0].requires_grad_()
    with reported("reach", module, (image,)), unmarked(module), torch.enable_grad():
        features = module.forward_features(image)  # type: ignore[operator]
    # (B, C, H, W) maps and (B, N, C) tokens both occur.
    tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
    return torch.stack([_touched(one, image)[0].any(0) for one in _chosen(tokens[0], outputs)])


def _chosen(tokens: Tensor, outputs: Sequence[int] | None) -> Iterable[Tensor]:
    """The tokens (N, C) that were asked about, one by one."""
    if outputs is None:
        return tokens
    fits = isinstance(outputs, Sequence) and not isinstance(outputs, str)
    if not fits or not outputs or not all(is_count(one) and one < len(tokens) for one in outputs):
        last = len(tokens) - 1
        raise ConfigError(f"reach(outputs=...) lists output tokens, 0 to {last}, but got {shown(outputs)}")
    return (tokens[one] for one in outputs)


def _touched(output: Tensor, given: Tensor) -> Tensor:
    """Where the derivative of an output token (C,) by the input is not zero; features of tokens are merged."""
    signs = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    (gradient,) = torch.autograd.grad((output * signs).sum(), given, retain_graph=True)
    return (gradient != 0).any(-1) if gradient.ndim == 3 else gradient != 0
