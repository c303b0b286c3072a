"""Autocast, on every device: PyTorch refuses to speak of it on the meta device, which has none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context manager in which autocast is off for a device, so that float32 stays float32."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
