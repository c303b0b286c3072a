"""The headline table as data: what attnkit promises, and against whom."""

from __future__ import annotations

from collections.abc import Mapping

from attnkit_models.bench.case import DENSE, OURS, Case, Target

GATHER, UNFOLD, AUTHORS = "BiFormer gather", "SASA unfold", "authors' formulation"
ALONE = "its groups alone"

_EFFICIENT = (Target("efficiency forward", DENSE, 0.8), Target("efficiency training", DENSE, 0.8))
_LEARNED = "learned_query/64x64/k{}"


def _learned(kernel: int) -> Case:
    targets = [Target("forward", UNFOLD, 5.0)]
    if kernel >= 7:
        targets += [Target("memory forward", UNFOLD, 10.0), Target("memory training", UNFOLD, 7.0)]
    if kernel > 7:
        # Memory is flat in the kernel.
        targets.append(Target("memory training", OURS, 0.9, case=_LEARNED.format(7)))
    return Case(
        _LEARNED.format(kernel),
        "learned_query",
        {"batch": 1, "heads": 8, "side": 64, "channels": 64, "kernel": kernel},
        tuple(targets),
        4.0,
        f"learned queries, window {kernel} x {kernel}, 64 x 64 tokens, 64 channels",
        "Windows of few places leave little but work that each token needs once, whatever its window.",
    )


_WINDOWS = {"kind": "window", "heads": 2, "window": 7}
_REGIONS = {"kind": "topk_region", "heads": 2, "regions": 7, "topk": 4}
_RANDOM = {"kind": "random_window", "heads": 2, "window": 49}
_NEAR = {"kind": "learned_query", "heads": 2, "kernel": 3}


def _mix(name: str, *groups: Mapping[str, object]) -> Case:
    # A mix may cost a tenth more than its groups.
    targets = (Target("forward", ALONE, 0.91), Target("training", ALONE, 0.91))
    kinds = ", ".join(str(group["kind"]) for group in groups)
    return Case(
        f"mix/{name}",
        "mix",
        {"batch": 4, "side": 56, "head_dim": 32, "groups": groups},
        targets,
        6.0,
        f"mix of {kinds}, 4 images of 56 x 56 tokens",
        "What a mix adds to its groups is one copy that joins their outputs, and in the backward pass one that joins "
        "the gradients of its fused projection.",
    )


_ROUTED = (
    "What is not fused attention is moving queries, keys and outputs between the order of rows and that of regions."
)
_WINDOWED = "49 keys a query leave about as much to fetch as to compute."


HEADLINE: tuple[Case, ...] = (
    Case(
        "regions/128x128",
        "regions",
        {"batch": 1, "heads": 4, "side": 128, "width": 32, "regions": 8, "topk": 4},
        (
            Target("forward", GATHER, 3.5),
            Target("training", GATHER, 4.0),
            Target("memory training", GATHER, 7.0),
            *_EFFICIENT,
        ),
        15.0,
        "routed regions, 128 x 128 tokens, 8 x 8 regions, topk 4",
        _ROUTED,
    ),
    Case(
        "regions/256x256",
        "regions",
        {"batch": 1, "heads": 4, "side": 256, "width": 32, "regions": 16, "topk": 4},
        (
            Target("forward", GATHER, 4.0),
            Target("training", GATHER, 8.0),
            Target("memory training", GATHER, 30.0),
            *_EFFICIENT,
        ),
        18.0,
        "routed regions, 256 x 256 tokens, 16 x 16 regions, topk 4",
        _ROUTED,
    ),
    Case(
        "regions/56x56",
        "regions",
        {"batch": 8, "heads": 2, "side": 56, "width": 32, "regions": 7, "topk": 4},
        (Target("forward", GATHER, 3.0), Target("training", GATHER, 3.5)),
        8.0,
        "routed regions, 8 images of 56 x 56 tokens, 7 x 7 regions, topk 4",
        f"{_ROUTED} Each of the many small problems has 64 queries only.",
    ),
    *(_learned(kernel) for kernel in range(3, 17, 2)),
    Case(
        "predicted_keys/3136",
        "predicted_keys",
        {"batch": 1, "heads": 6, "side": 56, "channels": 384, "keep": 0.25},
        (Target("forward", AUTHORS, 5.0), Target("memory forward", AUTHORS, 10.0)),
        20.0,
        "Sparsifiner's layer, 3,136 tokens, 384 channels, keep 0.25",
        "Choosing the keys takes a score for every pair of tokens.",
    ),
    Case(
        "windows/56x56",
        "windows",
        {"batch": 8, "heads": 2, "side": 56, "width": 32, "window": 49},
        (Target("training", "gather + SDPA", 1.2),),
        6.0,
        "random windows of 49, 8 images of 56 x 56 tokens",
        _WINDOWED,
    ),
    Case(
        "windows/128x128",
        "windows",
        {"batch": 1, "heads": 4, "side": 128, "width": 32, "window": 49},
        (Target("training", "gather + SDPA", 1.2),),
        9.0,
        "random windows of 49, 128 x 128 tokens",
        _WINDOWED,
    ),
    _mix("2", _WINDOWS, _REGIONS),
    _mix("3", _RANDOM, _REGIONS, {"kind": "conv", "heads": 2}),
    _mix("4", _WINDOWS, _REGIONS, _RANDOM, _NEAR),
    Case(
        "model/biformer_tiny/512",
        "recipe_step",
        {"name": "biformer_tiny", "size": 512, "batch": 1},
        (Target("training", GATHER, 1.8),),
        18.0,
        "BiFormer-T, 512 x 512 pixels, training step",
        "Attention is a part of the model's step, and the rest is the same for both.",
    ),
)
