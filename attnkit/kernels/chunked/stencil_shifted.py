"""Stencils by shifted maps: for every place of the window, one view of the padded maps of keys and values.

Nothing of the window's size is held, so that memory is O(N C) for N tokens of C channels, forward and backward: logits
are made for a few places at a time, and made again where they are needed again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.grid import Grid
from attnkit.kernels.ops.stencil import wide
from attnkit.layouts import Stencil


class _Maps:
    """Queries, keys and values as maps (B, heads, D, *sizes), and what each query finds at a place in them.

    Places are the prefix tokens, which every query sees, and then the window's, row-major. Channels come before the
    image's axes, because a number per query and place then multiplies whole rows of the image.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, layout: Stencil, scale: float, dtype: torch.dtype
    ) -> None:
        self.layout, self.prefix = layout, layout.grid.prefix
        self.views = _views(layout)
        image_sizes = layout.query_grid.sizes
        queries = (q.to(dtype) * scale).expand(-1, -1, math.prod(image_sizes), -1)
        self.q = _map(queries, image_sizes).contiguous()
        self.k, self.v = self._padded(k.to(dtype)), self._padded(v.to(dtype))
        if seen is None:
            seen = torch.ones(1, 1, layout.num_keys, dtype=torch.bool, device=q.device)
        self.seen = self._padded(seen[..., None])

    def _padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B, heads, N, D) -> the prefix tokens (B, heads, D, prefix), and the map with zeros around the grid."""
        image = _map(rows[:, :, self.prefix :], self.layout.grid.sizes)
        return rows[:, :, : self.prefix].transpose(2, 3), F.pad(image, _padding(self.layout))

    def cut(self, rows: tuple[Tensor, Tensor]) -> Tensor:
        """(B, heads, N, D) of prefix tokens and padded map."""
        first, image = rows
        for axis, margin in enumerate(_margins(self.layout)):
            image = image.narrow(3 + axis, margin, self.layout.grid.sizes[axis])
        return torch.cat([first, image.flatten(3)], dim=3).transpose(2, 3)

    def chunks(self) -> list[range]:
        """All places, as many at a time as make logits about as large as queries, keys and values are."""
        places = self.prefix + len(self.views)
        step = 2 * (self.q.shape[2] + self.v[1].shape[2])
        return [range(start, min(start + step, places)) for start in range(0, places, step)]

    def at(self, rows: tuple[Tensor, Tensor], place: int) -> Tensor:
        """A view that broadcasts to (B, heads, D, *query sizes)."""
        first, image = rows
        if place < self.prefix:
            return first[(..., place, *(None,) * self.layout.grid.ndim)]
        return image[(..., *self.views[place - self.prefix])]

    def products(self, one: Tensor, rows: tuple[Tensor, Tensor], places: range) -> Tensor:
        """Scalar products of a map with what stands at some places: (B, heads, places, *query sizes)."""
        return torch.stack([(one * self.at(rows, place)).sum(2) for place in places], dim=2)

    def logits(self, bias: Tensor | None, places: range) -> Tensor:
        """(B, heads, places, *query sizes), -inf where no key is seen."""
        logits = self.products(self.q, self.k, places)
        if bias is not None:
            logits = logits + bias[:, :, places.start : places.stop].to(logits.dtype)
        seen = [self.at(self.seen, place) for place in places]
        sizes = self.layout.query_grid.sizes
        hidden = ~torch.cat([one.expand(*one.shape[:3], *sizes) for one in seen], dim=2)
        return logits.masked_fill(hidden, -torch.inf)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    seen: Tensor | None,
    sizes: Sequence[int],
    prefix: int,
    kernels: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    clamped: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel of `attnkit::stencil`.

    The denominator is known before any value is added up, so that no sum outgrows the largest value.
    """
    dtype = wide(q, v)
    maps = _Maps(q, k, v, seen, _stencil(sizes, prefix, kernels, strides, dilations), scale, dtype)
    chunks = maps.chunks()
    logits = maps.logits(bias, chunks[0])
    peak = logits.amax(2)
    base = peak.masked_fill(peak == -torch.inf, 0.0)
    total = (logits - base[:, :, None]).exp().sum(2)
    for places in chunks[1:]:
        logits = maps.logits(bias, places)
        higher = torch.maximum(peak, logits.amax(2))
        base = higher.masked_fill(higher == -torch.inf, 0.0)
        total = total * (peak - base).exp() + (logits - base[:, :, None]).exp().sum(2)
        peak = higher
    total = total.masked_fill(peak == -torch.inf, 1.0)
    out = None
    for places in chunks:
        if len(chunks) > 1:
            logits = maps.logits(bias, places)
        weights = (logits - base[:, :, None]).exp() / total[:, :, None]
        if gain is not None:
            weights = weights * gain[:, :, places.start : places.stop].to(dtype)
        for at, place in enumerate(places):
            weight, value = weights[:, :, at, None], maps.at(maps.v, place)
            out = weight * value if out is None else out.addcmul_(weight, value)
    assert out is not None
    rows = out.flatten(3).permute(0, 3, 1, 2).contiguous().transpose(1, 2)
    return rows, total.flatten(2), peak.flatten(2)


def backward(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    grad_peak: None,
    out: Tensor,
    total: Tensor,
    peak: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    seen: Tensor | None,
    sizes: Sequence[int],
    prefix: int,
    kernels: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    clamped: bool,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """A kernel of `attnkit::stencil_backward`, which makes the weights again instead of keeping them.

    With weights p and `reached = gain * grad_out . v`, the logits get `p * (reached - mean)`. `mean` is the average of
    what is reached, which is `grad_out . out`, less what arrives at the lse.

    Returns:
        Gradients of q, k, v, bias and gain, in any dtype.
    """
    dtype = wide(q, v)
    maps = _Maps(q, k, v, seen, _stencil(sizes, prefix, kernels, strides, dilations), scale, dtype)
    image_sizes = maps.layout.query_grid.sizes
    grad = torch.zeros_like(out) if grad_out is None else grad_out
    mean = (grad * out).sum(3)
    if grad_total is not None:
        mean = mean - grad_total * total
    grad = _map(grad, image_sizes).contiguous()
    base = peak.masked_fill(peak == -torch.inf, 0.0)
    mean, total, base = (one.unflatten(2, image_sizes)[:, :, None] for one in (mean, total, base))
    grad_q = torch.zeros_like(maps.q)
    grad_k, grad_v = ((torch.zeros_like(first), torch.zeros_like(image)) for first, image in (maps.k, maps.v))
    grads_bias, grads_gain = [], []
    for places in maps.chunks():
        weights = (maps.logits(bias, places) - base).exp() / total
        reached = maps.products(grad, maps.v, places)
        gained = weights
        if gain is not None:
            factor = gain[:, :, places.start : places.stop].to(dtype)
            grads_gain.append((weights * reached).sum_to_size(factor.shape))
            reached, gained = reached * factor, weights * factor
        pull = weights * (reached - mean)
        if bias is not None:
            grads_bias.append(pull.sum_to_size(*bias.shape[:2], len(places), *bias.shape[3:]))
        for at, place in enumerate(places):
            share, step = gained[:, :, at, None], pull[:, :, at, None]
            grad_q.addcmul_(step, maps.at(maps.k, place))
            _add(maps.at(grad_k, place), step, maps.q)
            _add(maps.at(grad_v, place), share, grad)
    grad_q = (grad_q * scale).flatten(3).transpose(2, 3)
    tables = (torch.cat(one, dim=2) if one else None for one in (grads_bias, grads_gain))
    return [grad_q, maps.cut(grad_k), maps.cut(grad_v), *tables]


def _add(target: Tensor, one: Tensor, other: Tensor) -> None:
    """Adds a product to a view, which for a prefix token is one place that all queries share."""
    if target.shape[3:] == other.shape[3:]:
        target.addcmul_(one, other)
    else:
        target.add_((one * other).sum_to_size(target.shape))


def _map(rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(B, heads, N, D) -> (B, heads, D, *sizes)."""
    return rows.transpose(2, 3).unflatten(3, sizes)


def _stencil(
    sizes: Sequence[int], prefix: int, kernels: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Stencil:
    grid = Grid(*sizes, prefix=prefix)
    return Stencil(grid, tuple(kernels), stride=tuple(strides), dilation=tuple(dilations))


def _margins(layout: Stencil) -> list[int]:
    """Per axis, by how many tokens a window reaches over the edge."""
    return [size // 2 * step for size, step in zip(layout.kernels, layout.dilations, strict=True)]


def _padding(layout: Stencil) -> list[int]:
    return [margin for margin in reversed(_margins(layout)) for _ in range(2)]


def _views(layout: Stencil) -> list[tuple[slice, ...]]:
    """For every place of the window, row-major, the slices of a padded map that hold its key for all queries."""
    sizes = layout.query_grid.sizes
    axes = [
        [slice(tap * far, tap * far + (size - 1) * step + 1, step) for tap in range(kernel)]
        for kernel, far, step, size in zip(layout.kernels, layout.dilations, layout.strides, sizes, strict=True)
    ]
    return list(itertools.product(*axes))
