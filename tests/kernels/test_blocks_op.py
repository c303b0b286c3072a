"""The operators of blocks: what PyTorch asks of an operator, pieces of any size, memory, and edges."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnkit import Grid, attend
from attnkit.kernels import recording
from attnkit.kernels.call import AttendCall
from attnkit.kernels.chunked import blocks, sizes
from attnkit.kernels.dispatch import backend_named
from attnkit.kernels.ops.blocks import BLOCKS
from attnkit.layouts import Blocks, RelativeTable
from attnkit.testing import TensorMemory, peak_memory, random_qkv, random_tensor

HEADS, ITEMS = 3, 2


@pytest.fixture(params=["written", "fused"])
def either(request, monkeypatch):
    """Blocks of few and of many tokens: products written out, and fused attention."""
    if request.param == "fused":
        monkeypatch.setattr(blocks, "SMALL", 0)


def routes(rows, *lead, keep=2, seed=0):
    """Tables in which the first block sees one block less than the others."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(*lead, rows, rows, generator=generator).topk(keep, -1).indices
    index[..., 0, -1] = -1
    return index


def some(*shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def permuted(window, prefix, *lead):
    order = torch.rand(*lead, 35, generator=torch.Generator().manual_seed(2)).argsort(-1)
    return Blocks.permuted(order, window, prefix=prefix)


GRID, FRAMED = Grid(5, 7), Grid(5, 7, prefix=2)
LAYOUTS = {
    "regions": Blocks.from_regions(Grid(4, 6), 2, routes(4, 1, 1)),
    "regions that do not divide": Blocks.from_regions(GRID, (4, 3), routes(12, 1, 1)),
    "a table per item": Blocks.from_regions(GRID, 2, routes(4, ITEMS, 1)),
    "a table per head, with a prefix": Blocks.from_regions(FRAMED, 2, routes(4, 1, HEADS)),
    "a table per item and head, masked": Blocks.from_regions(FRAMED, 3, routes(9, ITEMS, HEADS)).restrict(
        some(ITEMS, 37, seed=1)
    ),
    "windows": Blocks.windows(GRID, (5, 1)),
    "windows that do not divide": Blocks.windows(FRAMED, 3, shift=1),
    "dilated windows": Blocks.windows(GRID, 2, dilated=True),
    "permuted, masked": permuted(8, 0, ITEMS, HEADS).restrict(some(1, HEADS, 35, seed=3)),
    "permuted, with a prefix": permuted(5, 1, 1, HEADS),
}


def problem(layout, *, dtype=torch.float64, value_dim=4, bias=False, seed=0):
    q, k, v = random_qkv(
        (layout.num_queries, layout.num_keys), batch=ITEMS, heads=HEADS, head_dim=4, value_dim=value_dim, dtype=dtype
    )
    pairs = random_tensor(1, HEADS, layout.num_queries, layout.num_keys, seed=seed, dtype=dtype) if bias else None
    return [q, k, v, pairs]


def answers(layout, tensors, backend, *, with_lse):
    """Output, lse and gradients."""
    leaves = [None if one is None else one.clone().requires_grad_() for one in tensors]
    q, k, v, bias = leaves
    out, lse = attend(q, k, v, layout, bias=bias, scale=0.4, return_lse=True, backend=backend)
    weights = random_tensor(*out.shape, seed=5, dtype=torch.float64)
    loss = (out.double() * weights).sum()
    if with_lse:
        loss = loss + (lse.double().masked_fill(lse == -torch.inf, 0.0) * weights[..., 0]).sum()
    loss.backward()
    return [out.detach(), lse.detach(), *(one.grad for one in leaves if one is not None)]


@pytest.fixture(params=[1, 2**12, 2**20], ids=["one block at a time", "a few", "all"])
def cache(request, monkeypatch):
    monkeypatch.setattr(sizes, "CACHE", request.param)


@pytest.mark.usefixtures("cache", "either")
@pytest.mark.parametrize("name", LAYOUTS)
def test_as_the_reference(name):
    layout = LAYOUTS[name]
    for value_dim, bias, with_lse in ((4, False, False), (6, False, True), (3, True, False), (4, True, True)):
        tensors = problem(layout, value_dim=value_dim, bias=bias)
        found, right = (answers(layout, tensors, one, with_lse=with_lse) for one in ("chunked", "reference"))
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["a table per item and head, masked", "permuted, masked"])
def test_half_precision_is_computed_in_single(name, dtype):
    layout = LAYOUTS[name]
    tensors = problem(layout, dtype=dtype)
    found = answers(layout, tensors, "chunked", with_lse=True)
    exact = answers(layout, [None if one is None else one.double() for one in tensors], "reference", with_lse=True)
    assert [one.dtype for one in found] == [dtype, torch.float32, dtype, dtype, dtype]
    for one, other in zip(found, exact, strict=True):
        # Rounded once, at the end; a gradient's parts twice.
        eps = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one.double(), other, rtol=4 * eps, atol=16 * eps)


def test_views_of_one_projection():
    """The memory order in which a mix has its heads, and the order in which it wants the output."""
    layout = LAYOUTS["a table per head, with a prefix"]
    columns = random_tensor(ITEMS, 37, 3 * HEADS * 4, seed=4, dtype=torch.float64).requires_grad_()
    grads = []
    for backend in ("chunked", "reference"):
        q, k, v = (one.unflatten(-1, (HEADS, 4)).transpose(1, 2) for one in columns.split(HEADS * 4, -1))
        out = attend(q, k, v, layout, backend=backend)
        (grad,) = torch.autograd.grad(out.square().sum(), columns)
        grads.append(grad)
    torch.testing.assert_close(*grads)
    q, k, v = (one.unflatten(-1, (HEADS, 4)).transpose(1, 2) for one in columns[:, :24].split(HEADS * 4, -1))
    assert attend(q, k, v, LAYOUTS["regions"], backend="chunked").transpose(1, 2).is_contiguous()


def test_a_relative_table_gets_its_gradient():
    layout = Blocks.windows(FRAMED, 3)
    tensors, grads = problem(layout), []
    for backend in ("chunked", "reference"):
        table = random_tensor(HEADS, 9, 13, seed=6, dtype=torch.float64).requires_grad_()
        out = attend(*tensors[:3], layout, bias=RelativeTable(table, FRAMED), backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), table)[0])
    torch.testing.assert_close(*grads)


BIASED = {
    "windows": Blocks.windows(GRID, (5, 1)),
    "windows that do not divide": Blocks.windows(FRAMED, (2, 3)),
    "shifted windows": Blocks.windows(GRID, 3, shift=1),
    "dilated windows": Blocks.windows(FRAMED, 2, dilated=True),
    "one window": Blocks.windows(GRID, 7, shift=3),
}


def biases(monkeypatch):
    """The biases that the operator is called with from now on."""
    found, op = [], BLOCKS.op
    monkeypatch.setattr(BLOCKS, "op", lambda *given: found.append(given[9]) or op(*given))
    return found


@pytest.mark.parametrize("name", BIASED)
def test_a_relative_table_is_looked_up_once_for_all_windows(name, monkeypatch):
    layout, given = BIASED[name], biases(monkeypatch)
    grid = FRAMED if layout.prefix else GRID
    tensors, found = problem(layout), []
    for backend in ("chunked", "reference"):
        # Smaller than some windows, so that some offsets lie outside.
        table = random_tensor(HEADS, 5, 7, seed=6, dtype=torch.float64).requires_grad_()
        out = attend(*tensors[:3], layout, bias=RelativeTable(table, grid, fill=0.3), backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), table)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    slots = layout.order.token.shape[3]
    assert {one.shape for one in given} == {(1, HEADS, 1, slots, layout.prefix + slots)}


def test_a_relative_table_of_another_grid():
    """As many tokens, but other offsets between them."""
    layout, grid = Blocks.windows(Grid(4, 6), 2), Grid(6, 4)
    table = random_tensor(HEADS, 5, 5, seed=6, dtype=torch.float64)
    found = [
        attend(*problem(layout)[:3], layout, bias=RelativeTable(table, grid), backend=one)
        for one in ("chunked", "reference")
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_rows_of_prefix_queries_are_written_into_the_output(monkeypatch):
    """Nothing joins them to it afterwards, which would copy all of it."""
    layout, outputs, op = LAYOUTS["windows that do not divide"], [], BLOCKS.op
    monkeypatch.setattr(BLOCKS, "op", lambda *given: outputs.append(op(*given)) or outputs[-1])
    out = attend(*problem(layout)[:3], layout, backend="chunked")
    assert {one[0].data_ptr() for one in outputs} == {out.data_ptr()}
    assert out.shape[2] == layout.num_queries and out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("sizes", [(1, 37), (37, 1), (1, 1)])
@pytest.mark.parametrize("name", ["a table per item and head, masked", "windows that do not divide"])
def test_a_bias_of_queries_or_keys_alone(name, sizes, monkeypatch):
    layout, looked_up = LAYOUTS[name], biases(monkeypatch)
    grads = []
    for backend in ("chunked", "reference"):
        bias = random_tensor(ITEMS, 1, *sizes, seed=7, dtype=torch.float64).requires_grad_()
        out = attend(*problem(layout)[:3], layout, bias=bias, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), bias)[0])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    strides = looked_up[0].stride()
    assert (strides[3] == 0) == (sizes[0] == 1) and (strides[4] == 0) == (sizes[1] == 1)


def arguments_of(layout, bias=None, dtype=torch.float32):
    q, k, v = random_qkv(
        (layout.num_queries, layout.num_keys), batch=ITEMS, heads=HEADS, head_dim=4, value_dim=6, dtype=dtype
    )
    order, keys = layout.order, layout.keys_cut
    tables = (order.token, order.slot, keys.token, keys.slot, layout.index, layout.key_mask, bias)
    first = random_tensor(ITEMS, HEADS, layout.prefix, 6, seed=8, dtype=dtype) if layout.prefix else None
    return (q, k, v, *tables, layout.prefix, [order.padded, keys.padded], 0.4, first)


def with_gradients(arguments):
    return tuple(
        one.clone().requires_grad_() if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for one in arguments
    )


# opcheck itself reads the gradient of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", ["regions", "a table per item and head, masked", "permuted, with a prefix"])
def test_pytorch_finds_nothing_wrong(name):
    layout = LAYOUTS[name]
    bias = random_tensor(1, HEADS, *layout.order.token.shape[2:], layout.key_slots, seed=7, dtype=torch.float32)
    for arguments in (arguments_of(layout), arguments_of(layout, bias)):
        torch.library.opcheck(BLOCKS.op, with_gradients(arguments))
        out, total, peak = BLOCKS.op(*arguments)
        needs = [True, False, True, arguments[9] is not None, arguments[13] is not None]
        torch.library.opcheck(BLOCKS.backward_op, (out, None, None, out, total, peak, *arguments, needs))
    torch.library.opcheck(
        BLOCKS.backward_op, (None, total, None, out, total, peak, *arguments, [False, True, False, False, False])
    )


class Layer(torch.nn.Module):
    """The operator on its own."""

    def __init__(self, layout):
        super().__init__()
        self.rest = (*arguments_of(layout)[3:-1], None)

    def forward(self, q, k, v):
        return BLOCKS.op(q, k, v, *self.rest)


def test_compiled_and_exported():
    layout = LAYOUTS["a table per head, with a prefix"]
    leaves = [one.requires_grad_() for one in problem(layout, dtype=torch.float32)[:3]]

    def run(q, k, v):
        return attend(q, k, v, layout, backend="chunked").square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for one, other in zip(*[torch.autograd.grad(f(*leaves), leaves) for f in (run, compiled)], strict=True):
        torch.testing.assert_close(one, other)
    layer, inputs = Layer(layout), [one.detach() for one in leaves]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, tuple(inputs), dynamic_shapes={name: {0: batch} for name in "qkv"})
    more = [torch.cat([one, one]) for one in inputs]
    assert torch.equal(program.module()(*more)[0], layer(*more)[0])


def test_what_is_exported_needs_no_attnkit():
    class Attending(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, LAYOUTS["regions"])

    program = torch.export.export(Attending(), tuple(problem(LAYOUTS["regions"], dtype=torch.float32)[:3]))
    assert "attnkit" not in str(program.graph)


@pytest.mark.parametrize("name", LAYOUTS)
def test_counted_operations(name):
    layout = LAYOUTS[name]
    leaves = [one.requires_grad_() for one in problem(layout, value_dim=6)[:3]]
    # Prefix queries are dense attention beside the operator.
    prefix = layout.prefix
    pairs = layout.visible()[..., prefix:].sum() * (ITEMS // layout.lead[0]) * (HEADS // layout.lead[1])
    with FlopCounterMode(display=False) as counter:
        BLOCKS.op(*(one.detach() for one in leaves), *arguments_of(layout)[3:])
    assert counter.get_total_flops() == 2 * pairs * (4 + 6)
    if not prefix:
        assert counter.get_total_flops() == 2 * layout.flops(4, 6, batch=ITEMS, heads=HEADS)
    with FlopCounterMode(display=False) as counter:
        attend(*leaves, layout, backend="chunked").sum().backward()
    assert counter.flop_counts["Global"][torch.ops.attnkit.blocks_backward] == 2 * pairs * (3 * 4 + 2 * 6)


def gathering(q, k, v, index, side):
    """BiFormer's formulation: the keys of all regions a region sees, copied beside each other by `torch.gather`."""
    batch, heads, tokens, width = q.shape
    rows = index.shape[1]
    across = round(rows**0.5)
    cut = (across, side // across, across, side // across)

    def regions(one):
        return one.unflatten(2, cut).transpose(3, 4).reshape(batch, heads, rows, -1, width)

    q, k, v = (regions(one) for one in (q, k, v))
    spots = index[:, None, :, :, None, None].expand(-1, heads, -1, -1, k.shape[3], width)
    near_k, near_v = (
        torch.gather(one[:, :, None].expand(-1, -1, rows, -1, -1, -1), 3, spots).flatten(3, 4) for one in (k, v)
    )
    weights = (q * width**-0.5 @ near_k.transpose(-2, -1)).softmax(-1)
    out = (weights @ near_v).view(batch, heads, *(cut[0], cut[2], cut[1], cut[3]), width)
    return out.transpose(3, 4).reshape(batch, heads, tokens, width)


@pytest.mark.parametrize(("side", "regions", "less"), [(128, 8, 7), (256, 16, 30)])
def test_memory_of_forward_and_backward_beside_gathering(side, regions, less):
    index = torch.rand(1, regions**2, regions**2, generator=torch.Generator().manual_seed(0)).topk(4, -1).indices
    shape = (1, 4, side * side, 32)
    layout = Blocks.from_regions(Grid(side, side), regions, index)
    leaves = [torch.zeros(shape, requires_grad=True) for _ in range(3)]

    def ours():
        attend(*leaves, layout, backend="chunked").backward(torch.zeros(1).expand(shape))
        return [one.grad for one in leaves]

    # What gathering would allocate, without allocating the 8 GB.
    with TensorMemory() as theirs:
        far = [torch.zeros(shape, device="meta", requires_grad=True) for _ in range(3)]
        gathering(*far, index.to("meta"), side).backward(torch.zeros(1, device="meta").expand(shape))
    inputs = 3 * 4 * leaves[0].numel()
    assert peak_memory(ours) * less < theirs.peak - inputs


def test_gathering_is_what_the_test_above_takes_it_for():
    index = routes(4, 1)[:, :, :1].expand(-1, -1, 2).contiguous()
    index[..., 1] = (index[..., 0] + 1) % 4
    q, k, v = random_qkv((64, 64), batch=1, heads=HEADS, head_dim=4)
    expected = attend(q, k, v, Blocks.from_regions(Grid(8, 8), 2, index), backend="reference")
    torch.testing.assert_close(gathering(q, k, v, index, 8), expected)


def test_what_it_refuses():
    q, k, v, bias = problem(LAYOUTS["regions"], bias=True)
    chunked = backend_named("chunked")

    def reasons(**changes):
        return " ".join(chunked.why_not(AttendCall(q, k, v, LAYOUTS["regions"], 1.0).replace(**changes)))

    assert reasons() == ""
    assert "a gain multiplies the weights" in reasons(gain=bias)
    assert "v is torch.float32" in reasons(v=v.float())
    meta = {name: one.to("meta") for name, one in (("q", q), ("k", k), ("v", v))}
    assert "lies on meta" in reasons(**meta)


def test_chosen_where_regions_are_routed():
    layout = Blocks.from_regions(Grid(56, 56), 7, routes(49, 1, 1, keep=4))
    with recording() as choices:
        attend(*random_qkv((3136, 3136), batch=1, heads=2, head_dim=32, dtype=torch.float32), layout)
    assert [choice.backend for choice in choices] == ["chunked"]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(
    ("hidden", "rounded"), [(-1e5, 2e-2), (-1e9, 1e-5), (torch.finfo(torch.float32).min / 2, 1e-5)]
)
def test_rows_whose_keys_are_all_hidden_by_a_large_number(hidden, rounded):
    """A finite bias that hides all keys of a row alike hides none, though its lse has no room for the denominator.

    A logit beside -1e5 is rounded to 1/128, and beside -1e9 all are one.
    """
    tensors = random_qkv((16, 16), batch=1, heads=1, head_dim=4, dtype=torch.float32)
    bias = torch.zeros(1, 1, 16, 16).index_fill_(2, torch.arange(5), hidden)
    grads = []
    for backend in ("chunked", "reference"):
        leaves = [one.clone().requires_grad_() for one in tensors]
        out = attend(*leaves, Blocks.windows(Grid(4, 4), 2), bias=bias, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for found, right in zip(*grads, strict=True):
        torch.testing.assert_close(found, right, rtol=rounded, atol=rounded)
