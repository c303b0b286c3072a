"""Kernels: how softmax over a layout is computed; one file per backend."""

from attnkit.kernels.attend import attend
from attnkit.kernels.backend import Backend
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.dispatch import Choice, recording, use_backend

__all__ = ["AttendCall", "AttendResult", "Backend", "Choice", "attend", "recording", "use_backend"]
