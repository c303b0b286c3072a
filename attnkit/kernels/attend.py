"""attend: softmax attention over a layout, on the backend that fits."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from attnkit.errors import ConfigError, shown
from attnkit.kernels import dispatch
from attnkit.kernels.call import AttendCall, PairValues, check_call, check_scale, check_tensors
from attnkit.kernels.precision import autocasting, without_autocast
from attnkit.layouts import Layout


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    bias: PairValues | None = None,
    gain: PairValues | None = None,
    backend: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    bias: PairValues | None = None,
    gain: PairValues | None = None,
    backend: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    bias: PairValues | None = None,
    gain: PairValues | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query over the keys that a layout lets it see.

    `out[i] = sum_j gain[i, j] * softmax_j(scale * q[i].k[j] + bias[i, j]) * v[j]`, j over the visible keys of i.
    A query that sees no key gets 0, lse = -inf and gradient 0.

    Args:
        q: queries (B, heads, Nq, D).
        k: keys (B, heads, Nk, D).
        v: values (B, heads, Nk, Dv).
        layout: which keys each query sees; see `attnkit.layouts`.
        scale: factor of the logits; D ** -0.5 where not given.
        bias: added to the logits: a tensor that broadcasts to (B, heads, Nq, Nk) with four dimensions, or an
            `attnkit.layouts.RelativeTable`.
        gain: factor of the weights after the softmax (the denominator does not see it), in the same forms.
        backend: name of the backend; else what `use_backend` or ATTNKIT_BACKEND asks for, else the cheapest that can.
        return_lse: also return the log of the softmax's denominator, (B, heads, Nq).

    Returns:
        out (B, heads, Nq, Dv) in v's dtype, or (out, lse).

    Raises:
        ShapeError: if shapes, dtypes or devices do not fit each other or the layout.
        BackendError: if a backend was asked for that cannot run the call, with its reasons.
    """
    if not isinstance(layout, Layout):
        masked = isinstance(layout, Tensor) and layout.dtype == torch.bool
        example = "TokenMask(mask)" if masked else "Dense(Nq, Nk)"
        raise ConfigError(f"attend needs a layout such as attnkit.layouts.{example}, but got {shown(layout)}")
    key, name = dispatch.recalled(q, k, v, layout, bias, gain, return_lse, scale, backend)
    if name is None:
        check_tensors(q, k, v)
    call = AttendCall(q, k, v, layout, q.shape[-1] ** -0.5 if scale is None else scale, bias, gain, return_lse)
    if name is None:
        check_call(call)
        name = dispatch.decided(call, backend, key)
    else:
        check_scale(call.scale)
    if autocasting(q.device):
        # The inputs already have the dtype autocast gave them; inside, float32 must stay float32.
        with without_autocast(q.device):
            result = dispatch.run(call, name, backend)
    else:
        result = dispatch.run(call, name, backend)
    if return_lse:
        assert result.lse is not None
        return result.out, result.lse
    return result.out
