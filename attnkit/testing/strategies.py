"""Hypothesis strategies for grids, seeds, layouts, options and cases; importing this module needs Hypothesis."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from attnkit.errors import MissingExtraError
from attnkit.grid import Grid
from attnkit.kernels.call import AttendCall
from attnkit.kernels.dispatch import why_not
from attnkit.layouts import Layout
from attnkit.primitives import PrimitiveOptions
from attnkit.registry import list_primitives
from attnkit.testing.cases import MEMORY, TABLE, AttentionCase, PrimitiveCase
from attnkit.testing.layouts import KINDS, random_layout
from attnkit.testing.options import random_options
from attnkit.testing.subject import Subject

try:
    from hypothesis import assume
    from hypothesis import strategies as st
except ImportError as error:
    raise MissingExtraError(
        f"attnkit.testing.strategies needs hypothesis, which is not installed ({error}); "
        f"run: pip install 'attnkit[testing]'"
    ) from error


# What cases of primitives ask for.
BACKENDS_ASKED = (None, "chunked,auto")


@dataclass(frozen=True, eq=False)
class LayoutCase:
    """A random layout and all that it was made from.

    Attributes:
        layout: the layout.
        sizes: its numbers of queries and keys (Nq, Nk).
        grid: the grid it was asked for.
        batch: number of items it may vary over.
        heads: number of heads it may vary over.
        seed: what it was drawn from.
    """

    layout: Layout
    sizes: tuple[int, int]
    grid: Grid
    batch: int
    heads: int
    seed: int

    def __repr__(self) -> str:
        varies = f"batch={self.batch}, heads={self.heads}, seed={self.seed}"
        return f"LayoutCase(random_layout({self.layout.kind!r}, {self.grid}, {varies}))"


def seeds() -> st.SearchStrategy[int]:
    """Seeds; tests draw these instead of arrays."""
    return st.integers(0, 2**31 - 1)


def grids(*, max_height: int = 7, max_width: int = 9, max_prefix: int = 3) -> st.SearchStrategy[Grid]:
    """Grids of height and width from 1 x 1 up, with 0..max_prefix prefix tokens."""
    sizes = (st.integers(1, max_height), st.integers(1, max_width), st.integers(0, max_prefix))
    return st.builds(lambda height, width, prefix: Grid(height, width, prefix=prefix), *sizes)


@st.composite
def layout_cases(
    draw: st.DrawFn, kinds: Sequence[str] = KINDS, *, max_height: int = 6, max_width: int = 7, max_prefix: int = 3
) -> LayoutCase:
    """Random layouts of some kinds over random grids, for one or more items and heads."""
    kind = draw(st.sampled_from(list(kinds)))
    grid = draw(grids(max_height=max_height, max_width=max_width, max_prefix=max_prefix))
    batch, heads, seed = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(seeds())
    layout, sizes = random_layout(kind, grid, batch=batch, heads=heads, seed=seed)
    return LayoutCase(layout, sizes, grid, batch, heads, seed)


def dtypes() -> st.SearchStrategy[str]:
    """Names of dtypes; float64, in which everything is compared exactly, most often."""
    return st.sampled_from(["float64"] * 5 + ["float32", "bfloat16", "float16"])


def head_dims() -> st.SearchStrategy[int]:
    """Widths of a head, 1..256, small ones most often."""
    return st.sampled_from([1, 2, 3, 4, 1, 2, 3, 4, 7, 8, 16, 32, 64, 100, 128, 256])


@st.composite
def primitive_cases(draw: st.DrawFn, options: PrimitiveOptions | str) -> PrimitiveCase:
    """Cases of one primitive: of the very options given, or of any options of the primitive of that name."""
    # One token, one row and one column come often enough by themselves: small grids are drawn most.
    grid = draw(grids(max_height=6, max_width=7, max_prefix=5))
    seed = draw(seeds())
    if isinstance(options, str):
        options = random_options(options, seed=draw(seeds()))
    prefixes = [field.name for field in dataclasses.fields(options) if field.name == "prefix"]
    if prefixes:
        # Options made for some prefix tokens take grids with that many.
        grid = Grid(*grid.sizes, prefix=options.prefix or grid.prefix)  # type: ignore[attr-defined]
    return PrimitiveCase(
        options=options,
        grid=grid,
        batch=draw(st.sampled_from([1, 2, 2, 2, 3, 0])),
        head_dim=draw(head_dims()),
        seed=seed,
        extra=draw(st.integers(0, 2)),
        masked=draw(st.booleans()),
        training=draw(st.booleans()),
        dtype=draw(dtypes()),
        memory=draw(st.sampled_from(MEMORY)),
        backend=draw(st.sampled_from(BACKENDS_ASKED)),
    )


@st.composite
def plans(draw: st.DrawFn, options: PrimitiveOptions | str) -> tuple[PrimitiveCase, list[AttendCall]]:
    """What a primitive decides on random inputs: a case of it, and the attention calls that it makes of the case."""
    case = draw(primitive_cases(options))
    return case, [call for call, _ in Subject(case).calls()]


@st.composite
def attention_cases(
    draw: st.DrawFn, kinds: Sequence[str] = KINDS, backends: Sequence[str] = ("reference", "sdpa", "chunked", "gather")
) -> AttentionCase:
    """Cases of attention over layouts of some kinds on some backends that accept them."""
    forms = st.none() | st.integers(0, 15) | st.just(TABLE)
    # Some kernels take only one width, and only where both are narrow do few keys need several passes.
    width = draw(head_dims())
    case = AttentionCase(
        kind=draw(st.sampled_from(list(kinds))),
        grid=draw(grids(max_height=6, max_width=7, max_prefix=5)),
        backend=draw(st.sampled_from(list(backends))),
        batch=draw(st.sampled_from([1, 2, 2, 3, 0])),
        heads=draw(st.integers(1, 3)),
        head_dim=width,
        value_dim=draw(st.just(width) | head_dims()),
        seed=draw(seeds()),
        bias=draw(forms),
        gain=draw(forms),
        lse=draw(st.booleans()),
        dtype=draw(dtypes()),
        memory=draw(st.sampled_from(MEMORY)),
    )
    if why_not(case.backend, case.call()):
        # What only some backends do is left out before the case is given up.
        case = dataclasses.replace(case, gain=None, lse=False)
        assume(not why_not(case.backend, case.call()))
    return case


def primitive_options(name: str | None = None) -> st.SearchStrategy[PrimitiveOptions]:
    """Valid options of one primitive, or of any registered one."""
    names = st.sampled_from(list_primitives()) if name is None else st.just(name)
    return st.builds(lambda name, seed: random_options(name, seed=seed), names, seeds())
