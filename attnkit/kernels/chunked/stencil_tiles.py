"""Stencils whose queries differ, as those of neighborhood attention do: tiles of queries over all keys they reach.

The windows of neighbouring queries share most of their keys. So a tile of queries and the keys that any of them sees
(its halo) are copied beside each other and multiplied as matrices; what a query does not see of the halo is masked.
With tiles of 8 x 8 and windows of 7 x 7, a query meets 196 keys for the 49 it sees, and a key is copied three times
instead of 49. A few tiles are computed at a time, and their weights are made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.kernels.chunked.sizes import CACHE, cut
from attnkit.kernels.chunked.stencil_halos import Halos
from attnkit.kernels.ops.stencil import places, wide
from attnkit.layouts import Stencil


class _Tiles:
    """What forward and backward have in common: the rows of some pairs (item, head) in some tiles.

    A pair is a number, item * heads + head.
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
        layout = Stencil(
            Grid(*sizes, prefix=prefix),
            tuple(kernels),
            stride=tuple(strides),
            dilation=tuple(dilations),
            border="clamp" if clamped else "mask",
        )
        self.halos, self.scale, self.seen = Halos(layout), scale, seen
        self.batch, self.heads = q.shape[:2]
        self.q, self.k, self.v = q.expand(-1, -1, self.halos.queries, -1), k, v
        self.bias, self.gain = (None if one is None else self._by_query(one) for one in (bias, gain))
        self.places = places(list(kernels), prefix)
        self.like = q.new_empty(0, dtype=wide(q, v))
        self.pairs = self.batch * self.heads

    def pieces(self) -> Iterator[tuple[range, tuple[int, int]]]:
        """Pairs and tiles, first and last + 1, that are worked on together."""
        halos = self.halos
        logits = halos.slots * halos.keys * self.like.element_size()
        if halos.tiles * logits <= CACHE:
            for first, last in cut(self.pairs, halos.tiles * logits):
                yield range(first, last), (0, halos.tiles)
        else:
            for pair in range(self.pairs):
                for piece in cut(halos.tiles, logits):
                    yield range(pair, pair + 1), piece

    def put(self, rows: Tensor, tokens: Tensor, pairs: range) -> Tensor:
        """Rows (B, heads, N, D) at tokens (tiles, n) of some pairs: (pairs * tiles, n, D), widened."""
        flat = tokens.flatten()
        found = rows.new_empty(len(pairs), len(flat), rows.shape[3])
        for target, pair in zip(found, pairs, strict=True):
            torch.index_select(rows[divmod(pair, self.heads)], 0, flat, out=target)
        return found.to(self.like.dtype).view(-1, tokens.shape[1], rows.shape[3])

    def put_queries(self, rows: Tensor, pairs: range, tiles: tuple[int, int]) -> Tensor:
        """Rows (B, heads, queries, D) of tiles' queries: (pairs * tiles, T, D), zeros where a tile has none."""
        query = self.halos.query[slice(*tiles)]
        found = self.put(rows, query.clamp(min=0), pairs)
        if not self.halos.full:
            found.view(len(pairs), *query.shape, -1).masked_fill_((query < 0)[..., None], 0.0)
        return found

    def take_queries(self, tiled: Tensor, rows: Tensor) -> None:
        """Back from (pairs, all tiles * T, D) into rows (B, heads, queries, D)."""
        for pair, one in enumerate(tiled):
            at = divmod(pair, self.heads)
            if rows.dtype == one.dtype:
                torch.index_select(one, 0, self.halos.slot, out=rows[at])
            else:
                rows[at] = one.index_select(0, self.halos.slot)

    def weights(self, q: Tensor, k: Tensor, pairs: range, tiles: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax over what each query sees (pairs * tiles, T, U), largest logits (pairs * tiles, T), and whether
        they see nothing."""
        logits = torch.bmm(q, k.transpose(1, 2))
        shape = (len(pairs), tiles[1] - tiles[0], *logits.shape[1:])
        view = logits.view(shape)
        view += self.halos.mask(*tiles, self.like)
        if self.bias is not None:
            view += self.at_places(self.bias, pairs, tiles)
        if self.seen is not None:
            near = self.seen[..., self.halos.keys_of(*tiles)].expand(self.batch, self.heads, -1, -1).flatten(0, 1)
            view.masked_fill_(~near[pairs.start : pairs.stop, :, None], -torch.inf)
        peak = logits.amax(-1)
        empty = peak == -torch.inf
        weights = logits.softmax(-1)
        if self.seen is not None or self.bias is not None or not self.halos.full:
            weights.masked_fill_(empty[..., None], 0.0)
        return weights, peak, empty

    def _by_query(self, values: Tensor) -> Tensor:
        """Bias or gain as (B or 1, heads or 1, places, queries), or 1 for all queries."""
        if values[0, 0, 0].numel() > 1:
            values = values.expand(*values.shape[:3], *self.halos.sizes)
        return values.flatten(3)

    def at_places(self, values: Tensor, pairs: range, tiles: tuple[int, int]) -> Tensor:
        """Bias or gain by place as (pairs, tiles, T, U), any where nothing is seen."""
        count = values.shape[3]
        spots = self.halos.places(*tiles)
        if count > 1:
            spots = spots * count + self.halos.query[slice(*tiles)].clamp(min=0)[..., None]
        flat = values.expand(self.batch, self.heads, -1, -1).flatten(2)
        rows = torch.stack([flat[divmod(pair, self.heads)] for pair in pairs])
        return rows.index_select(1, spots.flatten()).view(len(pairs), *spots.shape).to(self.like.dtype)

    def add_places(self, values: Tensor, total: Tensor, pairs: range, tiles: tuple[int, int]) -> None:
        """Adds values (pairs * tiles, T, U) of pairs to `total` (B * heads, places, queries or 1)."""
        spots, there = self.halos.spots(*tiles)
        values = values.view(len(pairs), -1, *values.shape[1:])
        found = values.gather(-1, spots.expand(len(pairs), -1, -1, -1)).mul_(there)
        part = total[pairs.start : pairs.stop]
        if total.shape[2] == 1:
            part += found.sum((1, 2))[..., None]
        else:
            query = self.halos.query[slice(*tiles)].flatten()
            kept = query >= 0
            part.index_copy_(2, query[kept], found.flatten(1, 2)[:, kept].transpose(1, 2))

    def no_places(self, values: Tensor) -> Tensor:
        """Zeros for `add_places` to add to."""
        return self.like.new_zeros(self.pairs, self.places, values.shape[3])


def forward(*given: object) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel of `attnkit::stencil`."""
    tiles = _Tiles(*given)  # type: ignore[arg-type]
    halos, value_width = tiles.halos, tiles.v.shape[3]
    tiled = tiles.like.new_empty(tiles.pairs, halos.tiles * halos.slots, value_width)
    numbers = tiles.like.new_empty(2, tiles.pairs, halos.tiles * halos.slots)
    for pairs, some in tiles.pieces():
        key, part = halos.keys_of(*some), slice(some[0] * halos.slots, some[1] * halos.slots)
        q = tiles.put_queries(tiles.q, pairs, some).mul_(tiles.scale)
        weights, peak, empty = tiles.weights(q, tiles.put(tiles.k, key, pairs), pairs, some)
        # The largest weight is one over the denominator.
        total = weights.amax(-1).reciprocal_().masked_fill_(empty, 1.0)
        if tiles.gain is not None:
            weights.view(len(pairs), -1, *weights.shape[1:]).mul_(tiles.at_places(tiles.gain, pairs, some))
        found = torch.bmm(weights, tiles.put(tiles.v, key, pairs))
        rows = slice(pairs.start, pairs.stop)
        tiled[rows, part] = found.view(len(pairs), -1, value_width)
        for target, one in zip(numbers, (total, peak), strict=True):
            target[rows, part] = one.view(len(pairs), -1)
    shape = (tiles.batch, tiles.heads, halos.queries)
    out = tiles.like.new_empty(tiles.batch, halos.queries, tiles.heads, value_width).transpose(1, 2)
    tiles.take_queries(tiled, out)
    total, peak = (one.index_select(1, halos.slot).view(shape) for one in numbers)
    return out, total, peak


def backward(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    grad_peak: None,
    out: Tensor,
    total: Tensor,
    peak: Tensor,
    *given: object,
) -> list[Tensor | None]:
    """A kernel of `attnkit::stencil_backward`.

    With weights p and `reached = gain * grad_out . v`, the logits get `p * (reached - mean)`. `mean` is the average of
    what is reached, which is `grad_out . out`, less what arrives at the lse.

    Returns:
        Gradients of q, k, v, bias and gain, in any dtype.
    """
    tiles = _Tiles(*given[:-1])  # type: ignore[arg-type]
    halos = tiles.halos
    grad = torch.zeros_like(out) if grad_out is None else grad_out
    mean = (grad * out).sum(3)
    if grad_total is not None:
        mean = mean - grad_total * total
    grad_q = tiles.like.new_empty(tiles.pairs, halos.tiles * halos.slots, tiles.q.shape[3])
    grad_k, grad_v = (tiles.like.new_zeros(tiles.pairs, *one.shape[2:]) for one in (tiles.k, tiles.v))
    grad_bias, grad_gain = (None if one is None else tiles.no_places(one) for one in (tiles.bias, tiles.gain))
    for pairs, some in tiles.pieces():
        key, part = halos.keys_of(*some), slice(some[0] * halos.slots, some[1] * halos.slots)
        q = tiles.put_queries(tiles.q, pairs, some).mul_(tiles.scale)
        k, v = (tiles.put(one, key, pairs) for one in (tiles.k, tiles.v))
        near = tiles.put_queries(grad, pairs, some)
        weights, _, _ = tiles.weights(q, k, pairs, some)
        reached, gained = torch.bmm(near, v.transpose(1, 2)), weights
        if tiles.gain is not None:
            assert grad_gain is not None
            factor = tiles.at_places(tiles.gain, pairs, some).view(weights.shape)
            tiles.add_places(weights * reached, grad_gain, pairs, some)
            reached, gained = reached * factor, weights * factor
        pull = reached.sub_(tiles.put_queries(mean[..., None], pairs, some)).mul_(weights)
        if grad_bias is not None:
            tiles.add_places(pull, grad_bias, pairs, some)
        found = torch.bmm(pull, k).mul_(tiles.scale)
        grad_q[pairs.start : pairs.stop, part] = found.view(len(pairs), -1, found.shape[2])
        for target, left, right in ((grad_k, pull, q), (grad_v, gained, near)):
            shares = torch.bmm(left.transpose(1, 2), right).view(len(pairs), -1, right.shape[2])
            for pair, share in zip(pairs, shares, strict=True):
                target[pair].index_add_(0, key.flatten(), share)
    shape = (tiles.batch, tiles.heads)
    rows = tiles.like.new_empty(*shape, halos.queries, tiles.q.shape[3])
    tiles.take_queries(grad_q, rows)
    tables = (
        None
        if one is None
        else one.view(*shape, tiles.places, *(halos.sizes if one.shape[2] > 1 else (1,) * halos.ndim))
        for one in (grad_bias, grad_gain)
    )
    return [rows, grad_k.view(*shape, *grad_k.shape[1:]), grad_v.view(*shape, *grad_v.shape[1:]), *tables]
