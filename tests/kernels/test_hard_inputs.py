"""Hard inputs: errors within bounds that follow from the rounding of the computation, and nothing overflows."""

from __future__ import annotations

import copy

import pytest
import torch

from attnkit import Grid, LearnedQuery, attend, use_backend
from attnkit.kernels.dispatch import backend_named
from attnkit.layouts import Blocks, Dense, RelativeTable, Stencil, TokenSets
from attnkit.primitives import BuildContext, HeadInputs
from attnkit.testing import HARD_INPUTS, dense_attention, random_qkv, random_tensor, randomize_parameters

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# docs/numerics.md tells of these: PyTorch's fused kernels add values up before they divide, take gradients from an lse
# in which a bias of -3.4e38 has swallowed everything else, and may flush denormal numbers to zero.
FUSED_LOSES = ("large values", "smallest bias", "denormals")


class Exact:
    """A call in float64: output, gradients, and how large the terms are that they are sums of."""

    def __init__(self, call, step):
        mask = call.layout.to_mask()
        seen = mask.any(-2)[..., None]
        self.arriving = (step * random_tensor(*call.q.shape, seed=99)).to(call.v.dtype)
        q, k, v = (one.detach().double() for one in (call.q, call.k.where(seen, 0.0), call.v.where(seen, 0.0)))
        bias = None if call.bias is None else call.bias.detach().double()
        self.leaves = {"q": q, "k": k, "v": v}
        if bias is not None and call.bias.requires_grad:
            self.leaves["bias"] = bias
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        out = dense_attention(q, k, v, mask, call.scale, bias)[0]
        gradients = torch.autograd.grad(out, list(self.leaves.values()), self.arriving.double())
        self.results = {"out": out.detach(), **dict(zip(self.leaves, gradients, strict=True))}
        with torch.no_grad():
            self._sizes(call, mask, q, k, v, bias)

    def _sizes(self, call, mask, q, k, v, bias):
        logits, sizes = call.scale * q @ k.mT, abs(call.scale) * q.abs() @ k.abs().mT
        if bias is not None:
            logits = logits + bias
            # Beside a bias beyond that nothing is left of a logit, in float64 neither.
            sizes = sizes + bias.abs().where(bias.abs() < 1e30, 0.0)
        logits = logits.masked_fill(~mask, -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0.0)
        # How large what is added up to a logit is, where the logit matters.
        self.logit = float(sizes.where(weights > 1e-9, 0.0).max())
        reached = self.arriving.double().abs() @ v.abs().mT
        pull = weights * (reached + (weights * reached).sum(-1, keepdim=True))
        self.terms = {
            "out": weights @ v.abs(),
            "q": call.scale * pull @ k.abs(),
            "k": call.scale * pull.mT @ q.abs(),
            "v": weights.mT @ self.arriving.double().abs(),
            "bias": pull.sum(0, keepdim=True),
        }


def check(call, exact, compute, *, fused, what):
    """Output and gradients are off by no more than roundings can explain, each in proportion to its largest terms.

    A logit is off by a few roundings of the magnitudes that make it, and weights by twice that in proportion; sums are
    off by a rounding of each term, in the dtype that is computed in, and by one or two of the result. Fused kernels
    round weights and bias to the dtype of the inputs.
    """
    own, wide = torch.finfo(call.v.dtype), torch.finfo(call.compute_dtype)
    relative = min(1.0, 8 * wide.eps * exact.logit) + wide.eps * max(call.layout.num_queries, call.layout.num_keys)
    relative += (8 if fused else 2) * own.eps
    if fused and call.bias is not None and call.bias.dtype != call.q.dtype:
        relative += own.eps * float(call.bias.detach().abs().max())
    out = compute(call)
    gradients = torch.autograd.grad(out, [getattr(call, name) for name in exact.leaves], exact.arriving)
    for name, found in {"out": out, **dict(zip(exact.leaves, gradients, strict=True))}.items():
        off = float((found.detach().double() - exact.results[name]).abs().max())
        # In a dtype's smallest numbers steps are absolute.
        allowed = relative * float(exact.terms[name].max()) + 4 * own.smallest_normal * own.eps
        assert off <= allowed, f"{what}: {name} is off by {off:.3g}, allowed are {allowed:.3g}"


def on(backend, **extra):
    def compute(call):
        found = attend(call.q, call.k, call.v, call.layout, scale=call.scale, bias=call.bias, backend=backend, **extra)
        return found[0] if extra else found

    return compute


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("hard", HARD_INPUTS, ids=lambda hard: hard.name)
def test_errors_are_no_more_than_roundings(hard, dtype):
    for name, layout in hard.layouts().items():
        call = hard.call(layout, dtype)
        exact = Exact(call, hard.step)
        check(call, exact, on("reference"), fused=False, what=f"reference, {name}")
        able = [backend for backend in ("chunked", "gather") if not backend_named(backend).why_not(call)]
        for backend in able:
            # Of PyTorch's fused kernels are chunked's blocks made, and gather's where no lse is asked for.
            if backend != "chunked" or not isinstance(layout, Blocks):
                check(call, exact, on(backend, return_lse=True), fused=False, what=f"{backend} with lse, {name}")
        if hard.name not in FUSED_LOSES:
            check(call, exact, on("sdpa"), fused=True, what=f"sdpa, {name}")
            for backend in able:
                check(call, exact, on(backend), fused=True, what=f"{backend}, {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [-1e5, torch.finfo(torch.float32).min])
def test_a_finite_bias_of_float32_hides_nothing(dtype, largest):
    """In float16 -1e5 would be -inf, and in bfloat16 the smallest float32 would be: rows of it would see nothing."""
    q, k, v = random_qkv((4, 6), dtype=dtype)
    bias = torch.full((1, 1, 4, 6), largest)
    # Really infinite ones still hide.
    bias[:, :, :, 0] = -torch.inf
    for layout in (Dense(4, 6), Dense(4, 6).restrict(torch.arange(6) < 5)):
        exact = dense_attention(torch.zeros_like(q), k, v, layout.to_mask(), bias=bias)[0]
        for backend in ("reference", "sdpa"):
            # Equal logits, since what is left of others beside such a bias depends on the dtype it is rounded to.
            out = attend(torch.zeros_like(q), k, v, layout, bias=bias, backend=backend)
            torch.testing.assert_close(out.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_half_precision_gradients_of_what_many_queries_read_are_added_up_in_float32():
    """4096 times 1/8 is 512; in bfloat16 the sum would end at 32, where another 1/8 is less than half a step."""
    queries, keys = 4096, 8
    lists = TokenSets(torch.arange(keys).expand(queries, keys), keys)
    # One prefix token and nothing else, read by as many blocks as there are queries.
    alone = Blocks.windows(Grid(queries, prefix=1), 1)
    for layout, share in ((lists, 1 / 8), (alone, 1 / 2)):
        count = layout.num_keys
        q = torch.zeros(1, 1, layout.num_queries, 4, dtype=torch.bfloat16)
        k = torch.zeros(1, 1, count, 4, dtype=torch.bfloat16)
        v = torch.zeros(1, 1, count, 4, dtype=torch.bfloat16, requires_grad=True)
        out = attend(q, k, v, layout, backend="gather")
        (gradient,) = torch.autograd.grad(out, v, torch.ones_like(out))
        assert gradient.dtype == torch.bfloat16
        assert float(gradient[0, 0, 0, 0]) == pytest.approx(queries * share, rel=2**-7)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_half_precision_gradients_of_relative_tables_are_added_up_in_float32(backend):
    grid = Grid(64, 64)
    table = torch.zeros(1, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    layout = Blocks.windows(grid, 8)
    q = k = torch.zeros(1, 1, 4096, 1, dtype=torch.bfloat16)
    v = torch.ones(1, 1, 4096, 1, dtype=torch.bfloat16)
    # As a gain, whose gradient is the weight of each pair here: 64 windows of 64 queries give 1/64 each in the middle.
    out = attend(q, k, v, layout, gain=RelativeTable(table, grid), backend=backend)
    (gradient,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert float(gradient[0, 1, 1]) == pytest.approx(64.0, rel=2**-7)


GRID, QUERIES, HEADS, WIDTH = Grid(9, 11), 2, 2, 8


def learned_query(size, dtype):
    """Heads of learned queries whose scores reach ±size, and inputs."""
    channels = HEADS * WIDTH
    options = LearnedQuery(HEADS, 5, queries=QUERIES)
    group = randomize_parameters(options.build(BuildContext(channels, WIDTH)).double(), seed=5)
    x = random_tensor(2, GRID.tokens, channels, seed=6)
    v = random_tensor(2, HEADS, GRID.tokens, WIDTH, seed=7)
    with torch.no_grad():
        group.key.mul_(size / (x @ group.score_weight().T).abs().max())
    return group.to(dtype).requires_grad_(False), x.to(dtype), v.to(dtype)


def exact_learned_query(group, x, v):
    """In float64 by dense attention; also the sums of the magnitudes in it, and what the weights may be off by."""
    group = copy.deepcopy(group).double()
    x, v = x.double(), v.double().repeat(1, QUERIES, 1, 1)
    scores = (x @ group.score_weight().T).mT[..., None]
    bias, gain = (
        RelativeTable(table, GRID, fill=fill).dense(GRID.tokens)
        for table, fill in ((group.relative_bias, 0.0), (group.gain, 1.0))
    )
    mask, ones = Stencil(GRID, 5).to_mask(), torch.ones_like(scores)
    out = dense_attention(ones, scores, v, mask, 1.0, bias, gain)[0]
    magnitudes = dense_attention(ones, scores, v.abs(), mask, 1.0, bias, gain.abs())[0]
    # A score is a sum over channels and widths, and is off by some roundings of the terms' magnitudes.
    query = group.scaled_query().abs()
    weight = torch.einsum("lhd,hdc->lhc", query, group.key.abs().unflatten(0, (HEADS, WIDTH))).flatten(0, 1)
    size = float((x.abs() @ weight.T).max())
    heads = (one.unflatten(1, (QUERIES, HEADS)).sum(1) for one in (out, magnitudes))
    return *heads, 8 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("backend", ["chunked", "gather", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("size", [10.0, 1000.0])
def test_learned_queries_are_exact_for_large_scores(size, dtype, backend):
    group, x, v = learned_query(size, dtype)
    exact, magnitudes, moved = exact_learned_query(group, x, v)
    scores = x.double() @ copy.deepcopy(group).double().score_weight().T
    assert float(scores.abs().max()) == pytest.approx(size, rel=0.05)
    with use_backend(backend):
        out = group(HeadInputs(x, None, None, v, GRID)).out
    assert out.dtype == dtype
    off = (out.double() - exact).abs()
    assert (off <= (2 * moved + 2 * torch.finfo(dtype).eps) * magnitudes).all(), float(off.max())
