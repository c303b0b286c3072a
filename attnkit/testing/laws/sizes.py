"""How large the numbers of a call are, for budgets of rounding."""

from __future__ import annotations

import torch

from attnkit.kernels.call import AttendCall
from attnkit.testing.oracle import pair_values


def product(call: AttendCall) -> float:
    """Size of the terms of the largest scale * q.k; 0 without any."""
    if not (call.q.numel() and call.k.numel()):
        return 0.0
    return float((abs(call.scale) * (call.q.detach().abs().double() @ call.k.detach().abs().double().mT)).max())


def largest_logit(call: AttendCall) -> float:
    """Size of the terms of the largest logit, without biases so large that they stand for hidden keys."""
    bias = pair_values(call.bias)
    if bias is None or not bias.numel():
        return product(call)
    size = bias.detach().abs()
    return product(call) + float(size.where(size < 1e30, 0.0).max())


def logit_steps(call: AttendCall) -> float:
    """By how many rounding steps of the values' dtype the rounding of q.k may move a weight, at least 1."""
    return max(1.0, product(call) * torch.finfo(call.compute_dtype).eps / torch.finfo(call.v.dtype).eps)


def reach(call: AttendCall) -> float:
    """Size of the values that any query sees, and of their gains: what an output is added up from."""
    seen = call.layout.to_mask(call.v.device).any(-2)[..., None]
    gain = pair_values(call.gain)
    sizes = [
        float(one.detach().abs().max()) for one in (call.v.where(seen, 0.0), gain) if one is not None and one.numel()
    ]
    return sizes[0] * max(1.0, *sizes[1:], 1.0) if sizes and call.v.numel() else 0.0


def pull(call: AttendCall) -> float:
    """Size of what the gradients of logits, queries and keys are added up from: with one key, all of it cancels."""
    if not call.v.numel() or not call.q.numel():
        return 0.0
    reached = float(call.v.double().norm(dim=-1).max())
    return reached * max(1.0, abs(call.scale) * max(float(call.q.abs().max()), float(call.k.abs().max())))
