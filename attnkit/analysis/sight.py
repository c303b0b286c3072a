"""Sight: which tokens a query of a head group looks at, on the tokens that went into the group."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attnkit.analysis.tracing import Visit
from attnkit.grid import Grid
from attnkit.kernels import recording
from attnkit.kernels.call import AttendCall
from attnkit.kernels.softmax import masked_softmax
from attnkit.primitives import HeadInputs, HeadOutput


@dataclass(eq=False)
class Sight:
    """A head group's view of its own tokens.

    Attributes:
        visit: one evaluation of the group, of one image.
    """

    visit: Visit

    @property
    def inputs(self) -> HeadInputs:
        """What went into the group."""
        assert self.visit.inputs is not None
        return self.visit.inputs

    @property
    def grid(self) -> Grid:
        """The grid of the tokens that are looked at."""
        return self.inputs.grid

    @property
    def query_grid(self) -> Grid:
        """The grid of the queries; several outputs of one token, where the map becomes finer, are its heads."""
        assert self.visit.output is not None
        found = self.visit.output.grid
        return self.grid if self.calls and found.tokens > self.grid.tokens else found

    @property
    def calls(self) -> list[AttendCall]:
        """The group's attention calls; none for a convolution."""
        return [choice.call for choice in self.visit.choices]

    def nearest_query(self, place: Sequence[float]) -> tuple[int, tuple[int, ...]]:
        """The query nearest to a place given in tokens of `grid`: its number and where it lies on `grid`.

        Of tokens that are dropped there is no query; the nearest of those that are left stands in for them.
        """
        query, spot = 0, []
        for at, size, count in zip(place, self.grid.sizes, self.query_grid.sizes, strict=True):
            step = -(-size // count)
            index = min(max(round(at / step), 0), count - 1)
            query = query * count + index
            spot.append(index * step)
        if self.inputs.places is None:
            return self.query_grid.prefix + query, tuple(spot)
        left = self.inputs.places[0, self.grid.prefix :] - self.grid.prefix
        spots = self.grid.coords().to(left.device)[left]
        nearest = int((spots - torch.tensor(spot, device=left.device)).square().sum(-1).argmin())
        return self.grid.prefix + nearest, tuple(spots[nearest].tolist())

    def seen(self, query: int) -> Tensor:
        """Share of the heads that see each token, 0..1: (N,)."""
        if not self.calls:
            footprint = self._footprint(query)
            return (footprint > 1e-9 * footprint.max().clamp(min=1e-30)).float()
        shares = []
        for call, sources in zip(self.calls, self.sources, strict=True):
            mask = call.layout.to_mask()[0, :, query].expand(call.q.shape[1], -1).float()
            shares.append(mask if sources is None else (mask @ (sources > 0).to(mask)).clamp(max=1.0))
        return self._on_grid(torch.cat(shares).mean(0))

    def weights(self, query: int) -> Tensor:
        """How strongly each token enters the query's output, mean over the heads: (N,).

        Softmax weights times the size of a gain, spread over the tokens a key was made of; for a group without softmax
        the size of the derivative of the output by the token.
        """
        if not self.calls:
            return self._footprint(query)
        spread = []
        for call, sources in zip(self.calls, self.sources, strict=True):
            weights = row_weights(call, query).float()
            spread.append(weights if sources is None else weights @ sources.to(weights))
        return self._on_grid(torch.cat(spread).mean(0))

    def _on_grid(self, tokens: Tensor) -> Tensor:
        """Numbers of the tokens that are left as numbers of all tokens, (N,); 0 for those that are dropped."""
        if self.inputs.places is None:
            return tokens
        return tokens.new_zeros(self.grid.tokens).scatter(0, self.inputs.places[0], tokens)

    def key_counts(self, query: int) -> list[tuple[float, float]]:
        """Number of keys the query sees in each call, mean over its heads: those made of tokens, and padding."""
        counts = []
        for call, sources in zip(self.calls, self.sources, strict=True):
            mask = call.layout.to_mask()[0, :, query].float()
            made = mask if sources is None else mask * (sources > 0).any(1)
            counts.append((made.sum(-1).mean().item(), (mask - made).sum(-1).mean().item()))
        return counts

    def keys_are(self) -> Literal["tokens", "averages", "mixtures"]:
        """What the keys are made of: a token each, the mean of some tokens, or anything else."""
        found: Literal["tokens", "averages"] = "tokens"
        for sources in self.sources:
            if sources is None:
                continue
            even = sources.amax(1) - torch.where(sources > 0, sources, torch.inf).amin(1) < 1e-4
            if not bool((even | (sources == 0).all(1)).all()):
                return "mixtures"
            if bool(((sources > 0).sum(1) > 1).any()):
                found = "averages"
        return found

    def cells(self) -> Tensor | None:
        """Number of the key each token belongs to, (N,); None unless keys stand for separate groups of tokens."""
        for sources in self.sources:
            if sources is not None and bool(((sources > 0).sum(0) == 1).all()):
                return sources.argmax(0)
        return None

    @functools.cached_property
    def sources(self) -> list[Tensor | None]:
        """For each call, how much of each token is in each key, rows summing to 1: (Nk, N); None if keys are tokens.

        Rows of padding are 0. What counts are the tokens whose values are mixed, not those that a factor depends on.
        """
        if not self.calls:
            return []
        with torch.enable_grad(), recording() as choices:
            leaves, _ = self._again()
            return [_sources(choice.call.v, leaves, self.inputs.x.shape[1]) for choice in choices]

    def _footprint(self, query: int) -> Tensor:
        """Size of the derivative of the group's output at a query by each of its input tokens: (N,)."""
        with torch.enable_grad():
            leaves, output = self._again()
            squares = torch.zeros(self.grid.tokens, device=self.inputs.x.device)
            for value in output.out[0, :, query].flatten():
                squares += _token_sizes(value, list(leaves.values()), squares=True)
        return squares.sqrt()

    def _again(self) -> tuple[dict[str, Tensor], HeadOutput]:
        """Runs the group once more on inputs that record gradients."""
        given = {name: getattr(self.inputs, name) for name in ("x", "q", "k", "v")}
        leaves = {name: one.detach().requires_grad_() for name, one in given.items() if one is not None}
        output = self.visit.module(replace(self.inputs, **leaves))
        return leaves, output


def row_weights(call: AttendCall, query: int) -> Tensor:
    """Softmax weights of a query of the first image by the reference formula, times the size of a gain: (heads, Nk)."""
    dtype, device = call.compute_dtype, call.q.device
    rows = torch.full((1, 1, 1, 1), query, device=device)
    keys = torch.arange(call.k.shape[2], device=device).view(1, 1, 1, -1)
    logits = (call.k[0].to(dtype) @ call.q[0, :, query, :, None].to(dtype))[..., 0] * call.scale
    bias, gain = (call.pairs_at(values, rows, keys) for values in (call.bias, call.gain))
    if bias is not None:
        logits = logits + bias[0, :, 0].to(dtype)
    weights, _ = masked_softmax(logits, call.layout.to_mask(device)[0, :, query])
    return weights if gain is None else weights * gain[0, :, 0].to(dtype).abs()


def _sources(values: Tensor, leaves: dict[str, Tensor], tokens: int) -> Tensor | None:
    keys = values.shape[2]
    made = values.sum((0, 1, 3))
    if not made.requires_grad:
        return None
    mixed = list(leaves.values())
    if "v" in leaves and _depends(made, leaves["v"]):
        mixed = [leaves["v"]]

    def row(key: int) -> Tensor:
        sizes = _token_sizes(made[key], mixed)
        return sizes / sizes.sum().clamp(min=1e-30)

    if keys == tokens:
        # As many keys as tokens are nearly always the tokens themselves; a few rows tell.
        probes = {0, keys // 2, keys - 1}
        if all(row(key)[key] > 0.999 for key in probes):
            return None
    return torch.stack([row(key) for key in range(keys)])


def _depends(value: Tensor, leaf: Tensor) -> bool:
    return torch.autograd.grad(value.sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None


def _token_sizes(value: Tensor, leaves: list[Tensor], *, squares: bool = False) -> Tensor:
    """Size of the derivative of a number by each token, summed over the leaves (B, N, C) or (B, heads, N, D): (N,)."""
    sizes: Tensor | float = 0.0
    for gradient in torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True):
        if gradient is not None:
            parts = gradient[0].square() if squares else gradient[0].abs()
            sizes = sizes + (parts.sum(-1) if parts.ndim == 2 else parts.sum((0, 2)))
    assert isinstance(sizes, Tensor)
    return sizes
