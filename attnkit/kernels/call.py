"""AttendCall: one attention problem, checked once, as every backend gets it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from attnkit.errors import ShapeError, shown
from attnkit.kernels.transforms import differentiating
from attnkit.layouts import Layout, RelativeTable
from attnkit.layouts.base import form_of

PairValues: TypeAlias = "Tensor | RelativeTable"


class AttendResult(NamedTuple):
    """What a backend returns: `out` (B, heads, Nq, Dv) and, if asked for, `lse` (B, heads, Nq)."""

    out: Tensor
    lse: Tensor | None


@dataclass(frozen=True, eq=False)
class AttendCall:
    """softmax over visible keys of scale * q.k + bias, times gain, times v.

    Attributes:
        q: (B, heads, Nq, D).
        k: (B, heads, Nk, D).
        v: (B, heads, Nk, Dv); may have another dtype than q and k.
        layout: which keys each query sees.
        scale: factor of the logits.
        bias: added to the logits: a tensor that broadcasts to (B, heads, Nq, Nk), a `RelativeTable`, or None.
        gain: factor of the weights after the softmax, in the same forms.
        return_lse: whether the log of the softmax's denominator is asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    scale: float
    bias: PairValues | None = None
    gain: PairValues | None = None
    return_lse: bool = False

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass may follow."""
        if not torch.is_grad_enabled():
            return False
        if self.q.requires_grad or self.k.requires_grad or self.v.requires_grad:
            return True
        extra = [one.table if isinstance(one, RelativeTable) else one for one in (self.bias, self.gain)]
        return any(tensor is not None and tensor.requires_grad for tensor in extra)

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, else float32."""
        return torch.float64 if torch.float64 in (self.q.dtype, self.v.dtype) else torch.float32

    def pair_values(self, values: PairValues | None) -> Tensor | None:
        """Bias or gain as a tensor of four dimensions that broadcasts to (B, heads, Nq, Nk)."""
        if isinstance(values, RelativeTable):
            return values.dense(self.layout.num_queries)
        return values

    def pairs_at(self, values: PairValues | None, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Bias or gain at pairs of tokens.

        Args:
            values: bias or gain of this call.
            queries: int64 (B or 1, heads or 1, ...) query numbers; negative ones give any value.
            keys: int64 key numbers that broadcast with `queries`.
        """
        if values is None:
            return None
        if isinstance(values, RelativeTable):
            return values.lookup(queries, keys)
        # What broadcasts is looked up once for all queries or keys.
        rows, columns = values.shape[2:]
        spot = queries.new_zeros((1,) * queries.ndim)
        if rows > 1:
            spot = queries.clamp(min=0) * columns
        if columns > 1:
            spot = spot + keys.clamp(min=0)
        lead = torch.broadcast_shapes(values.shape[:2], queries.shape[:2], keys.shape[:2])
        if rows == 1 and columns > 1:
            found = _per_key(values[:, :, 0], spot, lead)
        else:
            spot = spot.expand(*lead, *spot.shape[2:])
            found = values.flatten(2).expand(*lead, -1).gather(2, spot.flatten(2)).view(spot.shape)
        return found.expand(*lead, *torch.broadcast_shapes(queries.shape[2:], keys.shape[2:]))

    def replace(self, **changes: object) -> AttendCall:
        """A copy with other fields."""
        return replace(self, **changes)  # type: ignore[arg-type]


def _per_key(row: Tensor, keys: Tensor, lead: torch.Size) -> Tensor:
    """A number of each key, (B or 1, heads or 1, Nk), at an index (B or 1, heads or 1, ...), which names keys often.

    By indexing, whose backward pass sorts the index and adds up in order: that of `gather` adds on a GPU as threads
    come, with other bits every time.
    """
    if keys.shape[:2] == (1, 1):
        return row[:, :, keys[0, 0]].expand(*lead, *keys.shape[2:])
    items, heads = (
        torch.arange(size, device=keys.device) if varies > 1 else torch.zeros(1, dtype=torch.int64, device=keys.device)
        for size, varies in zip(lead, row.shape[:2], strict=True)
    )
    inner = (1,) * (keys.ndim - 2)
    return row[items.view(-1, 1, *inner), heads.view(1, -1, *inner), keys].expand(*lead, *keys.shape[2:])


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises `ShapeError` with one sentence for q, k and v that do not fit each other."""
    for name, one in (("q", q), ("k", k), ("v", v)):
        if not isinstance(one, Tensor):
            raise ShapeError(f"attend needs q, k and v as tensors, but got {shown(one)} as {name}")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ShapeError(f"attend needs q, k and v of shape (B, heads, N, D), but got {_shapes(q, k, v)}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ShapeError(
            f"attend needs q (B, heads, Nq, D), k (B, heads, Nk, D) and v (B, heads, Nk, Dv) to agree, "
            f"but got {_shapes(q, k, v)}"
        )
    if not q.shape[1] or not q.shape[3] or not v.shape[3]:
        raise ShapeError(f"attend needs at least one head and widths >= 1, but got {_shapes(q, k, v)}")
    if not q.is_floating_point() or q.dtype != k.dtype or not v.is_floating_point():
        raise ShapeError(
            f"attend needs floating q and k of one dtype and a floating v, but got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ShapeError(f"attend needs q, k and v on one device, but got {q.device}, {k.device} and {v.device}")


def check_call(call: AttendCall) -> None:
    """Raises `ShapeError` with one sentence for a layout, scale, bias or gain that does not fit q, k and v."""
    q, layout = call.q, call.layout
    if (layout.num_queries, layout.num_keys) != (q.shape[2], call.k.shape[2]):
        swapped = (layout.num_queries, layout.num_keys) == (q.shape[1], call.k.shape[1])
        hint = "; (B, N, heads, D) becomes (B, heads, N, D) by transpose(1, 2)" * swapped
        raise ShapeError(
            f"the {layout.kind} layout is for {layout.num_queries} queries and {layout.num_keys} keys, "
            f"but got {_shapes(q, call.k, call.v)}{hint}"
        )
    for lead in (layout.lead, *(hint.shape[:2] for hint in layout.hints)):
        for varies, size, what in zip(lead, q.shape[:2], ("items", "heads"), strict=True):
            if varies not in (1, size):
                shapes = _shapes(q, call.k, call.v)
                raise ShapeError(f"the {layout.kind} layout varies over {varies} {what}, but got {shapes} of {size}")
    for table in (*layout.tables, *layout.hints):
        if table.device != q.device:
            raise ShapeError(f"the {layout.kind} layout lies on {table.device}, but q, k and v lie on {q.device}")
    check_scale(call.scale)
    for name, values in (("bias", call.bias), ("gain", call.gain)):
        if isinstance(values, RelativeTable):
            _check_table(name, values, call)
            _check_device(name, values.table, call)
        elif values is not None:
            _check_pairs(name, values, call)
            _check_device(name, values, call)


def check_scale(scale: float) -> None:
    """Raises `ShapeError` with one sentence for anything but a finite number."""
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or not -math.inf < scale < math.inf or (type(scale) is int and abs(scale) >= 2**63):
        raise ShapeError(f"attend needs a finite number as scale, or None for D ** -0.5, but got {shown(scale)}")


def signature_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    bias: PairValues | None,
    gain: PairValues | None,
    return_lse: bool,
    scale: float | None,
) -> Hashable | None:
    """All that backends may look at beforehand: calls whose signatures are equal get the same backend.

    None where that cannot be said, as for layouts of an unknown kind and inputs that are no tensors.
    """
    form = layout.signature
    if form is None or not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return None
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    pairs: Hashable = None
    if bias is not None or gain is not None:
        pairs = (_form(bias), _form(gain))
    return (
        *(form, pairs, return_lse, scale, grad, torch.is_grad_enabled(), differentiating()),
        *(q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device),
    )


def _form(values: PairValues | None) -> Hashable:
    if isinstance(values, RelativeTable):
        stride = tuple(values.stride) if isinstance(values.stride, list) else values.stride
        return type(values), form_of(values.table), values.table.requires_grad, values.grid, stride, values.fill
    if values is None:
        return None
    # Anything else is refused with a sentence where it is looked at more closely.
    return (form_of(values), values.requires_grad) if isinstance(values, Tensor) else shown(values)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_pairs(name: str, values: Tensor, call: AttendCall) -> None:
    if not isinstance(values, Tensor):
        raise ShapeError(f"{name} must be a tensor or a RelativeTable, but got {shown(values)}")
    full = (*call.q.shape[:3], call.k.shape[2])
    fits = values.ndim == 4 and all(one in (1, size) for one, size in zip(values.shape, full, strict=True))
    if not fits or not values.is_floating_point():
        raise ShapeError(
            f"{name} must be floating and broadcast to (B, heads, Nq, Nk) = {full}, "
            f"but got {values.dtype} {tuple(values.shape)}"
        )


def _check_device(name: str, values: Tensor, call: AttendCall) -> None:
    if values.device != call.q.device:
        raise ShapeError(f"{name} lies on {values.device}, but q, k and v lie on {call.q.device}")


def _check_table(name: str, values: RelativeTable, call: AttendCall) -> None:
    layout, grid = call.layout, values.grid
    queries = grid.strided(values.stride).tokens
    if values.table.shape[0] != call.q.shape[1] or (queries, grid.tokens) != (layout.num_queries, layout.num_keys):
        raise ShapeError(
            f"{name} is a relative table for {values.table.shape[0]} heads, {queries} queries and {grid.tokens} keys, "
            f"but the call has {call.q.shape[1]} heads, {layout.num_queries} queries and {layout.num_keys} keys"
        )
