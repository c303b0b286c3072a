"""Peak memory, measured a model at a time."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """Watches the highest memory use from its making on.

    On a CUDA device this is what PyTorch's allocator held at most. On Linux it is how far the process's
    resident set rose above what it was at the beginning. Elsewhere the system cannot start its count anew:
    then it is the largest resident set since the process began, and `exact` is False.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.exact = True
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            return
        # What an earlier model freed may still be held by the C library and would count here.
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            _RESET.write_text("5", encoding="ascii")
            self._start = _status("VmRSS")
        except (OSError, LookupError):
            self.exact = False

    @property
    def unit(self) -> str:
        """What `megabytes` counts, for a table."""
        if self.device.type == "cuda":
            return "GPU"
        return "CPU" if self.exact else "whole process"

    def megabytes(self) -> float | None:
        """The peak so far in 10^6 bytes, or None where the system does not tell."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 1e6, 1)
        if self.exact:
            return round((_status("VmHWM") - self._start) / 1e6, 1)
        try:
            import resource
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def _status(name: str) -> int:
    """A value of this process's status in bytes."""
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)
