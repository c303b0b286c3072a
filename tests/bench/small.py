"""Problems small enough to be checked at every place."""

from __future__ import annotations

import torch

from attnkit.registry import load
from attnkit_models.bench.case import Case, Problem, Setting
from attnkit_models.bench.runner import PROBLEMS

SMALL = {
    "regions": {"batch": 2, "heads": 2, "side": 12, "width": 8, "regions": 3, "topk": 2},
    "windows": {"batch": 2, "heads": 2, "side": 6, "width": 8, "window": 10},
    "shifted": {"batch": 2, "heads": 2, "side": 12, "width": 8, "window": 4, "shift": 2},
    "stencil": {"batch": 2, "heads": 2, "side": 16, "width": 8, "kernel": 5},
    "neighborhood": {"batch": 2, "heads": 2, "side": 16, "width": 8, "kernel": 5},
    "learned_query": {"batch": 2, "heads": 2, "side": 16, "channels": 16, "kernel": 5, "convolutions": True},
    "learned_heads": {"batch": 2, "heads": 2, "side": 8, "channels": 16, "kernel": 5},
    "predicted_keys": {"batch": 2, "heads": 2, "side": 10, "channels": 32, "keep": 0.25, "lean": True},
    "mix": {
        "batch": 2,
        "side": 8,
        "head_dim": 8,
        "groups": (
            {"kind": "window", "heads": 2, "window": 4},
            {"kind": "random_window", "heads": 1, "window": 8},
            {"kind": "conv", "heads": 1},
            {"kind": "learned_query", "heads": 2, "kernel": 3},
        ),
    },
    "recipe_step": {"name": "biformer_micro", "size": 32, "batch": 2},
    "models": {"size": 32, "batch": 2, "names": ("qna_vit_micro", "biformer_micro on biformer_gather")},
}


def make_small(problem: str, dtype: torch.dtype = torch.float64) -> Problem:
    return load(PROBLEMS[problem])(Setting(dtype=dtype), **SMALL[problem])


def small_case(problem: str, name: str = "") -> Case:
    return Case(name or f"{problem}/small", problem, SMALL[problem], seconds=0.02, title=f"small {problem}")
