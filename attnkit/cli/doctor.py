"""`attnkit doctor`: what is installed, and which backend runs what on this machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

import attnkit
from attnkit.cli.commands import PLANNED
from attnkit.grid import Grid
from attnkit.kernels import AttendCall
from attnkit.kernels.dispatch import backend_named
from attnkit.registry import BACKENDS
from attnkit.testing import KINDS, random_layout

PACKAGES = ("torch", "einops", "accelerate", "triton", "xformers", "timm", "safetensors", "scikit-learn")


def report() -> Iterator[str]:
    """Lines of text: versions, devices, then each backend on each device with a small call of every layout."""
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield f"attnkit {attnkit.__version__}"
    for package in PACKAGES:
        yield f"{package} {_version(package)}"
    yield f"CPU with {torch.get_num_threads()} threads"
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            yield f"cuda:{index} {torch.cuda.get_device_name(index)}"
    else:
        yield "no CUDA device" + ("" if torch.version.cuda else " (this PyTorch is built without CUDA)")
    for name, target in BACKENDS.items():
        if not target:
            yield f"{name}: {PLANNED}"
            continue
        for device in devices:
            yield f"{name} on {device}: {_try(name, device)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _try(backend: str, device: str) -> str:
    """Runs one small call of each layout that the backend accepts."""
    runs: list[str] = []
    refuses: dict[str, list[str]] = {}
    for kind in KINDS:
        layout, (queries, keys) = random_layout(kind, Grid(4, 4), batch=1, heads=2, seed=0, device=device)
        q, k, v = (torch.ones(1, 2, count, 16, device=device) for count in (queries, keys, keys))
        call = AttendCall(q, k, v, layout, scale=0.25)
        reasons = backend_named(backend).why_not(call)
        if reasons:
            refuses.setdefault("; ".join(reasons), []).append(kind)
            continue
        backend_named(backend).run(call)
        runs.append(kind)
    text = f"runs {', '.join(runs)}" if runs else "runs nothing"
    return text + "".join(f"\n    not {', '.join(kinds)}: {why}" for why, kinds in refuses.items())
