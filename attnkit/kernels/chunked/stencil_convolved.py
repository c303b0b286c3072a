"""Stencils whose queries are all the same, as learned queries are: two convolutions, divided by each other.

The logit of a pair is then a number of the key plus a number of the place, so that with scores s and biases b

    out[i] = sum_t gain[t] exp(b[t]) (exp(s[i + t]) v[i + t]) / sum_t exp(b[t]) exp(s[i + t])

is a depthwise convolution of a map over another. The largest score and bias are subtracted first. That is exact as long
as no window's terms underflow, which holds where scores and biases lie within `SPREAD` of each other; other calls are
refused. Memory is O(N C), whatever the window: pieces of the map are made as large as the cache.

Maps are (B, H, W, heads, D), the order of tokens, and margins are written out as zeros: the convolutions that pad for
themselves are fifty times slower where the margin exceeds what PyTorch's CPU library is made for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.kernels.ops.stencil import wide

# How far apart scores and biases may lie, so that a window's largest term, its inverse and both times any gradient can
# be held: float32 ends at exp(88), float64 at exp(709).
SPREAD = {torch.float32: 60.0, torch.float64: 500.0}
INF = float("inf")
# Bytes of a piece of the map.
PIECE = 2**20
# Channels of a piece where windows have `LARGE` places or more: oneDNN's depthwise convolutions of such windows take up
# to four times as long where channels are a multiple of 32.
CHANNELS = 16
LARGE = 100


class _Piece(NamedTuple):
    """Some images, heads, channels and rows of queries, with the rows of keys that they see.

    `rows` of the padded map hold keys `inside`, from row `margin` on; the rest lies outside the image.
    """

    images: slice
    heads: slice
    channels: slice
    queries: slice
    inside: slice
    margin: int
    rows: int


class Windows:
    """What forward and backward have in common.

    Attributes:
        fits: whether the numbers allow for this way.
    """

    def __init__(
        self,
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
    ) -> None:
        line = (1,) * (2 - len(sizes))
        self.sizes, self.kernels = (*line, *sizes), (*line, *kernels)
        self.strides, self.dilations, self.prefix = (*line, *strides), (*line, *dilations), prefix
        self.out_sizes = [(size - 1) // step + 1 for size, step in zip(self.sizes, self.strides, strict=True)]
        self.margins = [size // 2 * far for size, far in zip(self.kernels, self.dilations, strict=True)]
        self.v, self.dtype, self.batch, self.heads = v, wide(q, v), v.shape[0], v.shape[1]
        scores = _products(k.to(self.dtype), q.to(self.dtype) * scale)
        low = high = scores.contiguous()
        # Windows may be without keys: a bias of -inf hides them as a mask does.
        self.gaps = seen is not None or bias is not None
        if seen is not None:
            low, high, scores = (one.masked_fill(~seen, end) for one, end in ((low, INF), (high, -INF), (scores, -INF)))
        peak = high.amax(2, keepdim=True)
        spread = (peak - low.amin(2, keepdim=True)).amax()
        count = prefix + self.kernels[0] * self.kernels[1]
        biases = scores.new_zeros(1, count) if bias is None else bias[0, :, :].flatten(1).to(self.dtype)
        top = biases.amax(1, keepdim=True)
        spread = spread + (top - biases.where(biases > -torch.inf, top).amin(1, keepdim=True)).amax()
        self.fits = bool(spread <= SPREAD[self.dtype])
        # A place's factor of the denominator, and of the numerator: (heads, places).
        self.below = (biases - top).exp().expand(self.heads, -1)
        self.gain = None if gain is None else gain[0].flatten(1).to(self.dtype)
        self.above = self.below if self.gain is None else self.below * self.gain
        self.raised = (scores - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
        self.peak = peak + top
        self._form: tuple[tuple[int, ...], int, int] | None = None
        self._padded = self.raised

    def span(self, axis: int, queries: int) -> int:
        """How many tokens along an axis so many queries see, margins included."""
        return (queries - 1) * self.strides[axis] + (self.kernels[axis] - 1) * self.dilations[axis] + 1

    def pieces(self, width: int) -> Iterator[_Piece]:
        """The map in pieces, for `width` numbers per token and head."""
        large = self.kernels[0] * self.kernels[1] >= LARGE
        channels = min(CHANNELS, width) if large else width
        height, row = self.out_sizes[0], self.dtype.itemsize * channels * self.span(1, self.out_sizes[1])
        fit = max(PIECE // (row * self.span(0, height)), 1)
        if large:
            fit = min(fit, max(CHANNELS // channels, 1))
        # As many in each piece, or nearly.
        heads = -(-self.heads // -(-self.heads // fit))
        images = max(fit // self.heads, 1)
        rows = height
        if row * self.span(0, height) > 2 * PIECE:
            # Half of a piece may be rows that its neighbours make as well.
            halo = self.span(0, 1)
            rows = min(height, max((PIECE // row - halo) // self.strides[0], halo // self.strides[0], 1))
        parts = itertools.product(
            range(0, self.batch, images), range(0, self.heads, heads), range(0, width, channels), range(0, height, rows)
        )
        for image, head, channel, first in parts:
            last = min(first + rows, height)
            start, seen = first * self.strides[0] - self.margins[0], self.span(0, last - first)
            inside = slice(max(start, 0), min(start + seen, self.sizes[0]))
            yield _Piece(
                slice(image, image + images),
                slice(head, min(head + heads, self.heads)),
                slice(channel, channel + channels),
                slice(first, last),
                inside,
                inside.start - start,
                seen,
            )

    def all(self) -> _Piece:
        """The whole map as one piece."""
        inside = slice(0, min(self.sizes[0], self.span(0, self.out_sizes[0]) - self.margins[0]))
        everything = slice(0, self.out_sizes[0])
        return _Piece(
            slice(None), slice(None), slice(None), everything, inside, self.margins[0], self.span(0, self.out_sizes[0])
        )

    def keys(self, rows: Tensor, piece: _Piece) -> Tensor:
        """(B, heads, N, ...) at a piece's keys: a view (B, H, W, heads, ...)."""
        image = rows[piece.images, piece.heads, self.prefix :].transpose(1, 2).unflatten(1, self.sizes)
        return image[:, piece.inside, : self._columns()]

    def queries(self, rows: Tensor, piece: _Piece) -> Tensor:
        """(B, heads, Nq, ...) at a piece's queries: a view (B, H', W', heads, ...)."""
        image = rows[piece.images, piece.heads].transpose(1, 2).unflatten(1, self.out_sizes)
        return image[:, piece.queries]

    def inner(self, padded: Tensor, piece: _Piece) -> Tensor:
        """What of a piece's padded map lies inside the image."""
        rows = piece.inside.stop - piece.inside.start
        return padded[:, piece.margin : piece.margin + rows, self.margins[1] : self.margins[1] + self._columns()]

    def _columns(self) -> int:
        return min(self.sizes[1], self.span(1, self.out_sizes[1]) - self.margins[1])

    def lifted(self, piece: _Piece) -> Tensor:
        """exp(s) v with margins of zeros: (images, rows, columns, heads, Dv)."""
        v = self.keys(self.v, piece)[..., piece.channels]
        padded = self._margined(piece, v.shape[0], *v.shape[3:])
        torch.mul(v, self.keys(self.raised, piece)[..., None], out=self.inner(padded, piece))
        return padded

    def bare(self, piece: _Piece) -> Tensor:
        """exp(s) with margins of zeros: (images, rows, columns, heads, 1)."""
        raised = self.keys(self.raised, piece)[..., None]
        padded = self._margined(piece, raised.shape[0], raised.shape[3], 1)
        self.inner(padded, piece).copy_(raised)
        return padded

    def _margined(self, piece: _Piece, images: int, heads: int, width: int) -> Tensor:
        """Zeros, of which only the margins are zeros where a piece of the same form was there before."""
        shape = (images, piece.rows, self.span(1, self.out_sizes[1]), heads, width)
        form = (shape, piece.margin, piece.inside.stop - piece.inside.start)
        if self._form != form:
            self._form, self._padded = form, self.raised.new_zeros(shape)
        return self._padded

    def gathered(self, padded: Tensor, factors: Tensor) -> Tensor:
        """What every query finds in its window of a padded map, times the places' factors (heads, places)."""
        kernel = self._kernel(factors, padded.shape[4])
        image = padded.flatten(3).permute(0, 3, 1, 2)
        found = F.conv2d(image, kernel, None, self.strides, 0, self.dilations, kernel.shape[0])
        return found.permute(0, 2, 3, 1).unflatten(3, padded.shape[3:])

    def spread_out(self, found: Tensor, factors: Tensor) -> Tensor:
        """The transpose of `gathered`: every query gives to its window."""
        kernel = self._kernel(factors, found.shape[4])
        image = found.flatten(3).permute(0, 3, 1, 2)
        padded = F.conv_transpose2d(image, kernel, None, self.strides, 0, 0, kernel.shape[0], self.dilations)
        return padded.permute(0, 2, 3, 1).unflatten(3, found.shape[3:])

    def correlated(self, padded: Tensor, found: Tensor) -> Tensor:
        """The gradient of `gathered` by its factors, without the prefix: (heads, places of the window).

        A convolution over the padded map whose kernel is the map of queries, strides and dilations in each other's
        place; the one that PyTorch has for it is a hundred times slower.
        """
        image, kernel = (one.flatten(3).permute(0, 3, 1, 2) for one in (padded, found))
        image = image.flatten(0, 1)[None]
        kernel = kernel.flatten(0, 1)[:, None]
        each = F.conv2d(image, kernel, None, self.dilations, 0, self.strides, kernel.shape[0])
        return each.view(-1, *padded.shape[3:], self.kernels[0] * self.kernels[1]).sum((0, 2))

    def _kernel(self, factors: Tensor, width: int) -> Tensor:
        kernel = factors[:, None, self.prefix :].expand(-1, width, -1)
        return kernel.reshape(-1, 1, *self.kernels)

    def first(self, rows: Tensor) -> Tensor:
        """The prefix of (B, heads, N, ...)."""
        return rows[:, :, : self.prefix]


def forward(windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel of `attnkit::stencil`, for numbers that fit."""
    whole, below, above = windows.all(), windows.below[:, : windows.prefix], windows.above[:, : windows.prefix]
    shared = windows.first(windows.raised)
    total = windows.gathered(windows.bare(whole), windows.below)[..., 0]
    total = total.flatten(1, 2).transpose(1, 2)
    more = None
    if windows.prefix:
        total = total + (shared * below).sum(2, keepdim=True)
        more = ((shared * above)[..., None] * windows.first(windows.v)).sum(2)[:, None, None]
    peak = windows.peak.expand(total.shape)
    if windows.gaps:
        empty = total == 0.0
        total, peak = total.masked_fill(empty, 1.0), peak.masked_fill(empty, -INF)
    share = total.reciprocal()
    batch, heads, _, width = windows.v.shape
    out = total.new_empty(batch, total.shape[2], heads, width).transpose(1, 2)
    for piece in windows.pieces(width):
        found = windows.gathered(windows.lifted(piece), windows.above[piece.heads])
        if more is not None:
            found += more[piece.images, :, :, piece.heads, piece.channels]
        torch.mul(found, windows.queries(share, piece)[..., None], out=windows.queries(out, piece)[..., piece.channels])
    return out, total.contiguous(), peak.contiguous()


def backward(
    windows: Windows,
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    out: Tensor,
    total: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """A kernel of `attnkit::stencil_backward`, for numbers that fit: gradients of q, k, v, bias and gain."""
    grad = torch.zeros_like(out) if grad_out is None else grad_out
    share = total.reciprocal()
    mean = (grad * out).sum(3)
    if grad_total is not None:
        mean = mean - grad_total * total
    # What arrives at the denominators.
    under = (mean * share).neg_()
    grad_v = torch.zeros_like(windows.v, dtype=windows.dtype)
    grad_above, grad_below = torch.zeros_like(windows.above), torch.zeros_like(windows.below)
    arriving = share.new_zeros(*share.shape[:2], grad.shape[3])
    whole, prefix = windows.all(), windows.prefix
    grad_raised = torch.zeros_like(windows.raised)
    below = windows.queries(under, whole)[..., None].contiguous()
    back = windows.spread_out(below, windows.below)
    windows.keys(grad_raised, whole).add_(windows.inner(back, whole)[..., 0])
    tables = needs[3] or needs[4]
    if tables:
        grad_below[:, prefix:] = windows.correlated(windows.bare(whole), below)
    for piece in windows.pieces(grad.shape[3]):
        weighted = windows.queries(grad, piece)[..., piece.channels] * windows.queries(share, piece)[..., None]
        weighted = weighted.contiguous()
        if prefix:
            arriving[piece.images, piece.heads, piece.channels] += weighted.sum((1, 2))
        if tables:
            grad_above[piece.heads, prefix:] += windows.correlated(windows.lifted(piece), weighted)
        back = windows.inner(windows.spread_out(weighted, windows.above[piece.heads]), piece)
        windows.keys(grad_raised, piece).add_((back * windows.keys(windows.v, piece)[..., piece.channels]).sum(4))
        windows.keys(grad_v, piece)[..., piece.channels].addcmul_(back, windows.keys(windows.raised, piece)[..., None])
    if prefix:
        _prefix_gradients(windows, arriving, under.sum(2), grad_v, grad_raised, grad_above, grad_below)
    pull = grad_raised.mul_(windows.raised)[..., None]
    grad_q = (pull * k).sum(2, keepdim=True) * scale if needs[0] else None
    grad_k = pull * (q.to(windows.dtype) * scale) if needs[1] else None
    by_gain = windows.gain if windows.gain is not None else 1.0
    grad_bias = (grad_above * by_gain + grad_below) * windows.below if needs[3] else None
    grad_gain = grad_above * windows.below if needs[4] else None
    return [grad_q, grad_k, grad_v, grad_bias, grad_gain]


def _prefix_gradients(
    windows: Windows,
    arriving: Tensor,
    under: Tensor,
    grad_v: Tensor,
    grad_raised: Tensor,
    grad_above: Tensor,
    grad_below: Tensor,
) -> None:
    """Adds what all queries together give the prefix tokens, `arriving` (B, heads, Dv) at their values."""
    prefix, raised = windows.prefix, windows.first(windows.raised)
    above, below = windows.above[:, :prefix], windows.below[:, :prefix]
    reached = (windows.first(windows.v) * arriving[:, :, None]).sum(3)
    windows.first(grad_v).add_((raised * above)[..., None] * arriving[:, :, None])
    windows.first(grad_raised).add_(reached * above + under[..., None] * below)
    grad_above[:, :prefix] += (raised * reached).sum(0)
    grad_below[:, :prefix] += (raised * under[..., None]).sum(0)


def _products(k: Tensor, q: Tensor) -> Tensor:
    """Logits of one query: (B, heads, Nk, D) and (B, heads, 1, D) -> (B, heads, Nk)."""
    if k.shape[3] == 1:
        return (k * q)[..., 0]
    return torch.matmul(k, q.transpose(2, 3))[..., 0]
