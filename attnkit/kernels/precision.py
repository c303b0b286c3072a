"""In which dtype things are computed: never below float32 where it matters, with autocast or without."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

CPU = torch.device("cpu")


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype where that holds more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for a device; PyTorch refuses to speak of it on the meta device, which has none."""
    if device == CPU:
        # A name that is made anew takes as long as the rest of the question.
        return torch.is_autocast_enabled("cpu")
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context manager in which autocast is off for a device, so that float32 stays float32."""
    # A graph says so even where autocast is off: it may be on where the graph runs.
    needless = device.type == "meta" or not (torch.compiler.is_compiling() or autocasting(device))
    return nullcontext() if needless else torch.autocast(device.type, enabled=False)
