"""AdamW with spared vectors, and a learning rate that is a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from attnkit_models.train.options import TrainOptions

FINAL_SHARE = 0.01


def adamw(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW in two groups: matrices decay; vectors, scalars and `model.no_weight_decay()` do not."""
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # pyright: ignore
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim <= 1 or name in spared else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr)


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Linear up to `peak` over the warm-up, then half a cosine down to a hundredth of `peak`.

    Args:
        step: optimizer steps taken so far, in [0, steps).
        steps: optimizer steps in all.
        warmup: steps of warm-up.
        peak: the highest learning rate.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * done)) / 2)
