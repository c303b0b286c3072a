"""Random tensors from seeds, and outputs together with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    """Standard normal numbers as a function of the seed; the global random state is neither read nor changed.

    Args:
        *shape: sizes.
        seed: any integer.
        dtype: the tensor's dtype; the same numbers, rounded.
        grad: whether it is a leaf that asks for its gradient.
    """
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(dtype).requires_grad_(grad)


def random_qkv(
    sizes: tuple[int, int],
    *,
    batch: int = 1,
    heads: int = 1,
    head_dim: int = 4,
    value_dim: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for `attnkit.attend`.

    Args:
        sizes: numbers of queries and keys (Nq, Nk).
        batch: number of items, B.
        heads: number of heads.
        head_dim: width of queries and keys, D.
        value_dim: width of values; `head_dim` where not given.
        seed: any integer.
        dtype: dtype of all three.
        grad: whether they ask for their gradients.

    Returns:
        q (B, heads, Nq, D), k (B, heads, Nk, D) and v (B, heads, Nk, Dv).
    """
    queries, keys = sizes
    widths = (head_dim, head_dim, head_dim if value_dim is None else value_dim)
    shapes = [(batch, heads, count, width) for count, width in zip((queries, keys, keys), widths, strict=True)]
    q, k, v = (random_tensor(*shape, seed=3 * seed + at, dtype=dtype, grad=grad) for at, shape in enumerate(shapes))
    return q, k, v


def randomize_parameters(module: Module, *, seed: int = 0, scale: float = 0.6) -> Module:
    """Gives every parameter normal numbers, so that none is inactive: fresh biases and relative tables are zero.

    Args:
        module: changed in place.
        seed: any integer; the global random state is neither read nor changed.
        scale: standard deviation, > 0.

    Returns:
        The module.
    """
    with torch.no_grad():
        for at, parameter in enumerate(module.parameters()):
            parameter.copy_(scale * random_tensor(*parameter.shape, seed=1000 * seed + at))
    return module


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], *, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs a function and back-propagates the same random numbers from each of its outputs.

    Args:
        function: takes the inputs and returns a tensor or several. Only finite outputs take part in the gradient.
        inputs: tensors that require gradients.
        seed: of the numbers that are propagated, which depend on nothing else but the outputs' shapes.

    Returns:
        Outputs and gradients, detached; the gradient of an input without influence is 0.
    """
    found = function(*inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    total = torch.zeros((), dtype=torch.float64)
    for at, output in enumerate(outputs):
        weights = random_tensor(*output.shape, seed=seed + 7919 * (at + 1))
        finite = output.isfinite()
        total = total + (output.double().masked_fill(~finite, 0.0) * weights).sum()
    if not total.requires_grad:
        return [one.detach() for one in outputs], [torch.zeros_like(one) for one in inputs]
    gradients = torch.autograd.grad(total, list(inputs), allow_unused=True)
    filled = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, gradients, strict=True)]
    return [one.detach() for one in outputs], filled
