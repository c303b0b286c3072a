"""Tolerances that come from the data: a multiple of what plain attention in the same dtype gets wrong."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Attention as one would write it down, every step in the dtype of q; its error is the yardstick.

    Args:
        q: queries (B, heads, Nq, D).
        k: keys (B, heads, Nk, D).
        v: values (B, heads, Nk, Dv).
        mask: bool, broadcastable to (B, heads, Nq, Nk).
        scale: factor of the logits; D ** -0.5 where not given.
        bias: broadcastable to (B, heads, Nq, Nk), or None.
        gain: broadcastable to (B, heads, Nq, Nk), or None.

    Returns:
        out (B, heads, Nq, Dv) in v's dtype, 0 for queries that see no key.
    """
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    seeing = mask.any(-1, keepdim=True)
    weights = logits.masked_fill(~mask & seeing, -torch.inf).softmax(-1) * mask
    if gain is not None:
        weights = weights * gain.to(weights.dtype)
    return weights.to(v.dtype) @ v


def naive_lse(q: Tensor, k: Tensor, mask: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """The log of the sum of exponentials that goes with `naive_attention`, with its arguments.

    Returns:
        lse (B, heads, Nq) in q's dtype, -inf for queries that see no key.
    """
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return logits.masked_fill(~mask, -torch.inf).logsumexp(-1)


def error_budget(naive: Tensor, exact: Tensor, *, multiple: float = 4.0, scale: float | None = None) -> float:
    """The largest error allowed: `multiple * max(max|naive - exact|, eps * scale)`.

    Args:
        naive: the result of a plain computation in the dtype under test.
        exact: the same in float64.
        multiple: how much worse than plain may still pass, > 0.
        scale: size of the numbers that were added up; max|exact| where not given. Where terms cancel, as in many
            gradients, the plain computation may be exact by luck, and only the size of the terms says what is fair.

    Returns:
        An absolute tolerance.
    """
    if not exact.numel():
        return 0.0
    own = float((naive.double() - exact).abs().max())
    size = float(exact.abs().max()) if scale is None else scale
    return multiple * max(own, torch.finfo(naive.dtype).eps * size)


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    naive: Tensor,
    *,
    multiple: float = 4.0,
    scale: float | None = None,
    what: str = "the result",
) -> None:
    """Raises `AssertionError` unless `actual` lies within `error_budget(naive, exact)` of `exact` everywhere.

    Args:
        actual: the result under test.
        exact: the same in float64.
        naive: the same from a plain computation in the dtype under test.
        multiple: as in `error_budget`.
        scale: as in `error_budget`.
        what: the subject of the message.
    """
    assert actual.shape == exact.shape, f"{what} has shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    if not exact.numel():
        return
    budget = error_budget(naive, exact, multiple=multiple, scale=scale)
    error = float((actual.double() - exact).abs().max())
    allowed = f"allowed are {budget:.3g}, {multiple:g} times what plain {naive.dtype} gets wrong"
    assert error <= budget, f"{what} is off by {error:.3g}, {allowed}"
