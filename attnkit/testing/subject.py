"""Subject: a head group with random weights and inputs, made from a case, as the laws look at it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from attnkit.errors import ConfigError
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.dispatch import wrapping
from attnkit.primitives import BuildContext, HeadGroup, HeadInputs, HeadOutput
from attnkit.testing.cases import DTYPES, PrimitiveCase, arranged
from attnkit.testing.tensors import outputs_and_gradients, random_tensor, randomize_parameters


class Subject:
    """A head group of a case.

    Attributes:
        case: the case.
        context: what the group was built with.
        group: the group, with random parameters.
        leaves: names to tensors that ask for gradients: x, and q, k and v where the group has them.
        token_mask: bool (B, N), or None.
        draw: number of the random draw, or None.
    """

    def __init__(self, case: PrimitiveCase, *, dtype: torch.dtype | None = None) -> None:
        self.case = case
        own = DTYPES[case.dtype]
        dtype = own if dtype is None else dtype
        self.context, self.group = _built(case)
        # Rounded to the case's dtype first, so that every other dtype computes on the same numbers.
        randomize_parameters(self.group, seed=case.seed).to(own).to(dtype).train(case.training)
        columns = case.options.columns(self.context)
        batch, tokens, heads = case.batch, case.grid.tokens, case.options.heads
        shapes: dict[str, tuple[int, ...]] = {"x": (batch, tokens, self.context.dim)}
        for name in ("q", "k", "v"):
            if getattr(columns, name):
                shapes[name] = (batch, heads, tokens, getattr(columns, name) // heads)
        self.leaves: dict[str, Tensor] = {
            name: random_tensor(*shape, seed=7 * case.seed + at, dtype=own).to(dtype).requires_grad_()
            for at, (name, shape) in enumerate(shapes.items())
        }
        self.token_mask: Tensor | None = None
        if case.masked:
            self.token_mask = random_tensor(batch, tokens, seed=case.seed + 17) < 0.5
        self.draw: Tensor | None = torch.tensor(case.seed % 7) if case.training and self.group.stochastic else None

    def inputs(self, **changes: Tensor | None) -> HeadInputs:
        """The group's inputs, with some of `x`, `q`, `k`, `v`, `token_mask` and `draw` changed."""
        rows = {name: self.leaves.get(name) for name in ("q", "k", "v")}
        rows = {name: None if one is None else arranged(one, self.case.memory) for name, one in rows.items()}
        inputs = HeadInputs(
            self.leaves["x"], rows["q"], rows["k"], rows["v"], self.case.grid, self.token_mask, self.draw
        )
        return dataclasses.replace(inputs, **changes)  # type: ignore[arg-type]

    def run(
        self, inputs: HeadInputs | None = None, answer: Callable[[AttendCall], AttendResult] | None = None
    ) -> HeadOutput:
        """Runs the group; `answer` computes its attention instead of a backend."""
        watched = nullcontext() if answer is None else wrapping(lambda call, _: answer(call))
        with watched:
            return self.group(self.inputs() if inputs is None else inputs)

    def calls(self, inputs: HeadInputs | None = None) -> list[tuple[AttendCall, AttendResult]]:
        """The attention calls of a run, each with its result."""
        found = []

        def keep(call: AttendCall, compute: Callable[[], AttendResult]) -> AttendResult:
            result = compute()
            found.append((call, result))
            return result

        with wrapping(keep):
            self.group(self.inputs() if inputs is None else inputs)
        return found

    def gradients(self, compute: Callable[[], Tensor] | None = None) -> tuple[list[Tensor], list[Tensor], list[str]]:
        """Outputs, gradients of everything that goes in, and its names: `x`, `q`, `k`, `v`, then the parameters.

        Args:
            compute: gives the output; the group itself where not given.
        """
        inputs = {**self.leaves, **dict(self.group.named_parameters())}
        outputs, gradients = outputs_and_gradients(
            lambda *_: self.run().out if compute is None else compute(), list(inputs.values()), seed=self.case.seed
        )
        return outputs, gradients, list(inputs)

    def promised(self, out: Tensor) -> Tensor:
        """Rows of an output that say anything: bool (B, N'). A masked token's own row may hold what it likes.

        With a stride the rows behind the prefix are places of the image, not tokens.
        """
        if self.case.options.output_stride() == 1 and out.shape[2] == self.kept.shape[1]:
            return self.kept
        prefix = self.case.grid.prefix
        places = torch.ones(out.shape[0], out.shape[2] - prefix, dtype=torch.bool)
        return torch.cat([self.kept[:, :prefix], places], dim=1)

    @property
    def kept(self) -> Tensor:
        """Which tokens are not masked: bool (B, N)."""
        if self.token_mask is not None:
            return self.token_mask
        return torch.ones(self.case.batch, self.case.grid.tokens, dtype=torch.bool)


def _built(case: PrimitiveCase) -> tuple[BuildContext, HeadGroup]:
    width = case.options.heads * case.head_dim
    numbers = {"layer": case.seed % 5, "group": case.seed % 3}
    try:
        context = BuildContext(width + case.extra, case.head_dim, **numbers)
        return context, case.options.build(context)
    except ConfigError:
        # Some options fit only a layer as wide as the heads.
        context = BuildContext(width, case.head_dim, **numbers)
        return context, case.options.build(context)
