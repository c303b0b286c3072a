"""Tables and layouts that are made once are right for whoever asks next, and do not pile up."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnkit import Dense, Grid, HeadMix, RandomWindow, Window, attend
from attnkit.errors import LayoutError
from attnkit.kernels import sdpa
from attnkit.layouts import Blocks, RelativeTable, Stencil, cache
from attnkit.layouts import Dense as DenseLayout
from attnkit.testing import random_qkv

GRID = Grid(4, 6, prefix=1)


@pytest.fixture(autouse=True)
def empty():
    cache.forget()
    yield
    cache.forget()


def mix():
    return HeadMix(16, [Window(heads=2, window=2), RandomWindow(heads=1, window=4), Dense(heads=1)]).eval()


def test_the_least_recently_used_is_forgotten(monkeypatch):
    monkeypatch.setattr(cache, "CAPACITY", 2)
    made = [cache.cached(key, lambda: (torch.zeros(1),))[0] for key in "abaca"]
    assert made[0] is made[2] is made[4]
    assert list(cache._kept) == ["c", "a"]


def test_tables_together_are_no_larger_than_a_limit(monkeypatch):
    monkeypatch.setattr(cache, "BYTES", 100)
    for key in range(5):
        cache.cached(key, lambda: (torch.zeros(5), torch.zeros(5)))
        assert sum(kept.size for kept in cache._kept.values()) <= 100
    assert list(cache._kept) == [3, 4]
    # What is larger by itself does not drive out all others.
    cache.cached("large", lambda: (torch.zeros(26),))
    assert list(cache._kept) == [3, 4]


def test_many_image_sizes_leave_no_more_than_the_limits(monkeypatch):
    monkeypatch.setattr(cache, "CAPACITY", 8)
    layer = mix()
    with torch.no_grad():
        for width in range(2, 22):
            layer(torch.randn(1, 4 * width, 16), Grid(4, width))
            assert len(cache._kept) <= 8


def test_layouts_that_depend_on_sizes_only_are_made_once():
    assert Blocks.windows(GRID, 2, device="cpu") is Blocks.windows(Grid(4, 6, prefix=1), 2, device="cpu")
    assert Blocks.windows(GRID, 2) is Blocks.windows(GRID, (2, 2), shift=0)
    others = [
        Blocks.windows(GRID, 2),
        Blocks.windows(GRID, (2, 3)),
        Blocks.windows(GRID, 2, shift=1),
        Blocks.windows(GRID, 2, dilated=True),
        Blocks.windows(Grid(4, 6), 2),
        Blocks.windows(Grid(6, 4, prefix=1), 2),
    ]
    assert len({id(one) for one in others}) == len(others)
    assert DenseLayout.square(5) is DenseLayout.square(5)
    assert DenseLayout.square(5) is not DenseLayout.square(6)


def test_a_layout_remembered_for_a_number_is_not_one_for_what_equals_it():
    DenseLayout.square(1)
    with pytest.raises(LayoutError):
        DenseLayout.square(True)
    Blocks.windows(GRID, 1)
    with pytest.raises(LayoutError):
        Blocks.windows(GRID, True)


def test_whoever_writes_to_a_table_spoils_it_for_nobody_else():
    layer, x = mix(), torch.randn(2, GRID.tokens, 16)
    right = layer(x, GRID)
    for order in (Blocks.windows(GRID, 2).order, Blocks.windows(GRID, 2, shift=1).order):
        order.token.fill_(1)
        order.slot.zero_()
    assert not torch.equal(Blocks.windows(GRID, 2).order.token, torch.ones_like(order.token))
    assert torch.equal(Blocks.windows(GRID, 2).order.slot.sort().values.flatten(), torch.arange(GRID.image_tokens))
    torch.testing.assert_close(layer(x, GRID), right, rtol=0, atol=0)


def test_restricting_a_remembered_layout_leaves_it_as_it_is():
    layout = Blocks.windows(GRID, 2)
    masked = layout.restrict(torch.zeros(GRID.tokens, dtype=torch.bool))
    assert Blocks.windows(GRID, 2) is layout is not masked
    assert layout.key_mask is None
    layer, x = mix(), torch.randn(2, GRID.tokens, 16)
    right = layer(x, GRID)
    layer(x, GRID, token_mask=torch.rand(2, GRID.tokens) < 0.5)
    torch.testing.assert_close(layer(x, GRID), right, rtol=0, atol=0)


def test_what_inference_mode_made_serves_training():
    layer, x = mix(), torch.randn(2, GRID.tokens, 16)
    with torch.inference_mode():
        layer(x, GRID)
    layer(x, GRID).sum().backward()
    found = layer.qkv.weight.grad.clone()
    layer.zero_grad()
    cache.forget()
    layer(x, GRID).sum().backward()
    torch.testing.assert_close(found, layer.qkv.weight.grad)


def test_tables_lie_where_tensors_are_made_at_the_moment():
    for make in (lambda: Blocks.windows(GRID, 2).order.token, lambda: Stencil(GRID, 3).taps()):
        cache.forget()
        with torch.device("meta"):
            assert make().is_meta
        assert not make().is_meta


def test_a_module_that_moves_gets_the_tables_of_its_device_and_dtype():
    layer, x = mix(), torch.randn(2, GRID.tokens, 16)
    right = layer(x, GRID)
    torch.testing.assert_close(copy.deepcopy(layer).double()(x.double(), GRID).float(), right)
    assert copy.deepcopy(layer).to("meta")(x.to("meta"), GRID).is_meta
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x, GRID), right, rtol=0, atol=0)
    torch.testing.assert_close(layer(x, GRID), right, rtol=0, atol=0)


def test_tables_made_inside_a_function_transform_are_not_kept():
    layer = HeadMix(16, [Window(heads=4, window=2)])
    x = torch.randn(2, GRID.tokens, 16)
    inside = torch.func.grad(lambda one: layer(one, GRID).sum())(x)
    assert not [kept for kept in cache._kept.values() if kept.tables]
    x.requires_grad_()
    torch.testing.assert_close(inside, *torch.autograd.grad(layer(x, GRID).sum(), x))


def test_fake_tensors_and_real_ones_do_not_meet():
    layer, x = mix(), torch.randn(2, GRID.tokens, 16)
    right = layer(x, GRID)
    for _ in range(2):
        # Once with tables that are kept, once without.
        with FakeTensorMode():
            found = mix()(torch.randn(2, GRID.tokens, 16), GRID)
        assert found.shape == right.shape
        torch.testing.assert_close(layer(x, GRID), right, rtol=0, atol=0)
        cache.forget()


def test_a_copied_or_pickled_layout_says_again_where_its_tables_lie():
    layout = Blocks.windows(GRID, 2)
    before = layout.signature, layout.order.form
    for again in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert not {"signature", "made_of"} & set(vars(again))
        assert "form" not in vars(again.order)
        assert (again.signature, again.order.form) == before
        assert torch.equal(again.to_mask(), layout.to_mask())


def test_threads_share_the_cache(monkeypatch):
    monkeypatch.setattr(cache, "CAPACITY", 3)
    grids = [Grid(2, width) for width in range(1, 9)]
    right = {grid: Blocks.windows(grid, 2).to_mask() for grid in grids}
    qkv = {grid: tuple(one.float() for one in random_qkv((grid.tokens, grid.tokens))) for grid in grids}
    outs = {grid: attend(*qkv[grid], Blocks.windows(grid, 2)) for grid in grids}
    wrong = []

    def work(start):
        try:
            for turn in range(150):
                grid = grids[(start + turn * 3) % len(grids)]
                layout = Blocks.windows(grid, 2)
                if not torch.equal(layout.to_mask(), right[grid]):
                    wrong.append(grid)
                if not torch.equal(attend(*qkv[grid], layout), outs[grid]):
                    wrong.append(grid)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pairs_of_a_relative_table_are_those_of_its_sizes():
    values = torch.randn(2, 3, 5)
    for grid, stride in ((GRID, 1), (Grid(4, 6), 1), (Grid(6, 4), 1), (Grid(4, 6), 2), (Grid(4, 6), [2, 1]), (GRID, 1)):
        table = RelativeTable(values, grid, stride)
        queries = grid.strided(stride).tokens
        found = table.dense(queries)
        cache.forget()
        assert torch.equal(found, table.dense(queries))


def stencils():
    return [
        Stencil(GRID, 3),
        Stencil(GRID, 3, stride=3),
        Stencil(GRID, 3, dilation=2),
        Stencil(GRID, 3, border="clamp"),
    ]


def test_masks_of_what_depends_on_sizes_are_those_of_their_own_layout():
    """Computed by the backend that remembers masks, in any order, and with masked keys between."""
    windows = [
        Blocks.windows(GRID, 2),
        Blocks.windows(GRID, 2, shift=1),
        Blocks.windows(GRID, 3),
        Blocks.windows(GRID, 4),
    ]
    layouts = windows + [one for one in stencils() if one.num_queries == GRID.tokens]
    masked = [one.restrict(torch.arange(GRID.tokens) % 3 > 0) for one in layouts]
    q, k, v = (one.float() for one in random_qkv((GRID.tokens, GRID.tokens)))
    for _ in range(2):
        for layout in layouts + masked:
            right = attend(q, k, v, layout, backend="reference")
            torch.testing.assert_close(attend(q, k, v, layout, backend="sdpa"), right, rtol=1e-5, atol=1e-5)


def test_keys_that_no_query_sees_stay_unseen_where_the_mask_is_remembered():
    layout = Stencil(Grid(9), 1, stride=4)
    q, k, v = (one.float() for one in random_qkv((3, 9)))
    v[:, :, 1] = torch.nan
    for _ in range(2):
        assert attend(q, k, v, layout, backend="sdpa").isfinite().all()


def test_a_mask_too_large_is_not_kept(monkeypatch):
    monkeypatch.setattr(sdpa, "LARGEST", 100)
    q, k, v = (one.float() for one in random_qkv((GRID.tokens, GRID.tokens)))
    attend(q, k, v, Stencil(GRID, 3), backend="sdpa")
    assert not [key for key in cache._kept if key[0] == "seen"]
    monkeypatch.setattr(sdpa, "LARGEST", GRID.tokens**2)
    attend(q, k, v, Stencil(GRID, 3), backend="sdpa")
    assert [key for key in cache._kept if key[0] == "seen"]


def test_what_a_captured_graph_reads_stays(monkeypatch):
    """Replays read the memory of a table that was forgotten meanwhile."""
    monkeypatch.setattr(cache, "_held", {})
    monkeypatch.setattr(cache, "CAPACITY", 1)
    first = cache.cached("first", lambda: (torch.zeros(1),))
    cache.cached("second", lambda: (torch.ones(1),))
    assert not cache._held
    second = cache.cached("second", lambda: first)
    with monkeypatch.context() as patch:
        patch.setattr(cache._Kept, "captured", True)
        assert cache.cached("second", lambda: first) is second
        assert cache.cached("second", lambda: first) is second
    cache.cached("third", lambda: first)
    assert "second" not in cache._kept
    assert [kept.tables for kept in cache._held.values()] == [second]


def test_what_a_captured_graph_makes_is_made_again(monkeypatch):
    """It has no numbers until the graph is replayed, and lies in the graph's memory."""
    with monkeypatch.context() as patch:
        patch.setattr(cache._Kept, "captured", True)
        made = [cache.cached("one", lambda: (torch.zeros(1),)) for _ in range(2)]
        layouts = [cache.cached_layout("two", lambda: DenseLayout(4)) for _ in range(2)]
    assert made[0] is not made[1]
    assert layouts[0] is not layouts[1] and layouts[0].made_of is None
    assert not cache._kept
