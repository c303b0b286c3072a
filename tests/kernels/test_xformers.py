"""The xformers backend: the runs and masks it makes, its result beside a stand-in of xformers, and why it refuses.

xformers computes on NVIDIA GPUs only. The stand-in computes what xformers documents for `memory_efficient_attention`
and `BlockDiagonalMask.from_seqlens`; tests marked `cuda` run xformers itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attnkit import Grid, attend
from attnkit.errors import BackendError
from attnkit.kernels import xformers
from attnkit.kernels.call import AttendCall
from attnkit.kernels.dispatch import backend_named
from attnkit.layouts import Blocks, Dense, Layout, Stencil, cache
from attnkit.testing import assert_within_budget, dense_attention, naive_attention, random_qkv

GRID = Grid(4, 6, prefix=1)
PERMUTATION = torch.randperm(24, generator=torch.Generator().manual_seed(3))
LAYOUTS = {
    "dense": Dense(25),
    "windows": Blocks.windows(GRID, 2),
    "windows that do not divide the map": Blocks.windows(GRID, (3, 4)),
    "shifted windows": Blocks.windows(GRID, 2, shift=1),
    "grid": Blocks.windows(Grid(4, 6), 2, dilated=True),
    "random windows": Blocks.permuted(PERMUTATION, 8, prefix=1),
    "random windows, the last one smaller": Blocks.permuted(PERMUTATION, 7, prefix=2),
    "random windows of each head": Blocks.permuted(torch.stack([PERMUTATION, PERMUTATION.flip(0)])[None], 6),
    "random windows of each item": Blocks.permuted(torch.stack([PERMUTATION, PERMUTATION.flip(0)])[:, None], 6),
    "windows of which some are empty": Blocks(
        Blocks.from_regions(Grid(3, 5), 4, torch.zeros(1, 16, 1, dtype=torch.int64)).order
    ),
}


@dataclass
class Mask:
    """Query i sees key j where both lie in runs of one number."""

    queries: list[int]
    keys: list[int]

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int], *, device: torch.device) -> Mask:
        assert isinstance(q_seqlen, list) and isinstance(kv_seqlen, list) and len(q_seqlen) == len(kv_seqlen)
        assert min(q_seqlen) > 0 and min(kv_seqlen) > 0
        return cls(q_seqlen, kv_seqlen)

    def bools(self) -> Tensor:
        query, key = (
            torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs)) for runs in (self.queries, self.keys)
        )
        return query[:, None] == key


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Mask | None = None, p: float = 0.0, scale: float | None = None
) -> Tensor:
    """Attention over tensors [B, M, H, K]."""
    q, k, v = (one.transpose(1, 2) for one in (query, key, value))
    mask = None
    if attn_bias is not None:
        assert len(query) == 1, "runs lie behind each other in one row"
        mask = attn_bias.bools()
        assert mask.shape == (query.shape[1], key.shape[1])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts the stand-in where the backend looks for xformers, and lets it take tensors of the CPU."""
    found = {name: types.ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha.attn_bias")}
    found["xformers.ops"].memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    found["xformers.ops.fmha.attn_bias"].BlockDiagonalMask = Mask  # type: ignore[attr-defined]
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(xformers.XFormersBackend, "why_not", lambda self, call: ())
    xformers._mask.cache_clear()
    cache.forget()
    yield
    xformers._mask.cache_clear()


def sizes(layout: Layout) -> dict:
    return {"batch": 2, "heads": 2, "head_dim": 8, "value_dim": 16}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_and_gradients_are_those_of_the_mask(name):
    layout = LAYOUTS[name]
    q, k, v = random_qkv((layout.num_queries, layout.num_keys), **sizes(layout))
    mask, leaves = layout.to_mask(), [one.requires_grad_() for one in (q, k, v)]
    out = attend(q, k, v, layout, scale=0.3, backend="xformers")
    exact = dense_attention(q, k, v, mask, 0.3)[0]
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, exact)
    for found, wanted in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(exact, leaves, grad), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("stand_in")
def test_runs_of_sizes_only_are_made_once():
    layout = Blocks.windows(GRID, (3, 4))
    first, second = xformers.runs_of(layout), xformers.runs_of(Blocks.windows(GRID, (3, 4)))
    assert first.queries is second.queries and first.lengths is second.lengths
    assert first.lengths.tolist() == [12, 6, 4, 2]
    drawn = Blocks.permuted(PERMUTATION, 7)
    assert xformers.runs_of(drawn).lengths.tolist() == [7, 7, 7, 3]
    assert xformers.runs_of(drawn).queries is not xformers.runs_of(drawn).queries


def test_runs_hold_every_token_once_and_the_prefix_before_each_window():
    runs = xformers.runs_of(LAYOUTS["random windows, the last one smaller"])
    assert runs.queries.flatten().tolist() == (PERMUTATION + 2).tolist()
    assert runs.queries[0, 0, runs.place[0, 0]].tolist() == list(range(2, 26))
    keys = runs.keys.flatten().split([9, 9, 9, 5])
    assert all(one[:2].tolist() == [0, 1] for one in keys)
    assert torch.cat([one[2:] for one in keys]).tolist() == runs.queries.flatten().tolist()


def reasons(layout=None, *, device="cpu", dtype=torch.float16, width=32, value_width=None, count=25, **extra):
    q, k = (torch.ones(1, 2, count, width, dtype=dtype, device=device) for _ in range(2))
    v = torch.ones(1, 2, count, value_width or width, dtype=extra.pop("value_dtype", dtype), device=device)
    call = AttendCall(q, k, v, Dense(count) if layout is None else layout, 1.0, **extra)
    return backend_named("xformers").why_not(call)


ROUTED = Blocks.from_regions(GRID, 2, torch.zeros(1, 4, 1, dtype=torch.int64))
UNEVEN = Blocks.permuted(torch.stack([PERMUTATION, PERMUTATION.flip(0)])[None], 7, prefix=1)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (reasons, "xformers has attention for cuda only, and q lies on cpu; move q, k and v to a GPU"),
        (lambda: reasons(Stencil(Grid(5, 5), 3)), "a stencil layout is no block-diagonal mask"),
        (lambda: reasons(ROUTED), "routed blocks see several runs of keys"),
        (lambda: reasons(UNEVEN), "windows with empty slots that differ between items or heads"),
        (
            lambda: reasons(Dense(25).restrict(torch.ones(25, dtype=torch.bool))),
            "a key mask leaves out keys one by one",
        ),
        (lambda: reasons(dtype=torch.float64), "float32, float16 and bfloat16, not torch.float64"),
        (lambda: reasons(value_dtype=torch.float32), "q and k are torch.float16 but v is torch.float32"),
        (lambda: reasons(width=12), "head widths that are multiples of 8, not 12"),
        (lambda: reasons(value_width=20), "head widths that are multiples of 8, not 20"),
        (lambda: reasons(bias=torch.zeros(1, 1, 25, 25)), "leaves no room for a bias"),
        (lambda: reasons(gain=torch.ones(1, 1, 1, 1)), "a gain multiplies the weights after the softmax"),
        (lambda: reasons(return_lse=True), "return_lse=True"),
        (lambda: reasons(count=0), "does not take empty tensors"),
    ],
)
def test_it_says_why_not(call, reason):
    found = call()
    assert any(reason in text for text in found), found


def test_what_never_changes_is_told_alone():
    (reason,) = reasons(Stencil(Grid(5, 5), 3), dtype=torch.float64)
    assert "a stencil layout is no block-diagonal mask" in reason


def test_what_it_can_run_has_only_the_device_against_it(monkeypatch):
    monkeypatch.setattr(xformers, "_installed", lambda: True)
    for layout in (*LAYOUTS.values(),):
        count = layout.num_queries
        (reason,) = reasons(layout, count=count)
        assert reason.startswith("xformers has attention for cuda only, and q lies on cpu")


def test_where_it_is_not_installed_the_command_is_told(monkeypatch):
    monkeypatch.setattr(xformers, "_installed", lambda: False)
    q, k, v = random_qkv((4, 4), head_dim=8, dtype=torch.float32)
    with pytest.raises(BackendError, match=r"pip install 'attnkit\[xformers\]'"):
        attend(q, k, v, Dense(4), backend="xformers")


def test_graphs_are_not_broken(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert any("torch.compile cannot trace" in one for one in reasons())


@pytest.mark.cuda
@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_xformers_itself(name, dtype):
    layout = LAYOUTS[name]
    moved = layout if isinstance(layout, Dense) else Blocks(layout.order, prefix=layout.prefix)
    q, k, v = random_qkv((layout.num_queries, layout.num_keys), **sizes(layout), dtype=dtype)
    mask = layout.to_mask()
    exact, plain = dense_attention(q, k, v, mask)[0], naive_attention(q, k, v, mask)
    on = [one.cuda().requires_grad_() for one in (q, k, v)]
    if isinstance(moved, Blocks):
        order = type(moved.order)(moved.order.token.cuda(), moved.order.slot.cuda(), moved.order.padded)
        moved = Blocks(order, prefix=moved.prefix)
    out = attend(*on, moved, backend="xformers")
    assert_within_budget(out.cpu(), exact, plain, what="xformers")
    out.sum().backward()
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in on)


@pytest.mark.cuda
@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
def test_masks_are_those_of_xformers():
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    mask = bias.BlockDiagonalMask.from_seqlens([2, 3], [3, 4], device=torch.device("cpu"))
    same = Mask.from_seqlens([2, 3], [3, 4], device=torch.device("cpu")).bools()
    assert torch.equal(mask.materialize((5, 7)) == 0, same)
