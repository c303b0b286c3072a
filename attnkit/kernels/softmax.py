"""Softmax over some of the keys, written out: what all plain-torch backends share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.transforms import forward_mode


def masked_softmax(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension where `mask` is True.

    The maximum of each row is subtracted first, so logits of any size are exact. A row that sees no key gets weights
    0, lse -inf, and gradient 0.

    Args:
        logits: (..., K).
        mask: bool, broadcastable to the logits, or None for all keys.

    Returns:
        Weights (..., K) and lse (...).
    """
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if logits.shape[-1] == 0:
        return logits, logits.new_full(logits.shape[:-1], -torch.inf)
    peak = logits.detach().amax(-1, keepdim=True)
    empty = peak == -torch.inf
    peak = peak.masked_fill(empty, 0.0)
    # A masked logit is set once more behind the difference: exp of it is 0 and its gradient is cut, even for -inf.
    shifted = logits - peak
    if mask is not None:
        shifted = shifted.masked_fill(~mask, -torch.inf)
    raised = shifted.exp()
    total = raised.sum(-1, keepdim=True)
    weights = raised / total.masked_fill(empty, 1.0)
    lse = (total.masked_fill(empty, 1.0).log() + peak).masked_fill(empty, -torch.inf)
    return weights, lse[..., 0]


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    bias: Tensor | None,
    gain: Tensor | None,
    dtype: torch.dtype,
) -> AttendResult:
    """Attention by two matrix products, in `dtype`; the output has the dtype of v.

    Args:
        q: (..., Nq, D).
        k: (..., Nk, D).
        v: (..., Nk, Dv).
        mask: bool, broadcastable to (..., Nq, Nk), or None.
        scale: factor of the logits.
        bias: broadcastable to (..., Nq, Nk), or None.
        gain: broadcastable to (..., Nq, Nk), or None.
        dtype: dtype of the computation.
    """
    logits = (q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1)
    if bias is not None:
        logits = logits + bias.to(dtype)
    weights, lse = masked_softmax(logits, mask)
    if gain is not None:
        weights = weights * gain.to(dtype)
    return AttendResult((weights @ v.to(dtype)).to(v.dtype), lse)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None) -> Tensor:
    """The same by `scaled_dot_product_attention`, which has no forward mode; rows that see no key give 0.

    Takes any number of leading dimensions >= 2, and q, k and v of one dtype.
    """
    if forward_mode():
        return plain_attention(q, k, v, mask, scale, bias, None, torch.promote_types(q.dtype, torch.float32)).out
    if bias is not None:
        bias = _narrowed(bias, q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias in another dtype, where finite numbers stay finite: -1e9 as -inf would hide a key for good."""
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(bias.dtype).max:
        bias = bias.clamp(-limit, limit).where(bias.isfinite(), bias)
    return bias.to(dtype)


def fusable(call: AttendCall) -> bool:
    """Whether `scaled_dot_product_attention` gives all that a call asks for."""
    return call.gain is None and not call.return_lse and call.q.dtype == call.v.dtype


def visible_values(call: AttendCall) -> tuple[Tensor, Tensor]:
    """k and v with zeros where no query may look, so that NaN there cannot spread as zero times NaN."""
    mask = call.layout.key_mask
    if mask is None:
        return call.k, call.v
    return call.k.where(mask[..., None], 0.0), call.v.where(mask[..., None], 0.0)


def global_rows(call: AttendCall, prefix: int) -> AttendResult:
    """The prefix queries, which see every key that is not masked."""
    mask = None if call.layout.key_mask is None else call.layout.key_mask[:, :, None]
    k, v = visible_values(call)
    rows = torch.arange(prefix, device=call.q.device)[None, None, :, None]
    keys = torch.arange(call.k.shape[2], device=call.q.device)[None, None, None]
    bias, gain = (call.pairs_at(values, rows, keys) for values in (call.bias, call.gain))
    q = call.q[:, :, :prefix]
    if fusable(call):
        return AttendResult(fused_attention(q, k, v, mask, call.scale, bias), None)
    return plain_attention(q, k, v, mask, call.scale, bias, gain, call.compute_dtype)
