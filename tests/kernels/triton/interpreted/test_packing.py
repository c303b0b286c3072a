"""Small regions that share tiles, by Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import attnkit
from attnkit import Grid, attend, use_backend
from attnkit.kernels.call import AttendCall
from attnkit.kernels.ops.token_sets import SetTables
from attnkit.kernels.triton import backend
from attnkit.kernels.triton.blocks import configs as block_configs
from attnkit.kernels.triton.packing import computed_packed
from attnkit.kernels.triton.token_sets import configs
from attnkit.kernels.triton.token_sets.configs import Config
from attnkit.kernels.triton.token_sets.launches import forward_of
from attnkit.layouts import Blocks
from attnkit.testing import random_qkv
from tests.kernels.triton import block_cases
from tests.kernels.triton.block_cases import answers, regions
from tests.kernels.triton.packing_cases import CASES

SMALL = regions(Grid(6, 6, prefix=1), 3, 1, 1, keep=4)


@pytest.fixture
def small_tiles(monkeypatch):
    for table in (configs, block_configs):
        monkeypatch.setattr(table, "configuration", lambda *_: Config(16, 16, 1, 1))


def forbidden(*_):
    raise AssertionError("the other kernels compute this call")


@pytest.mark.parametrize("name", CASES)
def test_as_the_oracle(name, request, monkeypatch):
    monkeypatch.setattr(backend, "computed_by_blocks", forbidden)
    if not CASES[name].tiles:
        request.getfixturevalue("small_tiles")
    block_cases.check(CASES[name], "cpu")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("layout", "bias"),
    [
        (regions(Grid(8, 8), 2, 1, 1), None),
        (regions(Grid(8, 8), 4, 1, 1, keep=3), None),
        (Blocks.windows(Grid(4, 4), 2), None),
        (regions(Grid(4, 4), 2, 1, 1, keep=3), torch.zeros(1, 1, 1, 1)),
    ],
)
def test_others_have_tiles_of_their_own(layout, bias, monkeypatch):
    monkeypatch.setattr(backend, "computed_packed", forbidden)
    given = random_qkv((layout.num_queries, layout.num_keys), head_dim=16, dtype=torch.float32)
    found, right = (attend(*given, layout, bias=bias, backend=one) for one in ("triton", "reference"))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_as_in_tiles_of_their_own(monkeypatch):
    given = list(random_qkv((SMALL.num_queries, SMALL.num_keys), heads=2, head_dim=16, dtype=torch.float32))
    packed = answers(SMALL, given, None, "triton")
    monkeypatch.setattr(backend, "shares_tiles", lambda call: False)
    for one, other in zip(packed, answers(SMALL, given, None, "triton"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_tiles_take_tokens_of_a_region_together():
    """Four regions of 4 fill a tile of 16, and see the same 4 regions; a row of the image has tokens of eight."""
    index = torch.tensor([0, 1]) + torch.zeros(16, 1, dtype=torch.int64)
    index = torch.cat([index, torch.arange(16)[:, None] // 4 * 2 + 2, torch.arange(16)[:, None] // 4 * 2 + 3], 1)
    layout = Blocks.from_regions(Grid(4, 16), (2, 8), index[None, None])
    counted = []

    def op(q, k, v, *rest):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(configs, "configuration", lambda *_: Config(16, 16, 1, 1))
            found = forward_of(q, k, v, SetTables(*rest))
        for step in found.steps:
            step.run()
        counted.append(found.steps[0].arguments["counts"].flatten().tolist())
        return found.out, found.total, found.peak

    call = AttendCall(*random_qkv((64, 64), heads=2, head_dim=16, dtype=torch.float32), layout, 1.0)
    computed_packed(call, SimpleNamespace(op=op))
    assert counted == [[16] * 4]


# Products with what is masked afterwards, and maxima of it, of which NumPy warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_nobody_sees_matters_to_nobody(poison):
    index = torch.tensor([[[0, 1, 3], [3, -1, 1], [-1, -1, -1], [0, 1, 3]]])
    layout = Blocks.from_regions(Grid(4, 4), 2, index).restrict(torch.arange(16) != 1)
    block_cases.check_poisoned(layout, poison, False, "cpu")


@pytest.mark.usefixtures("small_tiles")
def test_two_backward_passes():
    leaves = [one.requires_grad_() for one in random_qkv((37, 37), head_dim=16, dtype=torch.float32)]
    out = attend(*leaves, SMALL, backend="triton")
    first, second = (torch.autograd.grad(out.square().sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.usefixtures("small_tiles")
def test_compiled_whole():
    """With routes that are chosen inside."""
    leaves = [one.requires_grad_() for one in random_qkv((36, 36), heads=2, head_dim=16, dtype=torch.float32)]

    def step(q, k, v):
        means = q.detach().unflatten(2, (9, 4)).mean((1, 3))
        index = (means @ means.mT).topk(4, -1).indices
        return attend(q, k, v, Blocks.from_regions(Grid(6, 6), 3, index, unique=True), backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [(out := one(*leaves), *torch.autograd.grad(out.square().sum(), leaves)) for one in (step, compiled)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("small_tiles")
def test_explained():
    mix = attnkit.HeadMix(32, [attnkit.TopKRegion(2, 3, 4), attnkit.TopKRegion(2, 3, 2)])
    with use_backend("triton"):
        found = attnkit.explain(mix, 6)
    assert [row.how for row in found.rows] == [
        "regions of 4 tokens share tiles, by a mask over all pairs of tokens",
        "",
    ]
    assert f"How\n  # 1\n      triton  {found.rows[0].how}\n\nWhy not" in str(found)
