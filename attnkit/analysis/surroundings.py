"""What a head group computes beside its attention: counted operator by operator, without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from attnkit.analysis import formulas  # noqa: F401 - what the table of formulas below lacks
from attnkit.grid import Grid
from attnkit.kernels import AttendCall, AttendResult, Choice, recording
from attnkit.kernels.costs import Work
from attnkit.kernels.dispatch import wrapping
from attnkit.primitives import HeadInputs, HeadOutput

SORTING = (torch.ops.aten.topk, torch.ops.aten.sort)


class Surroundings(TorchDispatchMode):
    """Counts operators, the bytes they read and write, multiply-adds, and numbers that are sorted; views and tensors
    without content are free."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = self.products = self.sorted = 0.0

    @property
    def work(self) -> Work:
        """What was counted."""
        # One call, for what Python does.
        named = {"calls": 1.0, "operators": self.operators, "bytes": self.bytes}
        return Work("around", {**named, "products": self.products, "sorted": self.sorted})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        out = func(*args, **given)
        tensors = [one for one in tree_leaves((args, given, out)) if isinstance(one, Tensor)]
        # Integers alone are tables of sizes, which are made once and kept.
        free = func.is_view or "empty" in func.__name__
        if not free and any(one.is_floating_point() for one in tensors):
            self.operators += 1
            self.bytes += sum(_held(one) for one in tensors)
            count = flop_registry.get(func._overloadpacket)
            if count is not None:
                self.products += count(*args, **given, out_val=out) / 2
            if func._overloadpacket in SORTING:
                self.sorted += args[0].numel()
        return out


@dataclass(frozen=True, eq=False)
class Sketch:
    """A head group run on tensors without content.

    Attributes:
        output: what it gave.
        choices: its calls of `attend`, and the backend of each.
        around: what it did beside them.
    """

    output: HeadOutput
    choices: list[Choice]
    around: Work


def sketched(group: nn.Module, inputs: HeadInputs, sizes: tuple[int, ...], *, grad: bool) -> Sketch:
    """Runs a head group for one image on a map of other sizes, on tensors without content: nothing is computed.

    Args:
        group: the head group.
        inputs: inputs of any map, whose widths, dtype and device stay.
        sizes: of the map, in tokens.
        grad: whether a backward pass may follow.
    """
    grid = Grid(*sizes, prefix=inputs.grid.prefix)

    def empty(one: Tensor | None, axis: int) -> Tensor | None:
        if one is None:
            return None
        shape = list(one.shape)
        shape[0], shape[axis] = 1, grid.tokens
        return torch.empty(shape, dtype=one.dtype, device=one.device, requires_grad=grad)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(grad):
        parts = {name: empty(getattr(inputs, name), 1 if name == "x" else 2) for name in ("x", "q", "k", "v")}
        given = replace(inputs, **parts, grid=grid, token_mask=None, draw=None, places=None, prefix_weights=False)
        with recording() as choices, wrapping(without_attention), Surroundings() as counted:
            output = group(given)
    return Sketch(output, choices, counted.work)


def without_attention(call: AttendCall, compute: Callable[[], AttendResult]) -> AttendResult:
    """For `wrapping`: numbers in the shape of a call's result, which nobody computes."""
    shape = (*call.q.shape[:3], call.v.shape[3])
    lse = call.q.new_empty(shape[:3], dtype=call.compute_dtype) if call.return_lse else None
    return AttendResult(call.v.new_empty(shape), lse)


def _held(one: Tensor) -> float:
    """Bytes that are really there: an expanded axis is read once."""
    numbers = 1
    for size, stride in zip(one.shape, one.stride(), strict=True):
        numbers *= size if stride else 1
    return float(numbers * one.element_size())
