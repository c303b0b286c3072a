"""Gate: a contender whose numbers are wrong is told, and not timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from attnkit_models.bench.case import Contender

# Relative to the largest exact number. A mistake is off by about 1; sums of thousands of products in any order are not.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float64: 1e-6}
# By `apart`, of whole models that are computed in two ways in a dtype, and in it and in float32: rounding adds up over
# many layers, and what is rounded otherwise may choose other keys.
MODEL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}

Exact = Callable[[Sequence[Tensor], Tensor], Tensor]


def difference(actual: Tensor, exact: Tensor) -> float:
    """max|actual - exact| / max|exact|, infinite where a number is not finite."""
    if not bool(actual.isfinite().all()):
        return math.inf
    error, size = (float(one.detach().abs().max()) for one in (actual.double() - exact, exact))
    return error / size if size else error


def apart(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact| in the norm of all numbers, infinite where one is not finite."""
    if not bool(actual.isfinite().all()):
        return math.inf
    error, size = (float(one.detach().double().norm()) for one in (actual.double() - exact, exact))
    return error / size if size else error


def sampled_rows(tokens: int, count: int, device: torch.device) -> Tensor:
    """Numbers of at most `count` tokens spread over all, the first and the last among them."""
    return torch.linspace(0, tokens - 1, min(count, tokens), dtype=torch.float64).round().long().to(device)


def rows_check(exact: Exact, count: int = 128) -> Callable[[Contender], Mapping[str, float]]:
    """A check of outputs and of gradients at some tokens.

    A gradient arrives at these tokens only, so that the exact gradients of all leaves need no other rows.

    Args:
        exact: the output (..., rows, channels) at given tokens, from leaves in float64.
        count: how many tokens.
    """

    def check(contender: Contender) -> Mapping[str, float]:
        leaves = contender.leaves
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        with torch.set_grad_enabled(contender.trains):
            out = contender.forward()
        rows = sampled_rows(out.shape[-2], count, out.device)
        right = exact(wide, rows)
        seen = out[..., rows, :]
        errors = {"output": difference(seen, right) if bool(out.isfinite().all()) else math.inf}
        if not contender.trains:
            return errors
        generator = torch.Generator().manual_seed(1)
        arriving = torch.randn(right.shape, generator=generator, dtype=torch.float64).to(out.device)
        narrow = torch.zeros_like(out)
        narrow[..., rows, :] = arriving.to(out.dtype)
        found = torch.autograd.grad(out, list(leaves), narrow)
        expected = torch.autograd.grad(right, wide, arriving.to(out.dtype).double())
        pairs = zip(found, expected, strict=True)
        errors["gradients"] = max(difference(one, other) for one, other in pairs)
        return errors

    return check


def passes(errors: Mapping[str, float], dtype: torch.dtype, limits: Mapping[str, float] | None = None) -> bool:
    """Whether all errors are small enough for a dtype, or for limits of their own."""
    return all(error <= (limits or {}).get(name, TOLERANCE[dtype]) for name, error in errors.items())
