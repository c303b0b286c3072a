"""The oracle: dense attention in float64 from a mask alone, short enough to be trusted by reading it."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.kernels import AttendCall
from attnkit.kernels.call import PairValues
from attnkit.layouts import RelativeTable


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What attention means: the definition that every backend is tested against.

    `out[i] = sum_j gain[i, j] * softmax_j(scale * q[i].k[j] + bias[i, j]) * v[j]`, j over the keys with mask[i, j].
    A query that sees no key gets 0, lse = -inf and gradient 0. Differentiable in everything but the mask.

    Args:
        q: queries (B, heads, Nq, D).
        k: keys (B, heads, Nk, D).
        v: values (B, heads, Nk, Dv).
        mask: bool, broadcastable to (B, heads, Nq, Nk); `layout.to_mask()`.
        scale: factor of the logits; D ** -0.5 where not given.
        bias: broadcastable to (B, heads, Nq, Nk), or None.
        gain: broadcastable to (B, heads, Nq, Nk), or None.

    Returns:
        out (B, heads, Nq, Dv) and lse (B, heads, Nq), both float64.
    """
    q, k, v = q.double(), k.double(), v.double()
    logits = (q.shape[-1] ** -0.5 if scale is None else scale) * torch.einsum("bhid,bhjd->bhij", q, k)
    if bias is not None:
        logits = logits + bias.double()
    logits = logits.masked_fill(~mask, -torch.inf)
    # Any shift does, also in the gradient. One that is known to be finite keeps exp(-inf + inf) out of empty rows, and
    # dividing by the sum afterwards is right also where the logits are so large that their lse is rounded.
    shift = logits.detach().logsumexp(-1, keepdim=True)
    empty = shift == -torch.inf
    shift = shift.masked_fill(empty, 0.0)
    raised = (logits - shift).exp()
    total = raised.sum(-1, keepdim=True).masked_fill(empty, 1.0)
    weights = raised / total
    if gain is not None:
        weights = weights * gain.double()
    lse = (shift + total.log()).masked_fill(empty, -torch.inf)
    return torch.einsum("bhij,bhje->bhie", weights, v), lse[..., 0]


def relative_values(table: RelativeTable) -> Tensor:
    """What a relative table says of every pair: `value[h, i, j] = table[h, key(j) - stride * query(i) + extent // 2]`.

    Args:
        table: the table; `fill` stands for offsets outside it and for pairs with a prefix token.

    Returns:
        (1, heads, Nq, Nk) in the table's dtype, differentiable.
    """
    sizes, prefix = table.grid.sizes, table.grid.prefix
    steps = (table.stride,) * len(sizes) if isinstance(table.stride, int) else table.stride
    keys = torch.tensor(list(itertools.product(*map(range, sizes))))
    queries = torch.tensor(list(itertools.product(*map(range, (0,) * len(sizes), sizes, steps))))
    extents = torch.tensor(table.table.shape[1:])
    spots = keys[None, :] - queries[:, None] + extents // 2
    inside = ((spots >= 0) & (spots < extents)).all(-1)
    spots = spots.where(inside[..., None], 0).to(table.table.device)
    values = table.table[(slice(None), *spots.unbind(-1))].where(inside.to(table.table.device), table.fill)
    return F.pad(values, (prefix, 0, prefix, 0), value=table.fill)[None]


def pair_values(values: PairValues | None) -> Tensor | None:
    """A bias or gain as a tensor that broadcasts to (B, heads, Nq, Nk), a relative table written out."""
    return relative_values(values) if isinstance(values, RelativeTable) else values


def expected(call: AttendCall) -> tuple[Tensor, Tensor]:
    """`dense_attention` of a call, such as one collected by `attnkit.kernels.recording`.

    Args:
        call: the call; keys that no query sees may hold anything, NaN included.

    Returns:
        out (B, heads, Nq, Dv) and lse (B, heads, Nq), both float64.
    """
    mask = call.layout.to_mask(call.q.device)
    seen = mask.any(-2)[..., None]
    bias, gain = pair_values(call.bias), pair_values(call.gain)
    return dense_attention(call.q, call.k.where(seen, 0.0), call.v.where(seen, 0.0), mask, call.scale, bias, gain)
