"""Primitives plan on the device: nothing waits for a GPU, nothing is copied to it or from it.

Tensors that pretend to lie on a GPU show that without one: whoever looks at a value of theirs raises.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnkit
from attnkit import Grid, HeadMix
from attnkit.kernels.call import AttendCall
from attnkit.kernels.ops.blocks import BlockTables
from attnkit.kernels.ops.token_sets import SetTables
from attnkit.layouts import Blocks

GROUPS = {
    "regions": {"kind": "topk_region", "regions": 4, "topk": 2},
    "small regions that share tiles": {"kind": "topk_region", "regions": 8, "topk": 16},
    "regions of each head": {"kind": "topk_region", "regions": 4, "topk": 2, "routing": "per_head"},
    "regions that do not divide the map": {"kind": "topk_region", "regions": 3, "topk": 2},
    "pooled regions": {"kind": "topk_region", "regions": 3, "topk": 2, "pool": "max", "pool_size": 2},
    "soft regions": {"kind": "soft_topk_region", "regions": 4, "topk": 2},
    "padded regions": {"kind": "padded_topk_region", "regions": 3, "topk": 2},
    "windows": {"kind": "window", "window": 4},
    "windows that do not divide the map": {"kind": "window", "window": 7},
    "shifted windows with a bias": {"kind": "window", "window": 4, "partition": "shifted", "relative_bias": True},
    "grid": {"kind": "window", "window": 4, "partition": "grid"},
    "random windows": {"kind": "random_window", "window": 49},
    "stripes": {"kind": "cross_shaped", "stripe": 2},
    "neighborhoods": {"kind": "neighborhood", "kernel": 5},
    "dilated neighborhoods": {"kind": "neighborhood", "kernel": 3, "dilation": 2},
    "learned queries": {"kind": "learned_query", "kernel": 3},
    "predicted lists": {"kind": "mask_predictor", "tokens": 256, "keep": 0.1},
    "predicted masks": {"kind": "mask_predictor", "tokens": 256, "keep": 0.5},
    "keys above a score": {"kind": "threshold_mask_predictor", "tokens": 256},
    "keys that compete": {"kind": "competing_mask_predictor", "tokens": 256, "keep": 0.5},
    "keys that compete above a score": {"kind": "competing_mask_predictor", "tokens": 256, "keep": 0.5, "score": 0.1},
}
SIDE, DIM = 16, 32


class Elsewhere(TorchDispatchMode):
    """Collects the operators that meet a tensor of the CPU: a copy waits, and cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.called = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.called += 1
        met = {one.device.type for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)}
        if met - {"cuda"}:
            self.found.append(f"{func} on {sorted(met)}")
        return out


def mix_of(name: str) -> HeadMix:
    return attnkit.build({"kind": "mix", "dim": DIM, "groups": [{**GROUPS[name], "heads": 2}]})


def planned(mix: HeadMix, prefix: int, masked: bool, *, training: bool) -> Elsewhere:
    """Runs a mix on tensors that pretend to lie on a GPU, and tells what else was met."""
    grid = Grid(SIDE, SIDE, prefix=prefix)
    mix.train(training)
    with FakeTensorMode() as pretence, torch.device("cuda"):
        state = {
            name: torch.empty(one.shape, dtype=one.dtype, requires_grad=one.requires_grad)
            for name, one in (*mix.named_parameters(), *mix.named_buffers())
        }
        x = torch.empty(2, grid.tokens, DIM)
        more = {"token_mask": torch.empty(2, grid.tokens, dtype=torch.bool)} if masked else {}
        with Elsewhere() as watched:
            out = functional_call(mix, state, (x, grid), more)
        assert out.shape == x.shape and out.device.type == "cuda"
        assert pretence is not None
    return watched


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("name", GROUPS)
def test_a_layer_neither_looks_at_values_nor_leaves_the_device(name, prefix, masked, training):
    watched = planned(mix_of(name), prefix, masked, training=training)
    assert watched.called > 50
    assert watched.found == []


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("name", GROUPS)
def test_nor_does_its_backward_pass(name, prefix):
    """PyTorch's engine wants a real GPU; the meta device has no values either."""
    grid = Grid(SIDE, SIDE, prefix=prefix)
    mix = mix_of(name).to("meta").train()
    x = torch.empty(2, grid.tokens, DIM, device="meta", requires_grad=True)
    mix(x, grid).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("prefix", [0, 1])
def test_nor_do_the_launches_of_triton_kernels(prefix, heads, bias):
    """The inverse of an index with its pieces, and what kernels are started with, forward and backward."""
    pytest.importorskip("triton", reason="triton is for Linux")
    from attnkit.kernels.triton.blocks.launches import backward_of, forward_of

    with FakeTensorMode(), torch.device("cuda"):
        q, k, v = (torch.empty(2, 2, prefix + 64, 16) for _ in range(3))
        index = torch.empty(2, heads, 16, 3, dtype=torch.int64)
        layout = Blocks.from_regions(Grid(8, 8, prefix=prefix), 4, index, unique=True)
        token, slot = layout.order.token, layout.order.slot
        added = torch.empty(1, 2, 1, 4, layout.key_slots) if bias else None
        tables = BlockTables(token, slot, token, slot, layout.index, None, added, prefix, [False, False], 0.25)
        with Elsewhere() as watched:
            found = forward_of(q, k, v, tables, "sm_90")
            grad = torch.empty_like(found.out)
            needs = [True, True, True, bias]
            back = backward_of(grad, None, found.out, found.total, found.peak, q, k, v, tables, needs, "sm_90")
    assert watched.called > 20
    assert watched.found == []
    assert len(back.launches) == 2 + 1 + bool(prefix) + bias


@pytest.mark.parametrize("prefix", [0, 1])
def test_nor_do_those_of_small_regions_that_share_tiles(prefix):
    """The mask of the routes, the lists of the tiles, and what kernels are started with, forward and backward."""
    pytest.importorskip("triton", reason="triton is for Linux")
    from attnkit.kernels.triton import packing
    from attnkit.kernels.triton.launch import Launch
    from attnkit.kernels.triton.token_sets.launches import backward_of, forward_of

    launched = []

    def op(q, k, v, *rest):
        tables = SetTables(*rest)
        found = forward_of(q, k, v, tables, "sm_90")
        given = (torch.empty_like(found.out), None, found.out, found.total, found.peak, q, k, v, tables)
        for step in (*found.steps, *backward_of(*given, [True, True, True, False], "sm_90").steps):
            launched.append(step)
            if not isinstance(step, Launch):
                step.run()
        return found.out, found.total, found.peak

    pair: Any = SimpleNamespace(op=op)
    with FakeTensorMode(), torch.device("cuda"):
        q, k, v = (torch.empty(2, 2, prefix + 64, 16) for _ in range(3))
        index = torch.empty(2, 1, 16, 4, dtype=torch.int64)
        layout = Blocks.from_regions(Grid(8, 8, prefix=prefix), 4, index, unique=True)
        call = AttendCall(q, k, v, layout, 0.25, return_lse=True)
        assert packing.shares_tiles(call)
        with Elsewhere() as watched:
            found = packing.computed_packed(call, pair)
    assert found.out.shape == q.shape and found.lse is not None
    assert watched.called > 20
    assert watched.found == []
    # Lists and the output, lists and the gradient of queries, an order, lists and the gradients of keys and values.
    assert len(launched) == 7


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("learned", [False, True])
def test_nor_do_those_of_stencils(learned, prefix):
    pytest.importorskip("triton", reason="triton is for Linux")
    from attnkit.kernels.triton.stencil.call import Windows
    from attnkit.kernels.triton.stencil.launches import backward_of, forward_of

    with FakeTensorMode(), torch.device("cuda"):
        q, k, v = (torch.empty(2, 2, prefix + 64, 16) for _ in range(3))
        q = q[:, :, :1] if learned else q[:, :, prefix:]
        table = torch.empty(1, 2, prefix + 9, 1, 1)
        windows = Windows(table, table, None, [8, 8], prefix, [3, 3], [1, 1], [1, 1], False, 0.25)
        with Elsewhere() as watched:
            found = forward_of(q, k, v, windows, "sm_90")
            given = (torch.empty_like(found.out), None, found.out, found.total, found.peak, q, k, v, windows)
            back = backward_of(*given, [True] * 5, "sm_90")
            for fill in back.after:
                fill()
    assert watched.called > 10
    assert watched.found == []
    # The deltas, each gradient's, where keys and values are one and so are bias and gain, and the prefix's.
    assert len(back.launches) == (3 if learned else 4) + bool(prefix)


@pytest.mark.parametrize(
    "looking",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: bool((x > 0).all()),
    ],
)
def test_looking_would_be_seen(looking: Callable[[Tensor], object]):
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(4)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            looking(x)


@pytest.mark.parametrize("moving", [lambda x: x.cpu(), lambda x: x + torch.ones(4, device="cpu").to(x.device)])
def test_moving_would_be_seen(moving: Callable[[Tensor], object]):
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(4)
        with Elsewhere() as watched:
            moving(x)
    assert any("_to_copy" in one for one in watched.found)


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A computation as a CUDA graph, after the runs on another stream that make tables and compile kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.cuda
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("name", GROUPS)
def test_a_layer_is_captured_and_replayed(name, prefix):
    grid = Grid(SIDE, SIDE, prefix=prefix)
    mix = mix_of(name).cuda().eval()
    x, other = (torch.randn(2, grid.tokens, DIM, device="cuda") for _ in range(2))
    with torch.no_grad():
        graph, out = captured(lambda: mix(x, grid))
        for new in (other, other.flip(1)):
            x.copy_(new)
            graph.replay()
            torch.testing.assert_close(out, mix(new, grid))


@pytest.mark.cuda
@pytest.mark.parametrize("name", GROUPS)
def test_a_training_step_is_captured_and_replayed(name):
    grid = Grid(SIDE, SIDE)
    # Random windows draw anew in every pass, also in a replayed one; evaluation's windows can be compared.
    mix = mix_of(name).cuda().eval()
    x, other = (torch.randn(2, grid.tokens, DIM, device="cuda") for _ in range(2))
    x.requires_grad_()

    def step() -> Tensor:
        return torch.autograd.grad(mix(x, grid).square().sum(), x)[0]

    graph, found = captured(step)
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    torch.testing.assert_close(found, step())


@pytest.mark.cuda
def test_replayed_training_draws_new_windows():
    mix = mix_of("random windows").cuda().train()
    x = torch.randn(2, SIDE**2, DIM, device="cuda")
    with torch.no_grad():
        graph, out = captured(lambda: mix(x, Grid(SIDE, SIDE)))
        graph.replay()
        first = out.clone()
        graph.replay()
    assert not torch.equal(out, first)


@pytest.mark.cuda
@pytest.mark.parametrize("name", GROUPS)
def test_a_layer_compiles_whole(name):
    grid = Grid(SIDE, SIDE)
    mix = mix_of(name).cuda().eval()
    x = torch.randn(2, grid.tokens, DIM, device="cuda", requires_grad=True)
    out = torch.compile(mix, fullgraph=True)(x, grid)
    torch.testing.assert_close(out, mix(x, grid), atol=1e-4, rtol=1e-4)
    out.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
