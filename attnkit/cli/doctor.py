"""`attnkit doctor`: what is installed, and which backend runs what on this machine."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

import attnkit
from attnkit.cli.commands import PLANNED
from attnkit.grid import Grid
from attnkit.kernels import AttendCall
from attnkit.kernels.dispatch import backend_named
from attnkit.layouts import Blocks, Dense, Layout, Stencil, TokenMask, TokenSets
from attnkit.registry import BACKENDS

PACKAGES = ("torch", "einops", "accelerate", "triton", "xformers", "timm", "safetensors", "scikit-learn")


TOKENS, GRID = 16, Grid(4, 4)
# By kind of layout: what a backend may run of it or not.
EXAMPLES: dict[str, dict[str, Callable[[str], Layout]]] = {
    "dense": {
        "all keys": lambda device: Dense(TOKENS),
        "hidden keys": lambda device: Dense(TOKENS).restrict(_seen(device)),
    },
    "stencil": {
        "windows cut at the border": lambda device: Stencil(GRID, 3),
        "windows moved inside at the border": lambda device: Stencil(GRID, 3, border="clamp"),
        "strides": lambda device: Stencil(GRID, 3, stride=2),
        "dilations": lambda device: Stencil(GRID, 3, dilation=2),
    },
    "blocks": {
        "windows": lambda device: Blocks.windows(GRID, 2, device=device),
        "routed regions": lambda device: Blocks.from_regions(
            GRID, 2, torch.zeros(1, 4, 1, dtype=torch.int64, device=device)
        ),
        "hidden keys": lambda device: Blocks.windows(GRID, 2, device=device).restrict(_seen(device)),
    },
    "token_sets": {
        "lists of keys": lambda device: TokenSets(
            torch.arange(TOKENS, device=device).view(1, 1, TOKENS, 1), keys=TOKENS
        ),
        "hidden keys": lambda device: TokenSets(
            torch.arange(TOKENS, device=device).view(1, 1, TOKENS, 1), keys=TOKENS
        ).restrict(_seen(device)),
    },
    "token_mask": {
        "a mask": lambda device: TokenMask(torch.eye(TOKENS, dtype=torch.bool, device=device)),
        "hidden keys": lambda device: TokenMask(torch.eye(TOKENS, dtype=torch.bool, device=device)).restrict(
            _seen(device)
        ),
    },
}


def _seen(device: str) -> torch.Tensor:
    return torch.arange(TOKENS, device=device) != 3


def report() -> Iterator[str]:
    """Lines of text: versions, devices, then each backend on each device with a small call of every layout."""
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield f"attnkit {attnkit.__version__}"
    for package in PACKAGES:
        yield f"{package} {_version(package)}"
    threads = torch.get_num_threads()
    yield f"CPU with {threads} thread{'' if threads == 1 else 's'}"
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
    """Runs a small call of each kind of layout that the backend accepts, and asks what it says of others."""
    calls = {
        (kind, what): _call(make(device), device)
        for kind, examples in EXAMPLES.items()
        for what, make in examples.items()
    }
    found = {one: backend_named(backend).why_not(call) for one, call in calls.items()}
    # What stands against every call is said once; kinds that are refused for a reason of their own alone do not count.
    shared = [
        reasons
        for (kind, _), reasons in found.items()
        if any(set(reasons) & set(others) for (other, _), others in found.items() if other != kind)
    ]
    common = [one for one in shared[0] if all(one in more for more in shared)] if shared and all(found.values()) else []
    runs: list[str] = []
    lines: list[str] = []
    refused: dict[str, list[str]] = {}
    for kind, examples in EXAMPLES.items():
        able = [what for what in examples if not found[kind, what]]
        if able:
            backend_named(backend).run(calls[kind, able[0]])
            runs.append(kind if len(able) == len(examples) else f"{kind} in part ({', '.join(able)})")
        against = {what: "; ".join(one for one in found[kind, what] if one not in common) for what in examples}
        if not able and len(set(against.values())) == 1:
            refused.setdefault(next(iter(against.values())), []).append(kind)
        else:
            lines += [f"    not {kind} with {what}: {reason}" for what, reason in against.items() if reason]
    lines += [f"    not {', '.join(kinds)}: {reason}" for reason, kinds in refused.items() if reason]
    text = f"runs {', '.join(runs)}" if runs else f"runs nothing{': ' if common else ''}{'; '.join(common)}"
    return "\n".join([text, *lines])


def _call(layout: Layout, device: str) -> AttendCall:
    q, k, v = (torch.ones(1, 2, count, 16, device=device) for count in (layout.num_queries, TOKENS, TOKENS))
    return AttendCall(q, k, v, layout, scale=0.25)
