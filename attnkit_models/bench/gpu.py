"""The GPU's cases as data: what attnkit should reach on a card of the H100 or H200 class, and whole models there.

Batches are those of a GPU as they stand. `small` sizes are for a quick run on the CPU, which shows that a case runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnkit_models.bench.case import DENSE, Case, Target
from attnkit_models.bench.headline import AUTHORS, GATHER, UNFOLD
from attnkit_models.bench.layer_problems import BANDWIDTH, TWO_CONVOLUTIONS
from attnkit_models.bench.model_runs import COMPILED, GRAPH, NO_TRITON, ON, PLAIN
from attnkit_models.bench.problems import MASKED

FLEX, GATHERED = "FlexAttention", "gather + SDPA"
GPU_DEVICE = "cuda"


def _case(
    name: str,
    problem: str,
    sizes: Mapping[str, Any],
    small: Mapping[str, Any],
    title: str,
    *targets: Target,
    seconds: float = 5.0,
) -> Case:
    return Case(f"gpu/{name}", problem, sizes, targets, seconds, title, device=GPU_DEVICE, small=small)


def _both(against: str, at_least: float) -> tuple[Target, Target]:
    return Target("forward", against, at_least), Target("training", against, at_least)


_REGIONS = (
    Target("efficiency forward", DENSE, 0.7, aim=0.85),
    Target("efficiency training", DENSE, 0.6, aim=0.85),
    Target("forward", GATHER, 5.0),
    Target("training", GATHER, 8.0),
    Target("memory forward", GATHER, 10.0),
    Target("memory training", GATHER, 10.0),
    *_both(FLEX, 1.2),
)


def _regions(side: int, regions: int, topk: int, width: int, batch: int) -> Case:
    tokens, density = (side // regions) ** 2, topk / regions**2
    sizes = {"batch": batch, "heads": 4, "side": side, "width": width, "regions": regions, "topk": topk, "flex": True}
    few = 4 if tokens <= 64 else 2
    small = {"batch": 1, "heads": 1, "side": few * (side // regions), "regions": few}
    small["topk"] = max(round(few**2 * density), 1)
    name = f"regions/{side}x{side}/{tokens}/1-{round(1 / density)}/d{width}"
    title = (
        f"routed regions of {tokens} tokens, density 1/{round(1 / density)}, {side} x {side} tokens, "
        f"heads of {width}, batch {batch}"
    )
    return _case(name, "regions", sizes, small, title, *_REGIONS)


def _stage(stage: int, side: int, heads: int, topk: int) -> Case:
    sizes = {"batch": 64, "heads": heads, "side": side, "width": 32, "regions": 7, "topk": topk}
    title = f"BiFormer's stage {stage} at 224, regions of {(side // 7) ** 2} tokens, topk {topk}, batch 64"
    target = Target("training", GATHER, 3.0)
    return _case(f"biformer/stage{stage}", "regions", sizes, {"batch": 2, "heads": 2}, title, target, seconds=4.0)


def _windows(side: int, window: int, batch: int, heads: int) -> Case:
    sizes = {"batch": batch, "heads": heads, "side": side, "width": 32, "window": window}
    title = f"random windows of {window}, {side} x {side} tokens, batch {batch}"
    small = {"batch": 2, "heads": 2, "side": 20}
    return _case(f"random_windows/{side}x{side}/{window}", "windows", sizes, small, title, *_both(GATHERED, 1.3))


def _shifted(side: int, window: int, batch: int, heads: int) -> Case:
    sizes = {"batch": batch, "heads": heads, "side": side, "width": 32, "window": window, "shift": window // 2}
    title = f"windows of {window} x {window} shifted by {window // 2}, {side} x {side} tokens, batch {batch}"
    small = {"batch": 2, "heads": 2, "side": 3 * window}
    return _case(f"shifted_windows/{side}x{side}/{window}", "shifted", sizes, small, title, *_both(GATHERED, 1.3))


def _neighborhood(side: int, kernel: int, batch: int, heads: int) -> Case:
    sizes = {"batch": batch, "heads": heads, "side": side, "width": 32, "kernel": kernel, "flex": True}
    title = f"neighborhoods of {kernel} x {kernel}, moved inside at the border, {side} x {side} tokens, batch {batch}"
    against = (*_both(MASKED, 0.0), *_both(FLEX, 0.0))
    return _case(
        f"neighborhood/{side}x{side}/{kernel}", "neighborhood", sizes, {"batch": 1, "side": 20}, title, *against
    )


def _learned(side: int, channels: int, kernel: int, batch: int) -> tuple[Case, Case]:
    sizes = {"batch": batch, "heads": channels // 8, "side": side, "channels": channels, "kernel": kernel}
    small = {"batch": 2, "heads": 2, "side": 16, "channels": 16}
    name = f"{side}x{side}/c{channels}/k{kernel}"
    words = f"window {kernel} x {kernel}, {side} x {side} tokens, {channels} channels, batch {batch}"
    targets = []
    if kernel >= 7:
        targets += [Target("training", UNFOLD, 10.0)]
        targets += [Target("memory forward", UNFOLD, 10.0), Target("memory training", UNFOLD, 10.0)]
    if kernel <= 7:
        targets.append(Target("training", TWO_CONVOLUTIONS, 2.0))
    layer = {**sizes, "convolutions": True}
    floor = (Target("forward", BANDWIDTH, 0.5),) if kernel >= 7 else ()
    return (
        _case(f"learned_query/{name}", "learned_query", layer, small, f"learned queries, the layer, {words}", *targets),
        _case(
            f"learned_heads/{name}",
            "learned_heads",
            sizes,
            small,
            f"learned queries without projections, {words}",
            *floor,
            seconds=3.0,
        ),
    )


def _predicted(side: int, keep: float, batch: int) -> Case:
    sizes = {"batch": batch, "heads": 6, "side": side, "channels": 384, "keep": keep}
    targets = (
        *_both(AUTHORS, 5.0),
        Target("memory forward", AUTHORS, 10.0),
        Target("memory training", AUTHORS, 10.0),
        Target("forward", DENSE, 0.0, aim=0.67),
        Target("training", DENSE, 0.0, aim=0.67),
    )
    title = f"Sparsifiner's layer, {side**2:,} tokens, 384 channels, keep {keep:g}, batch {batch}"
    small = {"batch": 1, "side": 10, "channels": 96}
    return _case(f"predicted_keys/{side**2}/{keep:g}", "predicted_keys", sizes, small, title, *targets, seconds=6.0)


def _step(name: str, size: int, batch: int, against: str, at_least: float) -> Case:
    micro = f"{name.partition('_deit')[0].partition('_tiny')[0]}_micro"
    return _case(
        f"step/{name}/{size}",
        "recipe_step",
        {"name": name, "size": size, "batch": batch, "against": (against,)},
        {"name": micro, "size": 32, "batch": 2},
        f"{name}, {size} x {size} pixels, batch {batch}, beside {against}",
        Target("training", against, at_least),
        seconds=6.0,
    )


RECIPES = ("biformer_tiny", "bigbird_vit_tiny", "qna_vit_tiny", "sparsifiner_deit_small")
# Models of about as many multiply-adds: 4.3 to 5.0 G an image of 224 x 224.
PEERS = ("biformer_small", "bigbird_vit_tiny", "qna_vit_small", "sparsifiner_deit_small")
TIMM = ("swin_tiny_patch4_window7_224", "deit_small_patch16_224", "convnext_tiny")
_MICRO = ("biformer_micro", "bigbird_vit_micro", "qna_vit_micro", "sparsifiner_micro")


def _plain_too(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}{on}" for name in names for on in ("", f"{ON}{PLAIN}"))


def _models(size: int, batch: int) -> Case:
    return _case(
        f"models/{size}",
        "models",
        {"size": size, "batch": batch, "names": _plain_too(PEERS), "timm": TIMM},
        {"size": 32, "batch": 2, "names": _plain_too(_MICRO), "timm": ()},
        f"whole models of about 4.5 G multiply-adds at 224, {size} x {size} pixels, batch {batch}",
        seconds=12.0,
    )


def _ways(name: str, micro: str) -> Case:
    def ways(one: str) -> tuple[str, ...]:
        return one, f"{one}{COMPILED}", f"{one}{GRAPH}", f"{one}{COMPILED}{GRAPH}"

    timm = name in TIMM
    sizes = {"size": 224, "batch": 64, "names": () if timm else ways(name), "timm": ways(name) if timm else ()}
    small = {"size": 32, "batch": 2, "names": ways(micro), "timm": ()}
    title = f"{name} compiled and in CUDA graphs, 224 x 224 pixels, batch 64"
    return _case(f"compiled/{name}", "models", sizes, small, title, seconds=6.0)


# Tokens and regions a side, topk, images.
_SHAPES = ((64, 8, 16, 16), (64, 8, 4, 16), (128, 16, 32, 8), (128, 8, 4, 8), (256, 32, 64, 1), (256, 16, 64, 1))
# Tokens a side, channels, tokens a side of a window, images.
_LAYERS = ((56, 64, 3, 32), (56, 64, 5, 32), (56, 64, 7, 32), (56, 64, 15, 16), (64, 256, 7, 8), (128, 64, 9, 4))

GPU: tuple[Case, ...] = (
    *(_regions(*shape[:3], width, shape[3]) for shape in _SHAPES for width in (32, 64)),
    _stage(1, 56, 2, 1),
    _stage(2, 28, 4, 4),
    _stage(3, 14, 8, 16),
    _windows(56, 49, 64, 2),
    _windows(56, 64, 64, 2),
    _windows(128, 49, 8, 4),
    _windows(128, 64, 8, 4),
    _shifted(56, 7, 64, 2),
    _shifted(64, 8, 32, 2),
    _shifted(128, 8, 8, 4),
    *(_neighborhood(side, kernel, *rest) for side, *rest in ((56, 32, 2), (128, 4, 4)) for kernel in (7, 13)),
    *(case for shape in _LAYERS for case in _learned(*shape)),
    *(_predicted(side, keep, batch) for side, batch in ((28, 16), (56, 4)) for keep in (0.25, 0.1)),
    *(_step(name, 512, 16, NO_TRITON, 2.0) for name in RECIPES[:2]),
    *(_step(name, 224, 64, PLAIN, 1.5) for name in RECIPES),
    *(_models(size, batch) for size, batch in ((224, 64), (384, 32), (512, 16), (1024, 4))),
    *(_ways(name, micro) for name, micro in zip((*RECIPES, TIMM[0]), (*_MICRO, "vit_micro"), strict=True)),
)
