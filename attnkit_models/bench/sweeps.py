"""Sweeps as data: one number changes, all else stays; each is a line in a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnkit_models.bench.case import Case


@dataclass(frozen=True)
class Sweep:
    """Cases along one axis.

    Attributes:
        name: first part of its cases' names.
        title: what stays.
        axis: the fact of a problem that changes.
        cases: in order.
    """

    name: str
    title: str
    axis: str
    cases: tuple[Case, ...]


def _sweep(name: str, title: str, axis: str, problem: str, rows: Mapping[str, Mapping[str, object]]) -> Sweep:
    cases = (Case(f"{name}/{label}", problem, sizes, seconds=4.0, title=label) for label, sizes in rows.items())
    return Sweep(name, title, axis, tuple(cases))


_ROUTED = {"batch": 1, "heads": 4, "width": 32}

IMAGE_SIZE = _sweep(
    "image_size",
    "routed regions, 7 x 7 regions, topk 4 (BiFormer's first stage keeps their number), 4 heads of 32 channels",
    "tokens",
    "regions",
    {f"{side}x{side}": {**_ROUTED, "side": side, "regions": 7, "topk": 4} for side in (14, 28, 56, 84, 112, 140, 196)},
)
TOPK = _sweep(
    "topk",
    "routed regions, 64 x 64 tokens, 8 x 8 regions, 4 heads of 32 channels, 2 images",
    "topk",
    "regions",
    {f"{topk}": {**_ROUTED, "batch": 2, "side": 64, "regions": 8, "topk": topk} for topk in (1, 2, 4, 8, 16, 32, 64)},
)
REGION_SIZE = _sweep(
    "region_size",
    "routed regions, 112 x 112 tokens, every query sees a sixteenth of the keys, 4 heads of 32 channels",
    "regions",
    "regions",
    {
        f"{regions}x{regions}": {**_ROUTED, "side": 112, "regions": regions, "topk": regions**2 // 16}
        for regions in (4, 8, 16, 28, 56)
    },
)
WINDOW = _sweep(
    "window",
    "random windows, 56 x 56 tokens, 2 heads of 32 channels, 8 images",
    "window",
    "windows",
    {
        f"{window}": {"batch": 8, "heads": 2, "side": 56, "width": 32, "window": window}
        for window in (16, 49, 98, 196, 392, 784)
    },
)
STENCIL = _sweep(
    "stencil",
    "every token sees the k x k window around it, 64 x 64 tokens, 2 heads of 32 channels",
    "kernel",
    "stencil",
    {
        f"{kernel}x{kernel}": {"batch": 1, "heads": 2, "side": 64, "width": 32, "kernel": kernel}
        for kernel in (3, 5, 7, 9, 11, 13, 15)
    },
)
KEEP = _sweep(
    "keep",
    "Sparsifiner's layer, 28 x 28 tokens, 6 heads, 384 channels, 2 images",
    "keep",
    "predicted_keys",
    {
        f"{keep:g}": {"batch": 2, "heads": 6, "side": 28, "channels": 384, "keep": keep, "lean": True}
        for keep in (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    },
)
FLEX = _sweep(
    "flex",
    "routed regions beside FlexAttention, which compiles for each size: topk 4, 4 heads of 32 channels",
    "tokens",
    "regions",
    {f"{side}x{side}": {**_ROUTED, "side": side, "regions": side // 16, "topk": 4, "flex": True} for side in (64, 128)},
)

SWEEPS: tuple[Sweep, ...] = (IMAGE_SIZE, TOPK, REGION_SIZE, WINDOW, STENCIL, KEEP, FLEX)

NAMES = (
    "biformer_tiny",
    "biformer_tiny on biformer_gather",
    "bigbird_vit_tiny",
    "qna_vit_tiny",
    "sparsifiner_deit_small",
    "vit_small",
)
TIMM = ("swin_tiny_patch4_window7_224", "deit_small_patch16_224")

MODELS: tuple[Case, ...] = tuple(
    Case(
        f"models/{size}",
        "models",
        {"size": size, "batch": batch, "names": NAMES, "timm": TIMM},
        seconds=seconds,
        title=f"{size} x {size} pixels",
    )
    for size, batch, seconds in ((224, 4, 40.0), (384, 2, 40.0), (512, 1, 40.0), (1024, 1, 60.0))
)
