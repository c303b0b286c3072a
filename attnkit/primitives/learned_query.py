"""learned_query: windows summarised by learned queries, so that keys are never made (QnA)."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.grid import Grid
from attnkit.kernels import attend
from attnkit.kernels.precision import widened, without_autocast
from attnkit.layouts import RelativeTable, Stencil
from attnkit.options import odd, positive
from attnkit.primitives.base import BuildContext, Columns, HeadGroup, HeadInputs, HeadOutput, PrimitiveOptions


@dataclass(frozen=True)
class SummaryOptions(PrimitiveOptions, ABC):
    """Base of the primitives whose windows are summarised by learned queries; see `LearnedQuery`."""

    kernel: int
    _: KW_ONLY
    query_norm: Literal["unit", "unit_detached", "none"] = "unit"
    relative_bias: bool = True
    scaled_bias: bool = False
    key_bias: bool = False
    gain: Literal["window", "window_ones", "query", "signs", "mean", "none"] = "window"

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of learned queries per head."""

    def problems(self) -> list[str]:
        found = super().problems() + odd(kernel=self.kernel)
        if self.scaled_bias and not self.relative_bias:
            found.append("scaled_bias=True: goes with relative_bias=True")
        return found

    def columns(self, context: BuildContext) -> Columns:
        return Columns(v=self.heads * context.head_dim)

    def full_budget(self, grid: Grid) -> SummaryOptions:
        return replace(self, kernel=2 * max(grid.sizes) - 1, relative_bias=False, scaled_bias=False, gain="none")


@dataclass(frozen=True)
class LearnedQuery(SummaryOptions):
    """Query-and-attend: `queries` learned queries look at the kernel x kernel window around every place.

    The queries do not depend on the input, so query and key projection fold into one small matrix: scores are
    `S = x A` with A of shape (C, queries * heads), and keys are never made. The outputs of the queries are summed.

    Args:
        heads: number of heads, >= 1.
        kernel: tokens per side of the window, odd, >= 1; places outside the image are left out.
        stride: step between outputs in tokens, >= 1; 2 halves the map.
        queries: learned queries per head, >= 1.
        query_norm: `"unit"` divides each query by its length, as in the paper; `"unit_detached"` does so without a
            gradient through the length; `"none"`.
        relative_bias: learn a bias per query, head and place in the window.
        scaled_bias: divide that bias by the square root of the head's width, as the scores are.
        key_bias: add a learned vector per head to the keys. It moves all logits of a query alike, so it changes
            nothing; weights of the authors may hold one.
        gain: a factor of the weights after the softmax. `"window"`: learned per query, head and place, beginning near
            0, as in the paper; `"window_ones"`: the same, beginning at 1; `"query"`: learned per query and head,
            beginning near 0; `"signs"`: 1 for the first half of all queries' heads, -1 for the other; `"mean"`:
            1 / queries; or `"none"`.
    """

    kind: ClassVar[str] = "learned_query"
    paper: ClassVar[str] = "Arar et al. 2022, Learned Queries for Efficient Local Attention, arXiv 2112.11435"
    formula: ClassVar[str] = (
        "out_i = sum_q sum_j a_q[j - i] softmax_j(q.K x_j + b_q[j - i]) v_j, j over the window of i"
    )
    cost: ClassVar[str] = "N (L h C + k^2 L (C + h))"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"kernel": 3}, {"kernel": 5, "stride": 2})

    _: KW_ONLY
    stride: int = 1
    queries: int = 2

    @property
    def count(self) -> int:
        return self.queries

    def problems(self) -> list[str]:
        found = super().problems() + positive(stride=self.stride, queries=self.queries)
        if self.gain == "signs" and self.queries * self.heads % 2:
            found.append(f"gain='signs': {self.queries} queries of {self.heads} heads have no half")
        return found

    def output_stride(self) -> int:
        return self.stride

    def period(self, grid: Grid) -> tuple[int, ...]:
        return (self.stride,) * grid.ndim

    def build(self, context: BuildContext) -> LearnedQueryHeads:
        return LearnedQueryHeads(self, context)


class SummaryHeads(HeadGroup, ABC):
    """Heads with learned queries: the subclass puts together what each of them sees of a window."""

    def __init__(self, options: SummaryOptions, context: BuildContext) -> None:
        super().__init__()
        self.options = options
        heads, width, rows = options.heads, context.head_dim, options.count * options.heads
        window = (rows, options.kernel, options.kernel)
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.zeros(options.count, heads, width)) * width**-0.5)
        self.key = nn.Parameter(lecun_normal(torch.zeros(heads * width, context.dim)))
        self.key_bias = nn.Parameter(torch.zeros(heads, width)) if options.key_bias else None
        self.relative_bias = nn.Parameter(torch.zeros(window)) if options.relative_bias else None
        learned = {"window": window, "window_ones": window, "query": (rows,)}
        self.gain: nn.Parameter | None = None
        if options.gain in learned:
            shape = learned[options.gain]
            start = torch.ones(shape) if options.gain == "window_ones" else torch.randn(shape) * 0.02
            self.gain = nn.Parameter(start)

    def scaled_query(self) -> Tensor:
        """The queries as they meet the keys: (queries, heads, D)."""
        query, width = widened(self.query), self.query.shape[2]
        if self.options.query_norm != "none":
            length = query.norm(dim=2, keepdim=True)
            query = query / ((length.detach() if self.options.query_norm == "unit_detached" else length) + 1e-6)
        return query * width**-0.5

    def score_weight(self) -> Tensor:
        """Query and key projection folded into one: (queries * heads, C), rows ordered query-major."""
        key = widened(self.key).unflatten(0, (self.options.heads, -1))
        return torch.einsum("lhd,hdc->lhc", self.scaled_query(), key).flatten(0, 1)

    def score_bias(self) -> Tensor | None:
        """What the keys' bias adds to every score: (queries * heads,), or None without one."""
        return None if self.key_bias is None else (self.scaled_query() * self.key_bias).sum(2).flatten()

    def summaries(self, inputs: HeadInputs) -> Tensor:
        """What each query sees around every stride-th token: (B, queries, heads, N', D)."""
        assert inputs.v is not None
        options, stride = self.options, self.options.output_stride()
        layout = Stencil(inputs.grid, options.kernel, stride=stride)
        if inputs.token_mask is not None:
            layout = layout.restrict(inputs.token_mask)
        # In half precision scores of a thousand would be off by a half, in the exponent.
        with without_autocast(inputs.x.device):
            weight = self.score_weight()
            scores = F.linear(inputs.x.to(weight.dtype), weight, self.score_bias()).transpose(1, 2)
        # Copied token by token, so that what is one token's stays together.
        values = inputs.v.transpose(1, 2)[:, :, None].expand(-1, -1, options.count, -1, -1).flatten(2, 3)
        # Scores without a query are attention with keys one number wide, looked at by queries that are all 1.
        ones = scores.new_ones(1, 1, 1, 1).expand(scores.shape[0], scores.shape[1], layout.num_queries, 1)
        out = attend(
            ones,
            scores[..., None],
            values.transpose(1, 2),
            layout,
            scale=1.0,
            bias=self._table(self.bias_table(), inputs, 0.0),
            gain=self._table(None if self.gain is None or self.gain.ndim == 1 else self.gain, inputs, 1.0),
        )
        factor = self.query_gain()
        if factor is not None:
            out = out * factor.to(out.dtype)[:, None, None]
        return out.unflatten(1, (options.count, options.heads))

    def bias_table(self) -> Tensor | None:
        """What is added to the logits: (queries * heads, kernel, kernel), or None."""
        if self.relative_bias is None or not self.options.scaled_bias:
            return self.relative_bias
        return self.relative_bias * self.query.shape[2] ** -0.5

    def query_gain(self) -> Tensor | None:
        """The factor of each query's heads, (queries * heads,), where the gain does not differ from place to place."""
        rows = self.options.count * self.options.heads
        if self.options.gain == "signs":
            return 1.0 - 2.0 * (torch.arange(rows, device=self.query.device) >= rows // 2).to(self.query.dtype)
        if self.options.gain == "mean":
            return self.query.new_full((rows,), 1.0 / self.options.count)
        return self.gain if self.options.gain == "query" else None

    def definition(self, inputs: HeadInputs) -> Tensor:
        grid, stride = inputs.grid, self.options.output_stride()
        keys = grid.coords()
        queries = torch.tensor(list(itertools.product(*(range(0, size, stride) for size in grid.sizes))))
        return ((keys[None] - queries[:, None]).abs() <= self.options.kernel // 2).all(-1)

    def seen_by(self, query: int, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        """What one query sees around every stride-th token, written out: (B, heads, N', D)."""
        options, x, grid, stride = self.options, inputs.x, inputs.grid, self.options.output_stride()
        heads, width = self.query.shape[1:]
        q = self.query[query]
        length = q.square().sum(1, keepdim=True).sqrt()
        q = q / {"unit": length + 1e-6, "unit_detached": length.detach() + 1e-6, "none": 1.0}[options.query_norm]
        places = grid.prefix + math.prod(len(range(0, size, stride)) for size in grid.sizes)
        keys = torch.stack([x @ one.t() for one in self.key.split(width)], dim=1)
        if self.key_bias is not None:
            keys = keys + self.key_bias[:, None]
        rows = slice(query * heads, (query + 1) * heads)
        bias = gain = None
        if self.relative_bias is not None:
            factor = width**-0.5 if options.scaled_bias else 1.0
            bias = RelativeTable(self.relative_bias[rows] * factor, grid, stride, 0.0)
        if self.gain is not None and self.gain.ndim == 3:
            gain = RelativeTable(self.gain[rows], grid, stride, 1.0)
        q = q.expand(len(x), places, -1, -1).transpose(1, 2)
        out = attention(q, keys, inputs.v, scale=width**-0.5, bias=bias, gain=gain)
        if options.gain == "query" and self.gain is not None:
            return out * self.gain[rows][:, None, None]
        if options.gain == "signs":
            signs = [1.0 if 2 * row < options.count * heads else -1.0 for row in range(rows.start, rows.stop)]
            return out * torch.tensor(signs)[:, None, None]
        return out / options.count if options.gain == "mean" else out

    def _table(self, values: Tensor | None, inputs: HeadInputs, fill: float) -> RelativeTable | None:
        return None if values is None else RelativeTable(values, inputs.grid, self.options.output_stride(), fill)

    def extra_repr(self) -> str:
        return repr(self.options)


class LearnedQueryHeads(SummaryHeads):
    """Heads of learned-query attention."""

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        found = self.summaries(inputs)
        # Whole tokens at a time, in the order that a projection takes: PyTorch's sum of short rows is slow.
        tokens = found.permute(0, 3, 1, 2, 4).flatten(3).sum(2)
        out = tokens.unflatten(2, (found.shape[2], found.shape[4])).transpose(1, 2)
        return HeadOutput(out, inputs.grid.strided(self.options.output_stride()))

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        return sum((self.seen_by(query, inputs, attention) for query in range(len(self.query))), torch.zeros(()))


def lecun_normal(weight: Tensor) -> Tensor:
    """Fills a (out, in) weight from a normal cut at two standard deviations whose variance is 1 / in."""
    # Cutting at two standard deviations shrinks them by this factor.
    std = math.sqrt(1.0 / weight.shape[1]) / 0.87962566103423978
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
