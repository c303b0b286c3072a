"""Problems of whole layers, with their projections and their choice of keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

import attnkit
from attnkit.kernels import AttendCall, AttendResult, Backend
from attnkit.kernels.dispatch import recording
from attnkit.mixes import GroupLike
from attnkit.primitives import HeadInputs
from attnkit_models.bench.case import DENSE, OURS, Check, Contender, Problem, Setting
from attnkit_models.bench.formulations.convolved import convolved, convolved_learned
from attnkit_models.bench.formulations.haloed import BLOCK, halonet_learned
from attnkit_models.bench.formulations.learned import (
    LearnedWeights,
    exact_learned,
    exact_windows,
    keys_and_values,
)
from attnkit_models.bench.formulations.masked_scores import (
    dense_layer,
    exact_layer,
    predicted_mask,
    sparsifiner_layer,
    split_heads,
)
from attnkit_models.bench.formulations.unfolded import sasa_learned
from attnkit_models.bench.gate import rows_check, sampled_rows
from attnkit_models.bench.guests import NOTHING, guest_backend

TWO_CONVOLUTIONS, BANDWIDTH = "two convolutions", "adding two maps"
# Two predictors that round differently choose other keys where scores are close: at most this share of pairs.
DIFFERENT_KEYS = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.06}


def layer_input(batch: int, side: int, channels: int, setting: Setting) -> Tensor:
    """x (B, N, C) of a square map."""
    generator = torch.Generator().manual_seed(setting.seed)
    made = torch.randn(setting.batch(batch), side**2, channels, generator=generator)
    return made.to(setting.device, setting.dtype).requires_grad_()


def layer(channels: int, groups: Sequence[GroupLike], setting: Setting) -> attnkit.HeadMix:
    """A mix whose weights are a function of the seed and far from where training begins."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        mix = attnkit.HeadMix(channels, groups)
        with torch.no_grad():
            for name, one in mix.named_parameters():
                if name.endswith(("bias", "gain")):
                    one.add_(0.3 * torch.randn(one.shape))
    return mix.to(setting.device, setting.dtype).eval()


def _learned_layer(
    channels: int, heads: int, kernel: int, queries: int, setting: Setting
) -> tuple[attnkit.HeadMix, tuple[Tensor, ...]]:
    """QnA's layer and its weights, in the order of `LearnedWeights.of`."""
    mix = layer(channels, [attnkit.LearnedQuery(heads, kernel, queries=queries)], setting)
    named = dict(mix.named_parameters())
    names = ("query", "key", "relative_bias", "gain")
    parts = (
        *(named[f"groups.0.{name}"] for name in names),
        *(named[f"{one}.{what}"] for one in ("qkv", "proj") for what in ("weight", "bias")),
    )
    return mix, parts


def learned_heads(
    setting: Setting, *, batch: int, heads: int, side: int, channels: int, kernel: int, queries: int = 2
) -> Problem:
    """Learned queries without the layer's projections: from its input, for the scores, and from values.

    Whoever computes this reads two maps and writes one, which takes at least as long as adding two maps.
    """
    sizes, grid = (side, side), attnkit.Grid(side, side)
    mix, parts = _learned_layer(channels, heads, kernel, queries, setting)
    weights, group = LearnedWeights.of(parts), mix.groups[0]
    x = layer_input(batch, side, channels, setting)
    rows = layer_input(batch, side, channels, replace(setting, seed=setting.seed + 1))
    leaves = (x, rows, *parts[:4])

    def values(one: Tensor) -> Tensor:
        return one.unflatten(2, (heads, -1)).transpose(1, 2)

    def exact(wide: Sequence[Tensor], tokens: Tensor) -> Tensor:
        own = LearnedWeights.of((*wide[2:], *(one.detach().double() for one in parts[4:])))
        return exact_windows(keys_and_values(wide[0], own)[0], values(wide[1]), own, sizes, kernel, tokens)

    check = rows_check(exact)
    contenders = {
        OURS: Contender(lambda: group(HeadInputs(x, None, None, values(rows), grid)).out, leaves, check),
        TWO_CONVOLUTIONS: Contender(
            lambda: convolved(keys_and_values(x, weights)[0], values(rows), weights, sizes), leaves, check
        ),
        BANDWIDTH: Contender(lambda: torch.add(x, rows), leaves, same=False, trains=False),
    }
    return Problem(contenders, None, {"tokens": side**2, "batch": x.shape[0], "heads": heads, "kernel": kernel})


def learned_query(
    setting: Setting,
    *,
    batch: int,
    heads: int,
    side: int,
    channels: int,
    kernel: int,
    queries: int = 2,
    convolutions: bool = False,
) -> Problem:
    """QnA's layer: learned queries over the window around every token, with both projections."""
    sizes, grid = (side, side), attnkit.Grid(side, side)
    mix, parts = _learned_layer(channels, heads, kernel, queries, setting)
    x = layer_input(batch, side, channels, setting)
    leaves, weights = (x, *parts), LearnedWeights.of(parts)

    def exact(wide: Sequence[Tensor], rows: Tensor) -> Tensor:
        return exact_learned(wide[0], LearnedWeights.of(tuple(wide[1:])), sizes, kernel, rows)

    check = rows_check(exact)
    contenders = {
        OURS: Contender(lambda: mix(x, grid), leaves, check),
        "SASA unfold": Contender(lambda: sasa_learned(x, weights, sizes, kernel), leaves, check),
    }
    if convolutions:
        contenders[TWO_CONVOLUTIONS] = Contender(lambda: convolved_learned(x, weights, sizes), leaves, check)
    if side % BLOCK == 0:
        contenders["HaloNet"] = Contender(lambda: halonet_learned(x, weights, sizes, kernel), leaves, check)
    return Problem(contenders, None, {"tokens": side**2, "batch": x.shape[0], "heads": heads, "kernel": kernel})


class Nothing(Backend):
    """Attention that returns the values: what is left of a layer is everything but attention."""

    name: ClassVar[str] = NOTHING

    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        return ()

    def cost(self, call: AttendCall) -> float:
        return float("inf")

    def run(self, call: AttendCall) -> AttendResult:
        return AttendResult(call.v, None)


def predicted_keys(
    setting: Setting, *, batch: int, heads: int, side: int, channels: int, keep: float, lean: bool = False
) -> Problem:
    """Sparsifiner's layer, choosing the keys included: every query sees the share `keep` of all keys."""
    grid = attnkit.Grid(side, side)
    mix = layer(channels, [attnkit.MaskPredictor(heads, (side, side), keep=keep)], setting)
    weights = dict(mix.named_parameters())
    x = layer_input(batch, side, channels, setting)
    names = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    leaves = (x, *(weights[name] for name in names))

    def ours() -> Tensor:
        return mix(x, grid)

    def on_nothing() -> Tensor:
        with guest_backend(NOTHING), attnkit.use_backend(NOTHING):
            return mix(x, grid)

    @torch.no_grad()
    def our_keys(rows: Tensor) -> Tensor:
        with recording() as choices:
            ours()
        return choices[0].call.layout.to_mask(x.device)[:, :, rows]

    @torch.no_grad()
    def their_keys(rows: Tensor) -> Tensor:
        q, k, _ = split_heads(x, weights, heads)
        return predicted_mask(q, k, weights, keep)[:, :, rows]

    def held(keys: Callable[[Tensor], Tensor] | None) -> Check:
        """A contender is held to the keys that it chose, and its choice to attnkit's."""

        def exact(wide: Sequence[Tensor], rows: Tensor) -> Tensor:
            own: dict[str, Tensor] = dict(zip(names, wide[1:], strict=True))
            return exact_layer(wide[0], own, heads, rows, None if keys is None else keys(rows))

        def check(contender: Contender) -> dict[str, float]:
            errors = dict(rows_check(exact)(contender))
            if keys is their_keys:
                rows = sampled_rows(side**2, 128, x.device)
                # As an error, so that a choice of other keys is as red as wrong numbers.
                errors["keys"] = float((our_keys(rows) != their_keys(rows)).double().mean())
            return errors

        return check

    limits = {"keys": DIFFERENT_KEYS[setting.dtype]}
    contenders = {
        OURS: Contender(ours, leaves, held(our_keys)),
        "authors' formulation": Contender(
            lambda: sparsifiner_layer(x, weights, heads, keep), leaves, held(their_keys), limits=limits
        ),
        DENSE: Contender(lambda: dense_layer(x, weights, heads), leaves, held(None), same=False),
        "all but attention": Contender(on_nothing, leaves, same=False, trains=False),
    }
    if lean:
        contenders["without their second softmax"] = Contender(
            lambda: sparsifiner_layer(x, weights, heads, keep, also_unmasked=False),
            leaves,
            held(their_keys),
            limits=limits,
        )
    facts = {"tokens": side**2, "batch": x.shape[0], "heads": heads, "keep": keep}
    return Problem(contenders, keep, facts)
