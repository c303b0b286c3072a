"""Which Triton there is, without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

OLDEST = (3, 6)

# As Triton reads it when it is imported.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def missing() -> str:
    """Why no kernel can run whatever the call is: Triton is not there, or too old; else empty."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; on Linux, pip install 'attnkit[triton]' brings it"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # Built by whoever built this PyTorch, under another name.
        return ""
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < OLDEST:
        return f"Triton is {version}, and its kernels need {'.'.join(map(str, OLDEST))} or newer"
    return ""
