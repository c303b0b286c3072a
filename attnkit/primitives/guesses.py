"""Guesses of an attention map at low rank, from which Sparsifiner's primitives choose keys."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from attnkit.errors import ShapeError
from attnkit.grid import Grid
from attnkit.kernels.precision import without_autocast
from attnkit.options import positive
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.choosing import Chosen, Guess
from attnkit.primitives.plain import resized, softmax_heads
from attnkit.primitives.resizing import rows_for_grid, trunc_normal
from attnkit.primitives.softmax import SoftmaxHeads, SoftmaxOptions

PAPER = "Wei et al. 2023, Sparsifiner: Learning Sparse Instance-Dependent Attention, arXiv 2303.13755"


@dataclass(frozen=True)
class GuessOptions(SoftmaxOptions, ABC):
    """Base of the primitives with a predictor of attention maps.

    Args:
        heads: number of heads, >= 1.
        tokens: number of image tokens the predictor's basis is made for, >= 1, or their (height, width); other grids
            get it resized (a square number as a square image).
        reduce_dim: factor by which the predictor narrows a head, >= 1.
        reduce_tokens: factor by which it shortens the token axis, >= 1.
        coefficients: basis rows a query combines, >= 1.
        least_share: instead of so many, a query combines all basis rows of which it takes more than this, >= 0; its
            coefficients are shares that sum to 1.
        threshold: basis entries whose size is not above it count as zero, >= 0.
        tied: use one matrix to shorten the token axis and as the basis.
        prefix: prefix tokens that the basis has rows for, >= 0; the grid must then have as many. Their keys take part
            in the guess, as the class token's does in the authors' code.
    """

    tokens: int | tuple[int, int]
    _: KW_ONLY
    reduce_dim: int = 2
    reduce_tokens: int = 6
    coefficients: int = 8
    least_share: float | None = None
    threshold: float = 0.02
    tied: bool = False
    prefix: int = 0

    @property
    def rows(self) -> int:
        """Tokens that the basis has rows for."""
        return self.prefix + (self.tokens if isinstance(self.tokens, int) else math.prod(self.tokens))

    def problems(self) -> list[str]:
        found = super().problems()
        for count in (self.tokens,) if isinstance(self.tokens, int) else self.tokens:
            found = found or positive(tokens=count)
        found += positive(reduce_dim=self.reduce_dim, reduce_tokens=self.reduce_tokens, coefficients=self.coefficients)
        for name in ("threshold", "least_share"):
            if (getattr(self, name) or 0.0) < 0:
                found.append(f"{name}={getattr(self, name)}: must be >= 0")
        if self.prefix < 0:
            found.append(f"prefix={self.prefix}: must be >= 0 tokens")
        return found


Predicted = TypeVar("Predicted", bound=GuessOptions)


class GuessHeads(SoftmaxHeads, ABC, Generic[Predicted]):
    """Heads with a predictor of their attention maps."""

    choosers: ClassVar[tuple[str, ...]] = ("predictor",)

    def __init__(self, options: Predicted, context: BuildContext) -> None:
        super().__init__(options, context)
        self.predicted = options
        self.predictor = Predictor(options, context.head_dim)

    @torch.no_grad()
    def guess(self, inputs: HeadInputs, skip: int = 0) -> Guess:
        """See `Predictor.forward`; in float32 and without gradients, for the choice is hard."""
        q, k, _ = inputs.qkv
        with without_autocast(q.device):
            return self.predictor(q.float(), k.float(), inputs, skip)

    @torch.no_grad()
    def choose(self, function: Callable[..., Chosen], guess: Guess, *arguments: object) -> Chosen:
        """What a function of `attnkit.primitives.choosing` makes of a guess, in float32 and without gradients."""
        with without_autocast(guess.query.device):
            return function(guess, *arguments)

    def accepts_places(self) -> bool:
        """The predictor takes its rows at the places; only LePE convolves over the whole grid."""
        return self.lepe is None

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        return softmax_heads(self, inputs, attention)


class Predictor(nn.Module):
    """The low-rank guess of an attention map; its weights are shared by the heads.

    Args:
        options: the primitive's options.
        head_dim: width of one head.
    """

    def __init__(self, options: GuessOptions, head_dim: int) -> None:
        super().__init__()
        self.options = options
        width = max(head_dim // options.reduce_dim, 1)
        rank = max(options.rows // options.reduce_tokens, 1)
        self.query = nn.Linear(head_dim, width)
        self.key = nn.Linear(head_dim, width)
        self.down = trunc_normal(options.rows, rank)
        self.up = self.down if options.tied else trunc_normal(options.rows, rank)
        for linear in (self.query, self.key):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, q: Tensor, k: Tensor, inputs: HeadInputs, skip: int = 0) -> Guess:
        """Scores of keys for all image queries: few coefficients times a sparse basis without signs.

        Args:
            q: (B, heads, N, D).
            k: (B, heads, N, D).
            inputs: the group's inputs, for grid, token mask and places.
            skip: how many of the first tokens with rows get no score.

        Returns:
            The scores at low rank. Their keys are the prefix tokens that have rows and all image tokens, but for those
            skipped; masked tokens score -inf.
        """
        options, mask = self.options, inputs.token_mask
        down, up = self._factors(inputs, q.dtype)
        query, pooled = self._reduced(q, k, down, inputs)
        basis = up[..., skip:, :].abs()
        # A product with the comparison takes a fifth of the time of `where`.
        basis = (basis * (basis > options.threshold)).transpose(-2, -1).contiguous()
        if basis.ndim == 4:
            basis = basis[:, 0]
        kept = None if mask is None else mask[:, self._first(inputs.grid) + skip :]
        return Guess(query, pooled, basis, kept, self._scale, options.coefficients, options.least_share)

    def guess(self, q: Tensor, k: Tensor, inputs: HeadInputs) -> Tensor:
        """The attention map that is guessed: all coefficients times the whole basis, signs included.

        Arguments and shape as in `forward`; it is differentiable by q, k and the predictor's parameters.
        """
        down, up = self._factors(inputs, q.dtype)
        return self._coefficients(q, k, down, inputs) @ up.transpose(-2, -1)

    def _first(self, grid: Grid) -> int:
        """Number of the first token that the basis has a row for."""
        return grid.prefix - self.options.prefix

    def _factors(self, inputs: HeadInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rows of the tokens at hand that shorten the token axis, and those of the basis: (n, r) or (B, 1, n, r).

        Raises:
            ShapeError: if the grid has another number of prefix tokens than there are rows for.
        """
        options, grid = self.options, inputs.grid
        if options.prefix not in (0, grid.prefix):
            raise ShapeError(
                f"this mask predictor has rows for {options.prefix} prefix tokens, but the grid has {grid.prefix}; "
                f"give it prefix={grid.prefix}"
            )
        found = []
        for own, summed in ((self.down, True), (self.up, False)):
            rows = rows_for_grid(own.to(dtype), options.tokens, grid, summed=summed)
            if options.prefix:
                rows = torch.cat([own[: options.prefix].to(dtype), rows])
            if inputs.places is not None:
                first = self._first(grid)
                rows = rows[inputs.places[:, None, first:] - first]
            found.append(rows)
        return found[0], found[1]

    def _coefficients(self, q: Tensor, k: Tensor, down: Tensor, inputs: HeadInputs) -> Tensor:
        """How much each image query takes of each basis row: (B, heads, image queries, r), rows summing to 1."""
        query, pooled = self._reduced(q, k, down, inputs)
        return ((query @ pooled) * self._scale).softmax(-1)

    @property
    def _scale(self) -> float:
        """The authors' code scales by the number of heads, not by the width; published weights depend on it."""
        return self.options.heads**-0.5

    def _reduced(self, q: Tensor, k: Tensor, down: Tensor, inputs: HeadInputs) -> tuple[Tensor, Tensor]:
        """Image queries (B, heads, image queries, c), and keys pooled to (B, heads, c, r)."""
        grid, mask = inputs.grid, inputs.token_mask
        first = self._first(grid)
        weights = [self.query.weight, self.query.bias, self.key.weight, self.key.bias]
        query_weight, query_bias, key_weight, key_bias = (weight.to(q.dtype) for weight in weights)
        small_q = nn.functional.linear(q[:, :, grid.prefix :], query_weight, query_bias)
        small_k = nn.functional.linear(k[:, :, first:], key_weight, key_bias)
        if mask is not None:
            small_q = small_q.where(mask[:, None, grid.prefix :, None], 0.0)
            small_k = small_k.where(mask[:, None, first:, None], 0.0)
        return small_q, small_k.transpose(-2, -1) @ down


@torch.no_grad()
def exact_scores(group: GuessHeads, options: GuessOptions, inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of the predictor's formula in float64, written out, for definitions.

    Args:
        group: the heads.
        options: their options.
        inputs: as in `definition`.

    Returns:
        Scores of image tokens (B, heads, image queries, image tokens), masked ones -1; by how much rounding may move
        them; and for which queries it may change which coefficients count, both (B, heads, image queries, 1).
    """
    grid, guess = inputs.grid, group.predictor
    q, k, _ = (one.double() for one in inputs.qkv)
    kept = torch.ones(len(q), grid.tokens, dtype=torch.bool) if inputs.token_mask is None else inputs.token_mask
    image = grid.prefix
    down = torch.zeros(grid.tokens, guess.down.shape[1], dtype=torch.float64)
    down[image - options.prefix : image] = guess.down[: options.prefix].double()
    count = options.rows - options.prefix
    down[image:] = resized(guess.down, options.tokens, grid) * (count / grid.image_tokens)
    basis = torch.zeros_like(down)
    basis[image - options.prefix : image] = guess.up[: options.prefix].double()
    basis[image:] = resized(guess.up, options.tokens, grid)
    basis = basis.abs() * (basis.abs() > options.threshold)
    small_q = q[:, :, image:] @ guess.query.weight.double().t() + guess.query.bias.double()
    small_k = k @ guess.key.weight.double().t() + guess.key.bias.double()
    pooled = torch.einsum("bhnd,bn,nr->bhrd", small_k, kept.double(), down)
    logits = torch.einsum("bhnd,bhrd->bhnr", small_q, pooled) / options.heads**0.5
    rounding = 1e-6 * (1.0 + logits.abs().amax(-1, keepdim=True))
    share = logits.softmax(-1)
    if options.least_share is not None:
        distance = (share - options.least_share).abs()
        unsure = distance.amin(-1, keepdim=True) < rounding
        share = share * (share > options.least_share)
    else:
        least = logits.sort(-1, descending=True).values[..., : options.coefficients + 1]
        unsure = torch.zeros_like(rounding, dtype=torch.bool)
        if least.shape[-1] > options.coefficients:
            unsure = least[..., -2:-1] - least[..., -1:] < rounding
            share = share * (logits > least[..., -1:])
    scores = torch.einsum("bhnr,mr->bhnm", share, basis)
    # Below 1e-37 float32 has no numbers, or few.
    rounding = rounding * scores.amax(-1, keepdim=True) + 1e-37
    return scores.masked_fill(~kept[:, None, None], -1.0), rounding, unsure
