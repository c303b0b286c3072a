"""Stencils by tiles: queries of their own, windows that are moved inside, and memory that does not grow with them."""

from __future__ import annotations

import pytest
import torch

from attnkit import Grid, attend
from attnkit.kernels.chunked import sizes, stencil, stencil_halos, stencil_tiles
from attnkit.kernels.chunked.stencil_halos import Halos, extent
from attnkit.kernels.ops.stencil import STENCIL
from attnkit.layouts import RelativeTable, Stencil
from attnkit.testing import dense_attention, outputs_and_gradients, peak_memory, random_qkv, random_tensor

LAYOUTS = {
    "moved inside": Stencil(Grid(6, 7), 3, border="clamp"),
    "moved inside, with a prefix": Stencil(Grid(7, 5, prefix=2), 5, border="clamp"),
    "moved inside and dilated": Stencil(Grid(7, 9, prefix=1), 3, dilation=(2, 3), border="clamp"),
    "moved inside and strided": Stencil(Grid(9, 6), 3, stride=(2, 3), border="clamp"),
    "dilated and strided": Stencil(Grid(11, 8), 3, stride=(3, 2), dilation=(2, 4), border="clamp"),
    "larger than the grid": Stencil(Grid(3, 5), (5, 9), border="clamp"),
    "centred": Stencil(Grid(6, 7, prefix=1), (3, 5)),
    "centred, dilated and strided": Stencil(Grid(8, 9), 3, stride=2, dilation=(3, 1)),
    "a line": Stencil(Grid(13, prefix=1), 5, border="clamp"),
    "a volume": Stencil(Grid(3, 4, 5), 3, border="clamp"),
    "one token": Stencil(Grid(1, 1), 3, border="clamp"),
}


@pytest.fixture
def tiles_of_nine(monkeypatch):
    """Several tiles and pieces of a small map."""
    monkeypatch.setattr(stencil_halos, "TILE", 9)


def compared(layout, **extra):
    """Outputs and gradients of the chunked kernels and of dense attention, of two items."""
    q, k, v = random_qkv((layout.num_queries, layout.num_keys), batch=2, heads=2, head_dim=3, value_dim=4, grad=True)

    def answers(compute):
        def run(q, k, v, *tables):
            return compute(q, k, v, dict(zip(extra, tables, strict=True)))

        found = outputs_and_gradients(run, [q, k, v, *extra.values()])
        return found[0] + found[1]

    found = answers(
        lambda q, k, v, more: attend(q, k, v, layout, scale=0.7, return_lse=True, backend="chunked", **more)
    )
    right = answers(lambda q, k, v, more: dense_attention(q, k, v, layout.to_mask(), 0.7, **more))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("tiles_of_nine")
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_as_dense_attention(name, small, monkeypatch):
    if small:
        # One tile at a time.
        monkeypatch.setattr(stencil_tiles, "CACHE", 1)
        monkeypatch.setattr(sizes, "CACHE", 1)
    compared(LAYOUTS[name])


@pytest.mark.usefixtures("tiles_of_nine")
@pytest.mark.parametrize("name", LAYOUTS)
def test_bias_gain_and_masked_keys(name):
    layout = LAYOUTS[name]
    size = (layout.num_queries, layout.num_keys)
    layout = layout.restrict(torch.arange(2 * size[1]).view(2, 1, -1) % 3 > 0)
    bias, gain = random_tensor(1, 2, *size, seed=4, grad=True), random_tensor(2, 1, *size, seed=5, grad=True)
    compared(layout, bias=bias, gain=gain)


@pytest.mark.parametrize("with_tables", [False, True])
@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.border == "mask"])
def test_shifted_maps_compute_the_same(name, with_tables, monkeypatch):
    """They are left to learned queries whose scores lie far apart, to export, and to other devices."""
    monkeypatch.setattr(stencil, "_tiled", lambda given: False)
    layout = LAYOUTS[name]
    size = (layout.num_queries, layout.num_keys)
    tables = {
        "bias": random_tensor(1, 2, *size, seed=4, grad=True),
        "gain": random_tensor(2, 1, *size, seed=5, grad=True),
    }
    compared(layout.restrict(torch.arange(size[1])[None, None] % 3 > 0), **(tables if with_tables else {}))


@pytest.mark.usefixtures("tiles_of_nine")
@pytest.mark.parametrize("border", ["mask", "clamp"])
def test_biases_of_a_relative_table(border):
    grid = Grid(6, 5, prefix=1)
    layout = Stencil(grid, 3, border=border)
    q, k, v = random_qkv((31, 31), heads=2, grad=True)
    table = random_tensor(2, 5, 5, seed=3, grad=True)
    found = []
    for backend in ("chunked", "reference"):

        def run(q, k, v, table, backend=backend):
            return attend(q, k, v, layout, bias=RelativeTable(table, grid), backend=backend)

        found.append(outputs_and_gradients(run, [q, k, v, table]))
    for one, other in zip(*(answers[0] + answers[1] for answers in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("tiles_of_nine")
def test_a_bias_that_hides_a_whole_row_alike():
    layout = Stencil(Grid(6, 7), 3, border="clamp")
    bias = torch.zeros(1, 1, 42, 42, dtype=torch.float32)
    bias[..., 5, :] = torch.finfo(torch.float32).min
    q, k, v = random_qkv((42, 42), dtype=torch.float32, grad=True)
    found = [
        outputs_and_gradients(lambda q, k, v, b=b: attend(q, k, v, layout, bias=bias, backend=b), [q, k, v])
        for b in ("chunked", "reference")
    ]
    for one, other in zip(*(answers[0] + answers[1] for answers in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    layout = Stencil(Grid(20, 20), 7, border="clamp")
    q, k, v = random_qkv((400, 400), dtype=dtype)
    found = attend(q, k, v, layout, backend="chunked")
    right = dense_attention(q.double(), k.double(), v.double(), layout.to_mask())[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), right, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_same_inputs_give_the_same_bits():
    layout = Stencil(Grid(17, 19), 5, border="clamp")
    given = random_qkv((323, 323), dtype=torch.float32, grad=True)
    one, other = (
        outputs_and_gradients(lambda q, k, v: attend(q, k, v, layout, backend="chunked"), list(given)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one[0] + one[1], other[0] + other[1], strict=True))


def test_memory_does_not_grow_with_the_window():
    given = random_qkv((64 * 64, 64 * 64), batch=1, heads=4, head_dim=16, value_dim=16, dtype=torch.float32, grad=True)

    def used(kernel, backend):
        layout = Stencil(Grid(64, 64), kernel, border="clamp")
        run = lambda: torch.autograd.grad(attend(*given, layout, backend=backend).sum(), given)  # noqa: E731
        run()
        return peak_memory(run)

    found = {kernel: used(kernel, "chunked") for kernel in (3, 7, 13)}
    assert max(found.values()) < 2 * found[3]
    assert 8 * found[7] < used(7, "gather")


def test_tiles_cover_every_query_once():
    for layout in LAYOUTS.values():
        halos = Halos(layout)
        assert sorted(halos.query[halos.query >= 0].tolist()) == list(range(halos.queries))
        assert torch.equal(halos.query.flatten()[halos.slot], torch.arange(halos.queries))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_extent_is_that_of_the_tiles(name):
    halos, (tiles, keys) = Halos(LAYOUTS[name]), extent(LAYOUTS[name])
    assert tiles >= halos.tiles and tiles <= 2 * halos.tiles
    assert keys >= halos.keys - halos.prefix


def test_a_bias_for_each_row_of_queries():
    q, k, v = random_qkv((30, 30), heads=2, grad=True)
    row = random_tensor(1, 2, 9, 5, 1, seed=2, grad=True)
    window = ([5, 6], 0, [3, 3], [1, 1], [1, 1], True, 0.5)

    def run(compute):
        return outputs_and_gradients(
            lambda q, k, v, row: STENCIL.op(q, k, v, compute(row), None, None, *window), [q, k, v, row]
        )

    found, right = run(lambda row: row), run(lambda row: row.expand(-1, -1, -1, -1, 6))
    for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
        torch.testing.assert_close(one, other)


# torch 2.15 looks at the gradients of its own copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_pytorch_finds_nothing_wrong():
    q, k, v = random_qkv((6, 21), heads=3, head_dim=3, value_dim=5, dtype=torch.float32, grad=True)
    bias, gain = (random_tensor(1, 3, 10, 2, 3, seed=seed, dtype=torch.float32, grad=True) for seed in range(2))
    window = ([4, 5], 1, [3, 3], [2, 2], [1, 1], True, 0.5)
    torch.library.opcheck(STENCIL.op, (q, k, v, bias, gain, None, *window))
