"""Warm: passes as they are timed, each called before it counts, and of several variants the fastest once warm."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit_models.bench.case import Contender

# Seconds of a pass from which on one warm call says enough.
SLOW = 0.5
# Warm calls of a variant that is faster, of which the fastest counts.
CALLS = 5


def training_step(one: Contender) -> Callable[[], object]:
    """A forward and backward pass, or the step that the contender brings."""
    if one.step is not None:
        return one.step
    arriving: list[Tensor] = []

    def both() -> object:
        out = one.forward()
        if not arriving:
            arriving.append(torch.ones_like(out))
        return torch.autograd.grad(out, list(one.leaves), arriving[0])

    return both


def fastest_variant(one: Contender, device: torch.device, *, grad: bool) -> tuple[Callable[[], object] | None, str]:
    """The call to time and the name of its variant: the one that is the fastest when it is warm.

    A variant is warmed in the pass that is timed: with gradients or without, others are compiled. None where no variant
    runs.
    """
    if not one.variants:
        return (training_step(one) if grad else one.forward), ""
    timed: dict[str, tuple[float, Callable[[], object]]] = {}
    for variant, forward in one.variants.items():
        call = training_step(Contender(forward, one.leaves)) if grad else forward
        with torch.set_grad_enabled(grad):
            seconds = attempt(lambda call=call: warm_seconds(call, device))
        if seconds is not None:
            timed[variant] = (seconds, call)
    if not timed:
        return None, ""
    best = min(timed, key=lambda variant: timed[variant][0])
    return timed[best][1], best


def warm_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few calls after a first one, which may compile."""
    synced(call, device)
    least = synced(call, device)
    for _ in range(CALLS - 1 if least < SLOW else 0):
        least = min(least, synced(call, device))
    return least


def synced(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call until all of it is computed."""
    began, _ = time.perf_counter(), call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns, or None where there is no kernel or no memory for it."""
    try:
        return call()
    except Exception:
        return None
