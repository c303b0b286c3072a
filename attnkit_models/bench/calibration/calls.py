"""Problems made ready: the attention calls that a head group makes, and the group without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import attnkit
from attnkit.analysis.surroundings import sketched, without_attention
from attnkit.analysis.tracing import visits
from attnkit.kernels import AttendCall
from attnkit.kernels.costs import Work
from attnkit.kernels.dispatch import wrapping
from attnkit_models.bench.calibration.problems import Problem


@dataclass(frozen=True, eq=False)
class Ready:
    """A problem made ready in one precision.

    Attributes:
        calls: attention calls, with q, k and v as leaves.
        around: runs the head group with attention left out.
        work: what that does, counted.
    """

    calls: list[AttendCall]
    around: Callable[[], Tensor]
    work: Work


def ready(problem: Problem, dtype: torch.dtype, *, grad: bool) -> Ready:
    """Makes a problem ready: one image, weights and values the same every time."""
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        dim = problem.options.heads * problem.width
        mix = attnkit.HeadMix(dim, [problem.options]).to(dtype).train(grad)
        grid = attnkit.Grid(problem.side, problem.side)
        found = visits(mix, (torch.randn(1, grid.tokens, dim, dtype=dtype), grid))
    group, inputs = found[0].module, found[0].inputs
    assert inputs is not None
    parts = {name: _leaf(getattr(inputs, name), grad) for name in ("x", "q", "k", "v")}
    inputs = replace(inputs, **parts)
    calls = [_leaves(choice.call, grad) for visit in found for choice in visit.choices]

    def around() -> Tensor:
        with wrapping(without_attention):
            return group(inputs).out

    return Ready(calls, around, sketched(group, inputs, grid.sizes, grad=grad).around)


def _leaves(call: AttendCall, grad: bool) -> AttendCall:
    # Tables for a bias or a gain keep their own gradients.
    return call.replace(**{name: _leaf(getattr(call, name), grad) for name in "qkv"})


def _leaf(one: Tensor | None, grad: bool) -> Tensor | None:
    return None if one is None else one.detach().requires_grad_(grad)
