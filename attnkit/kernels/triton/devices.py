"""Devices: the classes of GPUs that configurations are kept for, and what a program may use there."""

from __future__ import annotations

import torch

DEVICE_CLASSES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of shared memory a program may have. GPUs of the class sm_80 have 163 KiB or, the smaller ones, 99.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def device_class(device: torch.device) -> str:
    """The class of a GPU: `"sm_90"` (Hopper), `"sm_100"` (Blackwell of data centres), `"gfx942"` (any of AMD's), and
    `"sm_80"` for Ampere and for all others of NVIDIA's, whose tiles fit the 99 KiB of shared memory of the small ones.
    """
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")
