"""Queries that see nothing, keys that nobody sees, and calls without items, queries or keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Grid, attend
from attnkit.kernels.call import AttendCall
from attnkit.kernels.dispatch import backend_named
from attnkit.kernels.ops.stencil import STENCIL
from attnkit.kernels.stencil_calls import computed_by_stencil, seen_by_some
from attnkit.layouts import Blocks, Dense, Stencil, TokenMask, TokenSets
from attnkit.testing import dense_attention, outputs_and_gradients, random_qkv, random_tensor
from attnkit.testing.strategies import layout_cases, seeds

BACKENDS = ("reference", "sdpa", "chunked", "gather")
GRID = Grid(2, 3, prefix=1)


def able(q, k, v, layout, **extra):
    call = AttendCall(q, k, v, layout, 1.0, **extra)
    return [backend for backend in BACKENDS if not backend_named(backend).why_not(call)]


def filled(k, v, hidden, filling, which="kv"):
    """k and v that ask for gradients, with a number in hidden keys of some of them and 0 in the others'."""
    both = zip("kv", (k, v), strict=True)
    return [one.masked_fill(hidden, filling if name in which else 0.0).requires_grad_() for name, one in both]


def layouts_without_keys(keys):
    """Every kind over GRID with only some keys left."""
    return [
        Dense(7).restrict(keys),
        Stencil(GRID, 3).restrict(keys),
        Stencil(GRID, 3, border="clamp").restrict(keys),
        Blocks.windows(GRID, 2).restrict(keys),
        Blocks.from_regions(GRID, 2, torch.tensor([[[0], [-1], [2], [1]]])).restrict(keys),
        TokenSets(torch.tensor([[0, 1], [-1, -1], [2, 2], [6, 5], [4, -1], [3, 3], [1, 2]]), 7).restrict(keys),
        TokenMask(torch.ones(7, 7, dtype=torch.bool).tril(-1)).restrict(keys),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_queries_without_keys_give_zero_and_no_gradient(dtype):
    nobody = torch.zeros(7, dtype=torch.bool)
    for layout in layouts_without_keys(nobody):
        q, k, v = random_qkv((7, 7), batch=2, heads=2, dtype=dtype, grad=True)
        for backend in able(q, k, v, layout):
            out = attend(q, k, v, layout, backend=backend)
            assert torch.equal(out, torch.zeros_like(out)), (layout.kind, backend)
            for gradient in torch.autograd.grad(out.double().sum(), (q, k, v)):
                assert torch.equal(gradient, torch.zeros_like(gradient)), (layout.kind, backend)


@given(case=layout_cases(), seed=seeds(), share=st.sampled_from([0.0, 0.2, 0.5]))
def test_empty_rows_among_others(case, seed, share):
    kept = torch.rand(case.batch, 1, case.sizes[1], generator=torch.Generator().manual_seed(seed)) < share
    layout = case.layout.restrict(kept)
    empty = ~layout.to_mask().any(-1).expand(case.batch, case.heads, -1)
    q, k, v = random_qkv(case.sizes, batch=case.batch, heads=case.heads, seed=seed, grad=True)
    for backend in able(q, k, v, layout):
        out = attend(q, k, v, layout, backend=backend)
        assert (out[empty] == 0).all()
        gradients = torch.autograd.grad(out, (q, k, v), random_tensor(*out.shape, seed=seed))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[0][empty] == 0).all()
    for backend in able(q, k, v, layout, return_lse=True):
        lse = attend(q, k, v, layout, backend=backend, return_lse=True)[1]
        assert torch.equal(lse == -torch.inf, empty)
        # The gradient that arrives at an lse of -inf goes nowhere.
        if lse.requires_grad:
            gradients = torch.autograd.grad(lse, (q, k), random_tensor(*lse.shape, seed=seed))
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert (gradients[0][empty] == 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@given(
    case=layout_cases(),
    seed=seeds(),
    share=st.sampled_from([0.3, 0.8, 1.0]),
    learned=st.booleans(),
    spoilt=st.sampled_from(["k", "v", "kv"]),
)
def test_what_no_query_sees_never_reaches_the_output(poison, case, seed, share, learned, spoilt):
    """Also where all queries are one row, repeated without a copy, as learned queries are."""
    kept = torch.rand(case.batch, 1, case.sizes[1], generator=torch.Generator().manual_seed(seed)) < share
    layout = case.layout.restrict(kept)
    mask = layout.to_mask().expand(case.batch, case.heads, *case.sizes)
    q, k, v = random_qkv(case.sizes, batch=case.batch, heads=case.heads, seed=seed)
    hidden = ~mask.any(-2)[..., None]
    clean, spoiled = filled(k, v, hidden, 0.0), filled(k, v, hidden, poison, spoilt)
    q = q[:, :, :1].expand_as(q) if learned else q
    leaves = [] if learned else [q.requires_grad_()]
    right = outputs_and_gradients(lambda *given: dense_attention(q, *given[-2:], mask)[0], [*leaves, *clean])
    for backend in able(q, *spoiled, layout):
        found = outputs_and_gradients(
            lambda *given, backend=backend: attend(q, *given[-2:], layout, backend=backend), [*leaves, *spoiled]
        )
        for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# Windows that leave holes between them, and what takes another way through the kernels.
HOLES = {
    "stride 2": Stencil(Grid(4), 1, stride=2),
    "a map": Stencil(Grid(6, 6), 1, stride=2),
    "stride 4, clamped": Stencil(Grid(11, 3), 3, stride=(4, 1), border="clamp"),
    "stride 4": Stencil(Grid(3, 12), 3, stride=(1, 4)),
    "stride 2, dilation 2": Stencil(Grid(9, 8), 3, stride=2, dilation=2),
    "the end of an axis": Stencil(Grid(3, 6), (1, 3), stride=(1, 3)),
    "a video": Stencil(Grid(4, 3, 5), (1, 3, 1), stride=(2, 1, 3)),
    "masked": Stencil(Grid(6, 6), 1, stride=2).restrict(torch.arange(36) % 8 != 0),
}


@pytest.mark.parametrize("spoilt", ["k", "v", "kv"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", HOLES)
def test_what_lies_between_windows_reaches_nobody(name, learned, poison, spoilt):
    """Keys and values apart too: which kernel computes learned queries depends on the numbers in the keys."""
    layout = HOLES[name]
    sizes = (1 if learned else layout.num_queries, layout.num_keys)
    q, k, v = random_qkv(sizes, heads=2, head_dim=1 if learned else 4, value_dim=4)
    hidden = ~layout.to_mask().any(-2)[..., None]
    assert hidden.any()
    q = q.expand(-1, -1, layout.num_queries, -1) if learned else q.requires_grad_()
    clean, spoiled = filled(k, v, hidden, 0.0), filled(k, v, hidden, poison, spoilt)
    leaves = [] if learned else [q]

    def of(k, v, backend):
        found = attend(q, k, v, layout, backend=backend)
        return [found, *torch.autograd.grad(found.square().sum(), [*leaves, k, v])]

    right = of(*clean, "reference")
    assert {"reference", "chunked", "gather"} <= set(able(q, *spoiled, layout))
    for backend in able(q, *spoiled, layout):
        for one, other in zip(of(*spoiled, backend), right, strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-9, atol=1e-9, msg=lambda text, backend=backend: backend + text
            )


@given(
    grid=st.lists(st.integers(1, 13), min_size=1, max_size=2).map(lambda sizes: Grid(*sizes)),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 6),
    dilation=st.integers(1, 5),
    border=st.sampled_from(["mask", "clamp"]),
)
def test_which_keys_any_window_holds(grid, kernel, stride, dilation, border):
    layout = Stencil(grid, kernel, stride=stride, dilation=dilation, border=border)
    right, found = layout.to_mask()[0, 0].any(0), seen_by_some(layout, torch.device("cpu"))
    assert right.all() if found is None else torch.equal(found, right) and not right.all()


@pytest.mark.parametrize("window", [{"stride": 2}, {"dilation": 2}, {"stride": 2, "border": "clamp"}])
def test_windows_without_holes_cost_nothing(window):
    call = AttendCall(*random_qkv((16 if window.get("stride") else 64, 64)), Stencil(Grid(8, 8), 3, **window), 1.0)
    given = []
    computed_by_stencil(call, lambda *taken: (given.append(taken[1:3]), STENCIL.op(*taken))[1])
    assert given[0][0] is call.k and given[0][1] is call.v


@pytest.mark.parametrize("return_lse", [False, True])
def test_what_only_a_block_without_queries_sees_is_seen_by_nobody(return_lse):
    """Regions at the end of a grid may hold no token; where they are routed to must not matter, NaN included."""
    grid = Grid(1, 4)
    # Three regions of two tokens, the last of them empty: it alone sees the second.
    layout = Blocks.from_regions(grid, (1, 3), torch.tensor([[[0], [0], [1]]]))
    q, k, v = random_qkv((4, 4))
    k[:, :, 2:], v[:, :, 2:] = torch.nan, torch.inf
    inputs = [one.requires_grad_() for one in (q, k, v)]
    for backend in able(q, k, v, layout, return_lse=return_lse):
        found = attend(q, k, v, layout, backend=backend, return_lse=return_lse)
        out = found[0] if return_lse else found
        assert out.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), inputs)), backend


@given(case=layout_cases(), seed=seeds())
def test_only_what_is_seen_matters(case, seed):
    """Changing a key or value changes the outputs of those who see it, and of nobody else."""
    mask = case.layout.to_mask().expand(case.batch, case.heads, *case.sizes)
    q, k, v = random_qkv(case.sizes, batch=case.batch, heads=case.heads, seed=seed)
    chosen = seed % case.sizes[1]
    other = v.clone()
    other[:, :, chosen] += 1.0
    for backend in able(q, k, v, case.layout):
        before, after = (attend(q, k, one, case.layout, backend=backend) for one in (v, other))
        changed = (before != after).any(-1)
        assert torch.equal(changed, mask[..., chosen]), backend


@pytest.mark.parametrize("sizes", [(0, 2), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(sizes):
    queries, keys = sizes
    for layout in (Dense(queries, keys), TokenSets(torch.full((queries, 2), -1), keys)):
        q, k, v = random_qkv(sizes, batch=2, heads=2, value_dim=3, grad=True)
        accepting = able(q, k, v, layout)
        assert {"reference", "sdpa"} <= set(accepting)
        assert ("gather" in accepting) == (layout.kind == "token_sets" and keys > 0)
        for backend in accepting:
            out = attend(q, k, v, layout, backend=backend)
            assert torch.equal(out, torch.zeros(2, 2, queries, 3, dtype=torch.float64))
            assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("with_mask", [False, True])
def test_no_items(with_mask):
    q, k, v = random_qkv((7, 7), batch=0, heads=2, grad=True)
    kept = torch.zeros(0, 7, dtype=torch.bool) if with_mask else torch.arange(7) < 5
    for layout in layouts_without_keys(kept):
        for backend in able(q, k, v, layout):
            out = attend(q, k, v, layout, backend=backend)
            assert out.shape == (0, 2, 7, 4), (layout.kind, backend)
            out.sum().backward()


@given(seed=seeds(), size=st.sampled_from([50.0, 1e3, 1e8]))
def test_logits_of_any_size_and_shift(seed, size):
    """Adding a constant to all logits of a row changes nothing, and nothing overflows."""
    q, k, v = random_qkv((7, 7), heads=2, seed=seed)
    shift = random_tensor(1, 2, 7, 1, seed=seed) * size
    layouts = [Dense(7), Stencil(GRID, 3), Blocks.windows(GRID, 2), Stencil(GRID, 3).lower("token_sets")]
    for layout in layouts:
        for backend in able(q, k, v, layout, bias=shift):
            plain = attend(q, k, v, layout, backend=backend)
            moved = attend(q, k, v, layout, bias=shift, backend=backend)
            torch.testing.assert_close(moved, plain, rtol=1e-14 * size, atol=1e-14 * size)
            sharp = attend(q * size, k, v, layout, backend=backend)
            assert sharp.isfinite().all()


@given(case=layout_cases(), seed=seeds())
def test_outputs_are_averages_of_visible_values(case, seed):
    q, k, _ = random_qkv(case.sizes, batch=case.batch, heads=case.heads, seed=seed)
    seeing = case.layout.to_mask().any(-1).expand(case.batch, case.heads, -1)
    constant = torch.full((case.batch, case.heads, case.sizes[1], 3), 2.5, dtype=torch.float64)
    for backend in able(q, k, constant, case.layout):
        out = attend(q, k, constant, case.layout, backend=backend)
        expected = 2.5 * seeing[..., None].double().expand_as(out)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
