"""mask_reconstruction: dense attention beside the guess of it that a mask predictor learns from (Sparsifiner)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.kernels.precision import widened, without_autocast
from attnkit.layouts import Dense
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.guesses import PAPER, GuessHeads, GuessOptions
from attnkit.primitives.softmax import Plan


@dataclass(frozen=True)
class MaskReconstruction(GuessOptions):
    """Full attention, and beside it the attention map as a mask predictor guesses it: the first stage of its training.

    The output is that of dense attention, on which the guess has no influence. The guess takes all coefficients and the
    whole basis with its signs, and is differentiable; it is `aux["guess"]`, (B, heads, image queries, keys), keys being
    the prefix tokens that have rows and all image tokens. A loss compares it with a teacher's attention. Parameters are
    those of `mask_predictor` with the same options, so that one's state dict is the other's.

    Args:
        heads: number of heads, >= 1.
        tokens: number of image tokens the predictor's basis is made for, >= 1, or their (height, width); other grids
            get it resized (a square number as a square image).
        reduce_dim: factor by which the predictor narrows a head, >= 1.
        reduce_tokens: factor by which it shortens the token axis, >= 1.
        coefficients: for the stage after this one; has no influence here.
        least_share: for the stage after this one; has no influence here.
        threshold: for the stage after this one; has no influence here.
        tied: use one matrix to shorten the token axis and as the basis.
        prefix: prefix tokens that the basis has rows for, as in `mask_predictor`.
    """

    kind: ClassVar[str] = "mask_reconstruction"
    paper: ClassVar[str] = PAPER
    formula: ClassVar[str] = (
        "out_i = sum_j softmax_j(s q_i.k_j) v_j, j over all N tokens; "
        "guess_i = softmax(s' P q_i . (W_down^T P' k)) W_up^T"
    )
    cost: ClassVar[str] = "2 N^2 C + N^2 h (predictor)"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tokens": 196},)

    def full_budget(self, grid: Grid) -> MaskReconstruction:
        return self

    def build(self, context: BuildContext) -> MaskReconstructionHeads:
        return MaskReconstructionHeads(self, context)


class MaskReconstructionHeads(GuessHeads[MaskReconstruction]):
    """Heads of full attention with a guess of it."""

    def plan(self, inputs: HeadInputs) -> Plan:
        q, k, _ = inputs.qkv
        with without_autocast(q.device):
            guess = self.predictor.guess(widened(q), widened(k), inputs)
        return Plan(Dense(inputs.x.shape[1]), aux={"guess": guess})

    def definition(self, inputs: HeadInputs) -> Tensor:
        return torch.ones(inputs.grid.image_tokens, inputs.grid.image_tokens, dtype=torch.bool)
