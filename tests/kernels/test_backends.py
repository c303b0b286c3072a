"""Every backend that accepts a call gives what the oracle gives, forward and backward, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Grid, attend
from attnkit.kernels.call import AttendCall
from attnkit.kernels.dispatch import backend_named
from attnkit.layouts import Blocks, RelativeTable, Stencil
from attnkit.testing import dense_attention, outputs_and_gradients, random_qkv, random_tensor
from attnkit.testing.strategies import grids, layout_cases, seeds

BACKENDS = ("reference", "sdpa", "chunked", "gather")


def agree(actual, expected, what):
    for at, (one, other) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, at=at: f"{what}[{at}]: {text}")


def accepts(backend, case, q, k, v, **extra):
    call = AttendCall(q, k, v, case.layout, 1.0, **extra)
    return not backend_named(backend).why_not(call)


def pair_tensor(form, case, seed):
    """A tensor that broadcasts to (B, heads, Nq, Nk) in one of its forms."""
    full = (case.batch, case.heads, *case.sizes)
    shape = [size if form >> axis & 1 else 1 for axis, size in enumerate(full)]
    return random_tensor(*shape, seed=seed, grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    grid=grids(max_height=5, max_width=6),
    seed=seeds(),
    extents=st.tuples(st.sampled_from([1, 3, 9]), st.sampled_from([1, 5])),
    border=st.sampled_from(["mask", "clamp"]),
    strided=st.booleans(),
    with_gain=st.booleans(),
)
def test_relative_tables(backend, grid, seed, extents, border, strided, with_gain):
    stride = (1 + seed % 3, 1 + seed // 3 % 2) if strided else 1
    layouts = [Stencil(grid, 3, stride=stride, border=border), Stencil(grid, 3, stride=stride).lower("token_sets")]
    if not strided:
        index = torch.randint(-1, 4, (2, 1, 4, 2), generator=torch.Generator().manual_seed(seed))
        layouts += [Blocks.windows(grid, 2), Blocks.from_regions(grid, 2, index)]
    with_gain = with_gain and backend not in ("sdpa", "chunked")
    if backend == "chunked":
        others = [one.lower(kind) for one in layouts for kind in ("token_mask", "token_sets")]
        layouts = [*others, *(one for one in layouts if isinstance(one, Blocks))]
    for layout in layouts:
        qkv = random_qkv((layout.num_queries, layout.num_keys), batch=2, heads=2, seed=seed, grad=True)
        tables = [random_tensor(2, *extents, seed=seed + at, grad=True) for at in range(2)]

        def relative(bias, gain, grid=grid):
            values = RelativeTable(bias, grid, stride), RelativeTable(gain, grid, stride, fill=1.0)
            return values[0], values[1] if with_gain else None

        def actual(q, k, v, bias, gain, layout=layout):
            bias, gain = relative(bias, gain)
            return attend(q, k, v, layout, bias=bias, gain=gain, backend=backend)

        def expected(q, k, v, bias, gain, layout=layout):
            dense = [None if one is None else one.dense(layout.num_queries) for one in relative(bias, gain)]
            return dense_attention(q, k, v, layout.to_mask(), bias=dense[0], gain=dense[1])[0]

        found, right = (outputs_and_gradients(function, [*qkv, *tables]) for function in (actual, expected))
        agree(found[0], right[0], "out")
        agree(found[1], right[1], "gradient of q, k, v and tables")


@pytest.mark.parametrize("sizes", [(7,), (2, 3, 2)])
@given(case=st.data(), seed=seeds())
def test_other_numbers_of_axes(sizes, case, seed):
    from attnkit.testing import KINDS, random_layout

    kind = case.draw(st.sampled_from(KINDS))
    layout, pair = random_layout(kind, Grid(*sizes, prefix=seed % 3), batch=2, heads=2, seed=seed)
    qkv = random_qkv(pair, batch=2, heads=2, seed=seed, grad=True)
    expected = outputs_and_gradients(lambda q, k, v: dense_attention(q, k, v, layout.to_mask())[0], qkv)
    for backend in BACKENDS:
        if not backend_named(backend).why_not(AttendCall(*qkv, layout, 1.0)):
            actual = outputs_and_gradients(
                lambda q, k, v, backend=backend: attend(q, k, v, layout, backend=backend), qkv
            )
            agree(actual[0] + actual[1], expected[0] + expected[1], backend)


@given(case=layout_cases(), seed=seeds())
def test_who_accepts_what(case, seed):
    q, k, v = random_qkv(case.sizes, batch=case.batch, heads=case.heads, seed=seed)
    assert accepts("reference", case, q, k, v, gain=q.new_ones(1, 1, 1, 1), return_lse=True)
    assert accepts("sdpa", case, q, k, v)
    assert accepts("gather", case, q, k, v) == (case.layout.kind in ("blocks", "stencil", "token_sets"))
    served = case.layout.kind in ("stencil", "blocks", "token_mask", "token_sets")
    assert accepts("chunked", case, q, k, v) == served
