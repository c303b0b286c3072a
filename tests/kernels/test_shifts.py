"""Stencils by shifted maps: memory that does not grow with the window, second derivatives, and one operator."""

from __future__ import annotations

import pytest
import torch

from attnkit import Grid, LearnedQuery, attend
from attnkit.kernels import recording, shifts
from attnkit.layouts import RelativeTable, Stencil
from attnkit.primitives import BuildContext, HeadInputs
from attnkit.testing import TensorMemory, dense_attention, outputs_and_gradients, random_qkv, random_tensor


def learned_query_memory(kernel, grad):
    """Bytes in a pass of learned queries, in units of N L C numbers: the largest, at one time, kept for backward."""
    grid, heads, width, queries = Grid(32, 32), 4, 8, 2
    group = LearnedQuery(heads, kernel, queries=queries).build(BuildContext(heads * width, width))
    x = random_tensor(1, grid.tokens, heads * width, seed=1, dtype=torch.float32)
    v = random_tensor(1, heads, grid.tokens, width, seed=2, dtype=torch.float32, grad=grad)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.set_grad_enabled(grad),
        recording() as choices,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        TensorMemory() as memory,
    ):
        out = group(HeadInputs(x, None, None, v, grid)).out
        if grad:
            out.sum().backward()
    assert [choice.backend for choice in choices] == ["gather"]
    unit = 4 * grid.tokens * queries * heads * width
    return memory.largest / unit, memory.peak / unit, sum(kept.values()) / unit


def test_memory_of_learned_queries_does_not_grow_with_the_window():
    """O(N L C): a window of 15 x 15 holds 28 N L C logits for values 8 numbers wide, and none of that is ever made."""
    for kernel in (3, 7, 15):
        largest, peak, _ = learned_query_memory(kernel, grad=False)
        assert largest < 3
        assert peak < 16
        largest, peak, kept = learned_query_memory(kernel, grad=True)
        assert largest < 3
        assert peak < 28
        assert kept < 4


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives(stride, masked):
    layout = Stencil(Grid(2, 3, prefix=1), 3, stride=stride)
    if masked:
        layout = layout.restrict(torch.arange(7) % 3 > 0)
    q, k, v = random_qkv((layout.num_queries, 7), heads=2, head_dim=1, grad=True)
    tables = [random_tensor(2, 3, 3, seed=seed, grad=True) for seed in (4, 5)]

    def run(q, k, v, bias, gain):
        values = RelativeTable(bias, layout.grid, stride), RelativeTable(gain, layout.grid, stride, fill=1.0)
        out, lse = attend(q, k, v, layout, scale=0.7, bias=values[0], gain=values[1], return_lse=True, backend="gather")
        return out, lse.masked_fill(~lse.isfinite(), 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v, *tables))
    assert torch.autograd.gradgradcheck(run, (q, k, v, *tables))


@pytest.mark.parametrize("kernel", [5, 9, 31])
def test_many_places_in_several_turns(kernel):
    """One number per key and value: every few places are a turn of their own, and windows may exceed the grid."""
    layout = Stencil(Grid(4, 7, prefix=2), kernel, dilation=(1, 2)).restrict(torch.arange(30) % 5 > 0)
    mask = layout.to_mask()
    q, k, v = random_qkv((30, 30), batch=2, heads=2, head_dim=1, grad=True)
    # Steep logits, so that the largest moves from turn to turn.
    bias = 50.0 * random_tensor(1, 2, 30, 30, seed=3)
    right = outputs_and_gradients(lambda q, k, v: dense_attention(q, k, v, mask, bias=bias), [q, k, v])
    found = outputs_and_gradients(
        lambda q, k, v: attend(q, k, v, layout, bias=bias, return_lse=True, backend="gather"), [q, k, v]
    )
    for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_table_of_another_grid_of_as_many_tokens():
    layout, other = Stencil(Grid(2, 6), 3), Grid(6, 2)
    q, k, v = random_qkv((12, 12), heads=2, grad=True)
    table = random_tensor(2, 3, 3, seed=3, grad=True)

    def answers(compute):
        return outputs_and_gradients(lambda q, k, v, table: compute(RelativeTable(table, other)), [q, k, v, table])

    found = answers(lambda bias: attend(q, k, v, layout, bias=bias, backend="gather"))
    right = answers(lambda bias: dense_attention(q, k, v, layout.to_mask(), bias=bias.dense(12))[0])
    for one, expected in zip(found[0] + found[1], right[0] + right[1], strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


# torch 2.15 looks at the gradients of its own copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_is_registered_rightly(dtype):
    q, k, v = random_qkv((6, 21), batch=2, heads=3, head_dim=3, value_dim=5, dtype=dtype, grad=True)
    bias, gain = (
        random_tensor(*shape, seed=seed, dtype=torch.float32, grad=True)
        for seed, shape in enumerate([(1, 3, 10, 1, 1), (2, 1, 10, 2, 3)])
    )
    seen = torch.arange(42).view(2, 1, 21) % 4 > 0
    window = ((4, 5), 1, (3, 3), (2, 2), (1, 1), 0.5, torch.float32)
    for extra in ((bias, gain, seen), (None, None, None)):
        torch.library.opcheck(shifts._operator, (q, k, v, *extra, *window))


class Windowed(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel
        self.table = torch.nn.Parameter(random_tensor(2, kernel, kernel, seed=9, dtype=torch.float32))

    def forward(self, q, k, v):
        grid = Grid(3, 4, prefix=1)
        return attend(q, k, v, Stencil(grid, self.kernel), bias=RelativeTable(self.table, grid), backend="gather")


def operators_of(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_a_compiler_sees_one_operator_forward_and_one_backward():
    """The graph of a large window is no larger than that of a small one."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(module, inputs):
        graphs.append(operators_of(module.graph))
        return make_boxed_func(module.forward)

    for kernel in (3, 5):
        layer = Windowed(kernel)
        qkv = random_qkv((13, 13), batch=2, heads=2, dtype=torch.float32, grad=True)
        right = outputs_and_gradients(layer, [*qkv])
        compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
        found = outputs_and_gradients(compiled, [*qkv])
        for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
            torch.testing.assert_close(one, other)
    assert [names.count("attnkit.shifted_attention.default") for names in graphs] == [1, 0, 1, 0]
    assert [names.count("attnkit.shifted_attention_backward.default") for names in graphs] == [0, 1, 0, 1]
    assert graphs[:2] == graphs[2:]


def test_an_exported_graph_needs_nothing_but_torch():
    layer = Windowed(5)
    qkv = random_qkv((13, 13), batch=2, heads=2, dtype=torch.float32)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(layer, qkv, dynamic_shapes={name: {0: batch} for name in "qkv"})
    assert not any("attnkit" in name for name in operators_of(exported.graph))
    more = random_qkv((13, 13), batch=3, heads=2, dtype=torch.float32)
    torch.testing.assert_close(exported.module()(*more), layer(*more))
