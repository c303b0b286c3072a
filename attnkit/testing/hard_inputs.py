"""Hard inputs: attention problems on which rounding, overflow and empty rows show, as a function of a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.kernels.call import AttendCall
from attnkit.layouts import Blocks, Dense, Layout, Stencil, TokenMask, TokenSets
from attnkit.testing.tensors import random_tensor

BATCH, HEADS, WIDTH = 2, 2, 16
GRID = Grid(8, 8, prefix=1)
LONG = 4096


@dataclass
class Draft:
    """What an input starts from and changes: standard normal numbers in float64, and nothing hidden.

    Attributes:
        q: (2, 2, Nq, 16); k and v alike.
        k: see q.
        v: see q.
        mask: bool (B or 1, heads or 1, Nq, Nk), what the layout lets each query see.
        finfo: of the dtype that q, k and v are rounded to.
        bias: added to the logits, or None.
        keys: bool (2, Nk), keys that are left, or None for all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    finfo: torch.finfo
    bias: Tensor | None = None
    keys: Tensor | None = None

    def chances(self, share: float, *shape: int) -> Tensor:
        """Bools that are True with probability `share`."""
        return torch.rand(shape, generator=torch.Generator().manual_seed(11)) < share

    def pairs(self) -> tuple[int, int, int, int]:
        """The shape of a bias that is the same for all items."""
        return (1, HEADS, self.q.shape[2], self.k.shape[2])


@dataclass(frozen=True)
class HardInput:
    """One hard input.

    Attributes:
        name: its name.
        sentence: what is hard about it.
        change: changes a draft in place.
        layouts: makes the layouts it is posed under, by name.
        step: size of the gradient that arrives at the output.
        learned_bias: whether the bias asks for its gradient.
    """

    name: str
    sentence: str
    change: Callable[[Draft], None]
    layouts: Callable[[], dict[str, Layout]]
    step: float = 1.0
    learned_bias: bool = False

    def call(self, layout: Layout, dtype: torch.dtype, *, seed: int = 0) -> AttendCall:
        """The problem under one of its layouts.

        Args:
            layout: which keys each query sees; the input may leave out more.
            dtype: of q, k and v, which are leaves that ask for their gradients.
            seed: any integer; the global random state is neither read nor changed.
        """
        sizes = (layout.num_queries, layout.num_keys, layout.num_keys)
        rows = [random_tensor(BATCH, HEADS, size, WIDTH, seed=3 * seed + at) for at, size in enumerate(sizes)]
        draft = Draft(*rows, mask=layout.to_mask(), finfo=torch.finfo(dtype))
        self.change(draft)
        if draft.keys is not None:
            layout = layout.restrict(draft.keys)
        q, k, v = (one.to(dtype).requires_grad_() for one in (draft.q, draft.k, draft.v))
        bias = draft.bias
        if bias is not None:
            # One made in float32 stays in float32.
            bias = bias.to(dtype if bias.dtype == torch.float64 else bias.dtype).requires_grad_(self.learned_bias)
        return AttendCall(q, k, v, layout, WIDTH**-0.5, bias)


def layouts_of_an_image() -> dict[str, Layout]:
    """Every kind of layout over 8 x 8 tokens and one prefix token."""
    generator = torch.Generator().manual_seed(7)
    routes = torch.randint(0, 16, (BATCH, 1, 16, 3), generator=generator)
    lists = torch.randint(0, GRID.tokens, (BATCH, HEADS, GRID.image_tokens, 12), generator=generator)
    pairs = torch.rand((1, HEADS, GRID.tokens, GRID.tokens), generator=generator) < 0.5
    return {
        "dense": Dense(GRID.tokens),
        "stencil": Stencil(GRID, 5),
        "stencil, clamped": Stencil(GRID, 5, border="clamp"),
        "blocks": Blocks.windows(GRID, 4),
        "blocks, routed": Blocks.from_regions(GRID, 4, routes),
        "token_sets": TokenSets(lists, GRID.tokens, queries_all=1, keys_all=1),
        "token_mask": TokenMask(pairs),
    }


def layouts_of_long_rows() -> dict[str, Layout]:
    """A few queries that see 4096 keys; half of them for one of the stencil's two queries."""
    queries, keys = (Blocks.windows(Grid(size), size).order for size in (8, LONG))
    return {
        "dense": Dense(8, LONG),
        "stencil": Stencil(Grid(LONG), LONG - 1, stride=LONG // 2),
        "blocks": Blocks(queries, key_order=keys),
        "token_sets": TokenSets(torch.arange(LONG).expand(8, LONG), LONG),
        "token_mask": TokenMask(torch.ones(8, LONG, dtype=torch.bool)),
    }


def layouts_of_long_columns() -> dict[str, Layout]:
    """4096 queries that read eight keys, or, in windows, 256 that read one prefix token."""
    grid = Grid(16, 16, prefix=1)
    return {
        "dense": Dense(LONG, 8),
        "stencil": Stencil(grid, 3),
        "stencil, clamped": Stencil(grid, 3, border="clamp"),
        "blocks": Blocks.windows(grid, 4),
        "token_sets": TokenSets(torch.arange(8).expand(LONG, 8), 8),
        "token_mask": TokenMask(torch.ones(LONG, 8, dtype=torch.bool)),
    }


def _ordinary(draft: Draft) -> None:
    pass


def _large_logits(draft: Draft) -> None:
    largest = (draft.q @ draft.k.mT).abs().max() * WIDTH**-0.5
    factor = (1e4 / largest) ** 0.5
    draft.q, draft.k = draft.q * factor, draft.k * factor


def _large_and_close(draft: Draft) -> None:
    # 200 * 200 / sqrt(16) = 10,000 exactly, in every dtype.
    draft.q[..., 0] = draft.k[..., 0] = 200.0


def _equal_scores(draft: Draft) -> None:
    draft.q[..., 1:] = 0.0
    draft.k[..., 0] = 1.0


def _dominant_key(draft: Draft) -> None:
    first = draft.mask[:1].expand(draft.pairs()).int().argmax(-1, keepdim=True)
    bias = torch.zeros(draft.pairs(), dtype=torch.float64).scatter(-1, first, 100.0)
    # Every other query; the gradients of the others are what errors are measured against.
    bias[:, :, ::2] = 0.0
    draft.bias = bias


def _denormals(draft: Draft) -> None:
    draft.v = draft.v * draft.finfo.tiny / 4
    draft.k[:, :, ::2] *= draft.finfo.tiny


def _mixed_magnitudes(draft: Draft) -> None:
    for at, rows in enumerate((draft.q, draft.k, draft.v)):
        exponents = torch.rand(rows.shape, generator=torch.Generator().manual_seed(20 + at), dtype=torch.float64)
        rows.mul_(10 ** (4 * exponents - 2))


def _large_values(draft: Draft) -> None:
    draft.v = draft.v.clamp(-1, 1) * draft.finfo.max * 0.9


def _values_around_one(draft: Draft) -> None:
    # Sums of numbers of one sign, in which an accumulator that is too short stands still.
    draft.v = draft.v + 1.0


def _bias_of_ten_thousand(draft: Draft) -> None:
    draft.bias = -1e4 * draft.chances(0.5, *draft.pairs()).double()


def _bias_of_float32(draft: Draft) -> None:
    draft.bias = 10 * random_tensor(*draft.pairs(), seed=21, dtype=torch.float32)


def _smallest_bias(draft: Draft) -> None:
    smallest = torch.finfo(torch.float32).min
    bias = torch.zeros(draft.pairs()).masked_fill(draft.chances(0.7, *draft.pairs()), smallest)
    bias[:, :, 3::8] = smallest
    draft.bias = bias


def _infinite_bias(draft: Draft) -> None:
    bias = torch.zeros(draft.pairs(), dtype=torch.float64)
    bias = bias.masked_fill(draft.chances(0.5, *draft.pairs()), -torch.inf)
    bias[:, :, 3::8] = -torch.inf
    draft.bias = bias


def _one_key(draft: Draft) -> None:
    count = draft.k.shape[2]
    draft.keys = torch.stack([torch.arange(count) == count // 2, torch.ones(count, dtype=torch.bool)])


def _no_keys(draft: Draft) -> None:
    draft.keys = torch.stack([torch.zeros(draft.k.shape[2], dtype=torch.bool), draft.chances(0.7, draft.k.shape[2])])


def _hidden_nan(draft: Draft) -> None:
    kept = draft.chances(0.6, BATCH, draft.k.shape[2])
    hidden = ~kept[:, None, :, None]
    draft.k, draft.v = draft.k.masked_fill(hidden, torch.nan), draft.v.masked_fill(hidden, torch.inf)
    draft.keys = kept


HARD_INPUTS: tuple[HardInput, ...] = (
    HardInput("ordinary", "standard normal numbers, for comparison", _ordinary, layouts_of_an_image),
    HardInput("large logits", "logits spread over ±10,000", _large_logits, layouts_of_an_image),
    HardInput("large and close", "logits of 10,000 that differ by about 1", _large_and_close, layouts_of_an_image),
    HardInput("equal scores", "all logits of a query are the same", _equal_scores, layouts_of_an_image),
    HardInput("dominant key", "half of the queries have one key 100 ahead", _dominant_key, layouts_of_an_image),
    HardInput("denormals", "values, and half of the keys, below the smallest normal", _denormals, layouts_of_an_image),
    HardInput("mixed magnitudes", "each number times 0.01 to 100", _mixed_magnitudes, layouts_of_an_image),
    HardInput("large values", "values up to 0.9 of the dtype's largest", _large_values, layouts_of_an_image, 1e-3),
    HardInput("long rows", "4096 keys, values around 1", _values_around_one, layouts_of_long_rows),
    HardInput(
        "long columns", "up to 4096 queries that read the same keys", _values_around_one, layouts_of_long_columns
    ),
    HardInput("bias -10,000", "a bias of -10,000 on half of the pairs", _bias_of_ten_thousand, layouts_of_an_image),
    HardInput(
        "bias in float32",
        "a bias around 10 that stays in float32",
        _bias_of_float32,
        layouts_of_an_image,
        learned_bias=True,
    ),
    HardInput(
        "smallest bias", "a float32 bias of -3.4e38, for some queries on all keys", _smallest_bias, layouts_of_an_image
    ),
    HardInput("infinite bias", "a bias of -inf, for some queries on all keys", _infinite_bias, layouts_of_an_image),
    HardInput("one key", "one item has a single key that may be seen", _one_key, layouts_of_an_image),
    HardInput("all keys masked", "one item has no key that may be seen", _no_keys, layouts_of_an_image),
    HardInput("hidden NaN", "keys and values that nobody may see are NaN and inf", _hidden_nan, layouts_of_an_image),
)
"""The inputs of the page on numerics, for tests of your own backend."""
