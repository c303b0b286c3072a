"""Launch: a kernel with everything it is started with, made from shapes and dtypes alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Value: TypeAlias = "Tensor | int | float | None"
Constant: TypeAlias = "int | float | bool | str | None"
# Offsets that 32 bits hold.
REACH = 2**31


@dataclass(frozen=True, eq=False)
class Launch:
    """One start of a Triton kernel.

    What makes a launch looks at shapes, strides and dtypes only. From tensors of a GPU it makes what `run` starts; from
    tensors on the meta device the same code makes what `attnkit.kernels.triton.ahead` compiles without a GPU.

    Attributes:
        kernel: the function under `triton.jit`.
        grid: number of programs along one to three axes; only the first may pass 65,535.
        arguments: what the kernel takes at run time. None compiles the argument away.
        constants: its `tl.constexpr` arguments.
        warps: warps a program has.
        stages: loads of how many iterations are under way at once.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Value]
    constants: Mapping[str, Constant]
    warps: int
    stages: int

    @property
    def given(self) -> dict[str, Any]:
        """What the kernel is called with, by name."""
        # Multiplications and additions in one, as every Triton does unless told otherwise, some of them with a warning.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return {**self.arguments, **self.constants, **options}

    def run(self) -> None:
        """Starts the kernel on the current stream of the device on which its tensors lie."""
        if 0 in self.grid:
            return
        start = self.kernel[self.grid]
        device = next(one.device for one in self.arguments.values() if isinstance(one, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            # Triton starts kernels on the current device, wherever their tensors lie.
            with torch.cuda.device(device):
                start(**self.given)
        else:
            start(**self.given)


def precision(dtype: torch.dtype = torch.float32) -> str:
    """How kernels multiply: `"tf32"` for float32 where PyTorch is told that it may, else `"ieee"`, as for dtypes that
    this does not concern."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def with_strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, Any]:
    """A tensor and its first strides, 0 where it broadcasts."""
    names = _stride_names(name, axes)
    found: dict[str, Any] = dict.fromkeys(names, 0)
    found[name] = tensor
    if tensor is not None:
        for one, size, step in zip(names, tensor.shape, tensor.stride(), strict=False):
            if size > 1:
                found[one] = step
    return found


@functools.cache
def _stride_names(name: str, axes: str) -> tuple[str, ...]:
    return tuple(f"{name}_{letter}" for letter in axes)


def within_reach(tensor: Tensor, axes: int = 1) -> Tensor:
    """A tensor, or an ordered copy where offsets along its last axes pass `REACH`, as those of channels may that lie
    outermost in billions of numbers.

    Args:
        tensor: with at least as many axes.
        axes: how many of the last axes kernels count in 32 bits.
    """
    reach = sum((size - 1) * step for size, step in zip(tensor.shape[-axes:], tensor.stride()[-axes:], strict=True))
    return tensor if reach < REACH else tensor.contiguous()


def laid_out_as(gradient: Tensor, one: Tensor, reached: Tensor) -> Tensor:
    """A gradient of `reached` in the memory order of what that was made from."""
    return gradient if reached is one else torch.empty_like(one).copy_(gradient)
