"""The operators of stencils: their two kernels, memory that does not grow with the window, compilers and export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attnkit import Grid, HeadMix, LearnedQuery, attend
from attnkit.errors import BackendError
from attnkit.kernels import stencil_calls, use_backend
from attnkit.kernels.call import AttendCall
from attnkit.kernels.chunked import stencil_convolved
from attnkit.kernels.ops.stencil import STENCIL
from attnkit.layouts import Blocks, RelativeTable, Stencil
from attnkit.testing import dense_attention, outputs_and_gradients, peak_memory, random_qkv, random_tensor


class WindowsUnfolded(torch.nn.Module):
    """Attention over windows as it is commonly written: every token's window of keys and of values is copied out."""

    def __init__(self, dim, heads, kernel):
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.qkv, self.proj = torch.nn.Conv2d(dim, 3 * dim, 1), torch.nn.Conv2d(dim, dim, 1)
        self.bias = torch.nn.Parameter(torch.zeros(heads, kernel**2, 1))

    def forward(self, x):
        q, *near = self.qkv(x.movedim(3, 1)).chunk(3, dim=1)
        k, v = (F.unfold(one, self.kernel, padding=self.kernel // 2) for one in near)
        k, v = (one.unflatten(1, (self.heads, -1, self.kernel**2)) for one in (k, v))
        q = q.flatten(2).unflatten(1, (self.heads, -1))
        weights = torch.einsum("bhdn,bhdkn->bhkn", q, k) * k.shape[2] ** -0.5 + self.bias
        out = torch.einsum("bhkn,bhdkn->bhdn", weights.softmax(2), v)
        return self.proj(out.flatten(1, 2).view(q.shape[0], -1, *x.shape[1:3])).movedim(1, 3)


def memory_of(layer, grad):
    """Bytes of a pass over a map of 64 x 64 tokens of 64 channels."""
    x = random_tensor(1, 64, 64, 64, seed=1, dtype=torch.float32, grad=grad)
    with torch.set_grad_enabled(grad):
        if not grad:
            return peak_memory(lambda: layer(x))
        return peak_memory(lambda: torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("heads", [2, 8])
def test_memory_of_learned_queries_does_not_grow_with_the_window(heads):
    found = {kernel: HeadMix(64, [LearnedQuery(heads, kernel)]) for kernel in (3, 7, 15)}
    for grad in (False, True):
        sizes = [memory_of(layer, grad) for layer in found.values()]
        assert max(sizes) < 1.25 * sizes[0]


def test_memory_of_learned_queries_beside_windows_that_are_copied_out():
    layer, unfolded = HeadMix(64, [LearnedQuery(8, 7)]), WindowsUnfolded(64, 8, 7)
    assert memory_of(unfolded, grad=False) > 10 * memory_of(layer, grad=False)
    assert memory_of(unfolded, grad=True) > 7 * memory_of(layer, grad=True)


@pytest.fixture
def convolved(monkeypatch):
    """A list that grows by one entry for every pass, forward or backward, that is computed by convolutions."""
    passes = []
    for name in ("forward", "backward"):
        original = getattr(stencil_convolved, name)

        def counted(*given, original=original):
            passes.append(original.__name__)
            return original(*given)

        monkeypatch.setattr(stencil_convolved, name, counted)
    return passes


CASES = [
    (Grid(6, 7), {}),
    (Grid(6, 7, prefix=2), {"stride": 2}),
    (Grid(5, 1), {"stride": 3, "dilation": 2}),
    (Grid(9, prefix=1), {"dilation": 2}),
    (Grid(4, 8), {"stride": (1, 3), "dilation": (2, 1)}),
]


@pytest.mark.parametrize(("piece", "large"), [(2**20, 100), (600, 100), (2**20, 1)])
@pytest.mark.parametrize("tables", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("grid", "options"), CASES)
def test_queries_that_are_all_the_same(grid, options, kernel, masked, tables, piece, large, convolved, monkeypatch):
    for name, value in {"PIECE": piece, "LARGE": large, "CHANNELS": 3}.items():
        monkeypatch.setattr(stencil_convolved, name, value)
    layout = Stencil(grid, kernel, **options)
    if masked:
        layout = layout.restrict(torch.stack([torch.arange(grid.tokens) % step > 0 for step in (2, 3)]))
    q, k, v = random_qkv((1, grid.tokens), batch=2, heads=3, head_dim=2, value_dim=4, grad=True)
    q = q.detach()
    given = [k, v, *(random_tensor(3, *(3,) * grid.ndim, seed=seed, grad=True) for seed in range(4, 4 + tables))]

    def answers(compute):
        def run(k, v, *tables):
            pairs = zip(("bias", "gain"), tables, (0.0, 1.0), strict=False)
            extra = {name: RelativeTable(table, grid, layout.strides, fill) for name, table, fill in pairs}
            return compute(q.expand(-1, -1, layout.num_queries, -1), k, v, extra)

        return outputs_and_gradients(run, given)

    def dense(q, k, v, extra):
        extra = {name: table.dense(layout.num_queries) for name, table in extra.items()}
        return dense_attention(q, k, v, layout.to_mask(), 0.7, **extra)

    found = answers(
        lambda q, k, v, extra: attend(q, k, v, layout, scale=0.7, return_lse=True, backend="chunked", **extra)
    )
    assert convolved == ["forward", "backward"]
    right = answers(dense)
    for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_repeated_queries_that_have_gradients_get_one_each(convolved):
    """By the repeated tensor too, and not only by the one row that it repeats."""
    layout = Stencil(Grid(3, 4, prefix=1), 3)
    one, k, v = random_qkv((1, 13), batch=2, heads=2, head_dim=1, grad=True)
    weights = random_tensor(2, 2, 13, v.shape[3], seed=3)

    def gradients(backend):
        q = one.expand(-1, -1, 13, -1)
        return torch.autograd.grad((attend(q, k, v, layout, backend=backend) * weights).sum(), (q, one))

    for found, right in zip(gradients("chunked"), gradients("reference"), strict=True):
        torch.testing.assert_close(found, right)
    assert not convolved
    # A transform's tensors do not tell that they have gradients.
    several = one.expand(3, 1, -1, -1, 13, -1)[:, 0]

    def gradient_under_vmap(backend):
        out = torch.vmap(lambda q: attend(q, k, v, layout, backend=backend) * weights)(several)
        return torch.autograd.grad(out.sum(), several)[0]

    torch.testing.assert_close(gradient_under_vmap("chunked"), gradient_under_vmap("reference"))
    assert not convolved
    with torch.no_grad():
        attend(one.expand(-1, -1, 13, -1), k, v, layout, backend="chunked")
    assert convolved == ["forward"]


@pytest.mark.parametrize("prefix", [0, 1])
def test_derivatives_by_the_one_row_of_all_queries(prefix, convolved):
    """The operator's own, of an argument that `attend` passes without a gradient only."""
    q, k, v = random_qkv((1, 6 + prefix), heads=2, head_dim=2, grad=True)
    window = ([2, 3], prefix, [3, 3], [1, 2], [1, 1], False, 0.7)

    def run(q, k, v):
        out, total, peak = STENCIL.op(q, k, v, None, None, None, *window)
        return out, total.log() + peak

    assert torch.autograd.gradcheck(run, (q, k, v))
    assert "backward" in convolved


def scores(size, dtype):
    """Keys one number wide whose scores reach ±size, of 8 x 8 tokens, and values."""
    k, v = random_tensor(1, 2, 64, 1, seed=1), random_tensor(1, 2, 64, 4, seed=2, dtype=dtype)
    return (k * (size / k.abs().max())).to(torch.float32).requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize(("size", "passes"), [(29.0, 2), (1000.0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_lie_too_far_apart_are_not_convolved(size, passes, dtype, convolved):
    layout = Stencil(Grid(8, 8), 3)
    k, v = scores(size, dtype)
    ones = torch.ones(1, 1, 1, 1).expand(1, 2, 64, 1)
    found = outputs_and_gradients(lambda k, v: attend(ones, k, v, layout, scale=1.0, backend="chunked"), [k, v])
    assert len(convolved) == passes
    wide = [one.detach().double().requires_grad_() for one in (k, v)]
    right = outputs_and_gradients(lambda k, v: dense_attention(ones.double(), k, v, layout.to_mask(), 1.0)[0], wide)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_what_is_no_convolution_is_still_right(convolved):
    """One query for all with biases of their own for each, on a grid of three axes, and where a score is NaN."""
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64).expand(1, 2, 24, 1)
    k, v = random_tensor(1, 2, 24, 1, seed=1), random_tensor(1, 2, 24, 3, seed=2)
    bias = random_tensor(1, 2, 24, 24, seed=3)
    for grid, extra in ((Grid(4, 6), bias), (Grid(2, 3, 4), None)):
        mask = Stencil(grid, 3).to_mask()
        found = attend(ones, k, v, Stencil(grid, 3), scale=1.0, bias=extra, backend="chunked")
        torch.testing.assert_close(found, dense_attention(ones, k, v, mask, 1.0, extra)[0])
    k[0, 0, 0] = torch.nan
    found = attend(ones, k, v, Stencil(Grid(4, 6), 3), scale=1.0, backend="chunked")
    assert found[0, 0].isnan().any(-1).sum() == 4
    assert not convolved


@pytest.mark.parametrize("gain", [False, True])
def test_a_bias_that_hides_all_keys_of_a_window(gain, convolved):
    """Of two tokens in a row, the first has no left neighbour, and its own place and the right one are at -inf."""
    grid = Grid(1, 2)
    layout = Stencil(grid, (1, 3))
    k, v = random_tensor(1, 1, 2, 1, seed=1, grad=True), random_tensor(1, 1, 2, 3, seed=2, grad=True)
    table = torch.tensor([[[0.3, -torch.inf, -torch.inf]]], dtype=torch.float64, requires_grad=True)
    factors = random_tensor(1, 1, 3, seed=3, grad=True)

    def answers(backend):
        def run(k, v, table, factors):
            q = torch.ones(1, 1, 1, 1, dtype=torch.float64).expand(-1, -1, 2, -1)
            more = {"gain": RelativeTable(factors, grid, fill=1.0)} if gain else {}
            given = {"bias": RelativeTable(table, grid), "backend": backend, "return_lse": True, **more}
            return attend(q, k, v, layout, **given)

        return outputs_and_gradients(run, [k, v, table, factors])

    found, right = answers("chunked"), answers("reference")
    assert convolved == ["forward", "backward"]
    assert torch.equal(found[0][0][0, 0, 0], torch.zeros(3, dtype=torch.float64))
    for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_derivatives(stride, masked, shared):
    layout = Stencil(Grid(2, 3, prefix=1), 3, stride=stride)
    if masked:
        layout = layout.restrict(torch.arange(7) % 3 > 0)
    queries = layout.num_queries
    q, k, v = random_qkv((1 if shared else queries, 7), heads=2, head_dim=1, grad=True)
    if shared:
        q = q.detach()
    tables = [random_tensor(2, 3, 3, seed=seed, grad=True) for seed in (4, 5)]

    def run(q, k, v, bias, gain):
        values = RelativeTable(bias, layout.grid, stride), RelativeTable(gain, layout.grid, stride, fill=1.0)
        q = q.expand(-1, -1, queries, -1)
        out, lse = attend(
            q, k, v, layout, scale=0.7, bias=values[0], gain=values[1], return_lse=True, backend="chunked"
        )
        return out, lse.masked_fill(~lse.isfinite(), 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v, *tables))


def test_second_derivatives_are_left_to_gather():
    layout = Stencil(Grid(2, 3), 3)
    q, k, v = random_qkv((6, 6), heads=2, head_dim=1, grad=True)
    assert torch.autograd.gradgradcheck(lambda q, k, v: attend(q, k, v, layout, backend="gather"), (q, k, v))
    (grad,) = torch.autograd.grad(attend(q, k, v, layout, backend="chunked").sum(), q, create_graph=True)
    with pytest.raises(BackendError, match="no gradients of gradients"):
        grad.sum().backward()


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
        lambda q, k, v: attend(q, k, v, layout, bias=bias, return_lse=True, backend="chunked"), [q, k, v]
    )
    for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_table_of_another_grid_of_as_many_tokens():
    layout, other = Stencil(Grid(2, 6), 3), Grid(6, 2)
    q, k, v = random_qkv((12, 12), heads=2, grad=True)
    table = random_tensor(2, 3, 3, seed=3, grad=True)

    def answers(compute):
        return outputs_and_gradients(lambda q, k, v, table: compute(RelativeTable(table, other)), [q, k, v, table])

    found = answers(lambda bias: attend(q, k, v, layout, bias=bias, backend="chunked"))
    right = answers(lambda bias: dense_attention(q, k, v, layout.to_mask(), bias=bias.dense(12))[0])
    for one, expected in zip(found[0] + found[1], right[0] + right[1], strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


# torch 2.15 looks at the gradients of its own copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_pytorch_finds_nothing_wrong(dtype, shared):
    q, k, v = random_qkv((6, 21), batch=2, heads=3, head_dim=3, value_dim=5, dtype=dtype, grad=True)
    shapes = [(1, 3, 10, 1, 1), (1, 1, 10, 1, 1)] if shared else [(1, 3, 10, 1, 1), (2, 1, 10, 2, 3)]
    bias, gain = (random_tensor(*shape, seed=seed, dtype=torch.float32, grad=True) for seed, shape in enumerate(shapes))
    q = q[:, :, :1].detach().requires_grad_() if shared else q
    seen = torch.arange(42).view(2, 1, 21) % 4 > 0
    window = ([4, 5], 1, [3, 3], [2, 2], [1, 1], False, 0.5)
    for extra in ((bias, gain, seen), (None, None, None)):
        torch.library.opcheck(STENCIL.op, (q, k, v, *extra, *window))


def test_counted_operations():
    layout = Stencil(Grid(4, 5, prefix=1), 3, stride=2)
    q, k, v = random_qkv((7, 21), batch=2, heads=3, head_dim=3, value_dim=5, grad=True)
    with FlopCounterMode(display=False) as counter:
        stencil_calls._image(AttendCall(q, k, v, layout, 1.0), layout, STENCIL.op).out.sum().backward()
    pairs = 2 * 3 * 6 * 10
    assert counter.get_total_flops() == 2 * pairs * (3 + 5) + 2 * pairs * (3 * 3 + 2 * 5)


class Windowed(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel
        self.table = torch.nn.Parameter(random_tensor(2, kernel, kernel, seed=9, dtype=torch.float32))

    def forward(self, q, k, v):
        grid = Grid(3, 4, prefix=1)
        return attend(q, k, v, Stencil(grid, self.kernel), bias=RelativeTable(self.table, grid))


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

    with use_backend("chunked"):
        for kernel in (3, 5):
            layer = Windowed(kernel)
            qkv = random_qkv((13, 13), batch=2, heads=2, dtype=torch.float32, grad=True)
            right = outputs_and_gradients(layer, [*qkv])
            compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
            found = outputs_and_gradients(compiled, [*qkv])
            for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
                torch.testing.assert_close(one, other)
    assert [names.count("attnkit.stencil.default") for names in graphs] == [1, 0, 1, 0]
    assert [names.count("attnkit.stencil_backward.default") for names in graphs] == [0, 1, 0, 1]
    assert graphs[:2] == graphs[2:]


@pytest.mark.parametrize("backend", ["chunked", "gather"])
def test_an_exported_graph(backend):
    """Nothing but PyTorch's operators, so that who loads it needs no attnkit."""
    layer = Windowed(5)
    qkv = random_qkv((13, 13), batch=2, heads=2, dtype=torch.float32)
    batch = torch.export.Dim("batch", min=2)
    with use_backend(backend):
        exported = torch.export.export(layer, qkv, dynamic_shapes={name: {0: batch} for name in "qkv"})
    assert not [name for name in operators_of(exported.graph) if "attnkit" in name]
    more = random_qkv((13, 13), batch=3, heads=2, dtype=torch.float32)
    torch.testing.assert_close(exported.module()(*more), layer(*more))


def test_compiled_and_exported_learned_queries(convolved):
    layer = HeadMix(16, [LearnedQuery(2, 5, stride=2)])
    x = random_tensor(2, 6, 7, 16, seed=1, dtype=torch.float32, grad=True)
    with use_backend("chunked"):
        right = outputs_and_gradients(layer, [x])
        found = outputs_and_gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"), [x])
        for one, other in zip(found[0] + found[1], right[0] + right[1], strict=True):
            torch.testing.assert_close(one, other)
        exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
        more = random_tensor(3, 6, 7, 16, seed=2, dtype=torch.float32)
        torch.testing.assert_close(exported.module()(more), layer(more))
    # Eager, compiled, and eager beside what was exported.
    assert convolved == ["forward", "backward"] * 2 + ["forward"]


def names_behind(out):
    """Names of all steps of a backward pass."""
    found, left = set(), [out.grad_fn]
    while left:
        one = left.pop()
        if one is not None and one not in found:
            found.add(one)
            left += [before for before, _ in one.next_functions]
    return {one.name() for one in found}


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("name", ["masked", "clamped", "learned", "regions", "regions of each head"])
def test_the_gradient_of_a_number_of_each_key_is_added_up_in_order(name, lead):
    """Many queries read it, and on a GPU `gather` and its like add their gradients up as threads come."""
    grid = Grid(4, 6, prefix=2)
    index = torch.tensor([[[0, 3], [1, 0], [3, 2], [2, 1]]])
    layout = {
        "masked": Stencil(grid, 3, dilation=2),
        "clamped": Stencil(grid, 5, border="clamp"),
        "learned": Stencil(grid, 3, stride=2),
        "regions": Blocks.from_regions(grid, 2, index),
        "regions of each head": Blocks.from_regions(grid, 2, torch.stack([index, index.flip(1), index.flip(2)], 1)),
    }[name]
    learned = name == "learned"
    q, k, v = random_qkv((1 if learned else layout.num_queries, 26), batch=2, heads=3)
    q = q.expand(-1, -1, layout.num_queries, -1)
    forms = ("bias",) if isinstance(layout, Blocks) else ("bias", "gain")
    pairs = {form: random_tensor(*lead, 1, 26, seed=at, grad=True) for at, form in enumerate(forms)}
    found, right = (attend(q, k, v, layout, **pairs, backend=backend) for backend in ("chunked", "reference"))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    leaves = list(pairs.values())
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (found, right)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    out = attend(q, k, v, layout, **pairs, backend="chunked")
    assert not {one for one in names_behind(out) if "Gather" in one or "IndexSelect" in one or "Scatter" in one}
