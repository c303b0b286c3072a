"""Hypothesis strategies for grids, seeds, layouts and options; importing this module needs Hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnkit.errors import MissingExtraError
from attnkit.grid import Grid
from attnkit.layouts import Layout
from attnkit.primitives import PrimitiveOptions
from attnkit.registry import list_primitives
from attnkit.testing.layouts import KINDS, random_layout
from attnkit.testing.options import random_options

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise MissingExtraError(
        f"attnkit.testing.strategies needs hypothesis, which is not installed ({error}); "
        f"run: pip install 'attnkit[dev]'"
    ) from error


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


def primitive_options(name: str | None = None) -> st.SearchStrategy[PrimitiveOptions]:
    """Valid options of one primitive, or of any registered one."""
    names = st.sampled_from(list_primitives()) if name is None else st.just(name)
    return st.builds(lambda name, seed: random_options(name, seed=seed), names, seeds())
