"""The operators of token sets and token masks: what PyTorch asks of an operator, chunks, memory, and edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnkit import attend
from attnkit.kernels import recording
from attnkit.kernels.chunked import token_sets
from attnkit.kernels.ops.token_sets import TOKEN_SETS
from attnkit.layouts import TokenMask, TokenSets
from attnkit.layouts.base import framed
from attnkit.testing import peak_memory, random_qkv

SIZES = (9, 11)
# Keys that all see, and queries that see all.
PREFIX = (2, 1)


def lists(*lead, dtype=torch.int64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, SIZES[1], (*lead, SIZES[0] - PREFIX[1], 4), generator=generator, dtype=dtype)
    index[..., 0, :], index[..., 1, 1:] = -1, -1
    return index


def problems(dtype=torch.float32):
    """Arguments of the operator: lists and masks; with and without a key mask, a bias, and what sees and is seen by
    all."""
    q, k, v = random_qkv(SIZES, batch=2, heads=3, value_dim=5, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, *SIZES, generator=generator) < 0.3
    mask[..., 3, :] = False
    keys = torch.rand(1, 3, SIZES[1], generator=generator) < 0.6
    bias = torch.randn(1, 3, 1, SIZES[1], generator=generator, dtype=dtype)
    return [
        (q, k, v, TokenSets(lists(2, 3), SIZES[1]).index, keys, None, PREFIX[1], PREFIX[0], 0.3, None),
        (q, k, v, TokenSets(lists(1, 1), SIZES[1]).index, None, bias, PREFIX[1], PREFIX[0], 0.3, None),
        (q, k, v, mask, None, None, 0, 0, -0.3, None),
        (q, k, v, mask, keys, bias, 0, 0, 0.3, None),
        (q, k, v, mask[..., PREFIX[1] :, :], keys, None, PREFIX[1], PREFIX[0], 0.3, None),
    ]


def with_gradients(arguments):
    return tuple(
        one.clone().requires_grad_() if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for one in arguments
    )


# opcheck itself reads the gradient of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("number", range(5))
def test_pytorch_finds_nothing_wrong(number):
    arguments = problems()[number]
    torch.library.opcheck(TOKEN_SETS.op, with_gradients(arguments))
    out, total, peak = TOKEN_SETS.op(*arguments)
    needs = [True, False, True, arguments[5] is not None]
    torch.library.opcheck(TOKEN_SETS.backward_op, (None, total, None, out, total, peak, *arguments, needs))


@pytest.mark.parametrize("logits", [1, 40, 1 << 19])
@pytest.mark.parametrize("number", range(5))
def test_gradients_do_not_depend_on_how_large_chunks_are(monkeypatch, number, logits):
    """One query of one head at a time, a few, and everything at once."""
    monkeypatch.setattr(token_sets, "LOGITS", logits)
    arguments = with_gradients(problems(torch.float64)[number])
    leaves = [one for one in arguments if isinstance(one, torch.Tensor) and one.requires_grad]
    q, k, v, table, keys, bias, queries_all, keys_all, scale, _ = arguments
    if table.dtype == torch.bool:
        # What the mask says of keys that all see does not count.
        layout = TokenMask(framed(table[..., keys_all:], queries_all, keys_all), key_mask=keys)
    else:
        layout = TokenSets(table, k.shape[2], queries_all=queries_all, keys_all=keys_all, key_mask=keys)
    right = attend(q, k, v, layout, scale=scale, bias=bias, return_lse=True, backend="reference")
    rows, powers, peak = TOKEN_SETS.op(*arguments)
    gradients = []
    for out, lse in (right, (rows, powers.log() + peak)):
        seen = lse.isfinite()
        total = out.square().sum() + lse.where(seen, 0.0).sin().sum()
        gradients.append([out, lse, *torch.autograd.grad(total, leaves)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def loss(q, k, v, index, bias):
    layout = TokenSets(index, SIZES[1], queries_all=PREFIX[1], keys_all=PREFIX[0], unique=True)
    out, lse = attend(q, k, v, layout, bias=bias, return_lse=True, backend="chunked")
    return out.square().sum() + lse.sum()


def test_compiled_with_gradients():
    q, k, v = random_qkv(SIZES, batch=2, heads=3, grad=True)
    bias = torch.randn(1, 1, *SIZES, requires_grad=True)
    index = TokenSets(lists(2, 1), SIZES[1]).index
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        *[torch.autograd.grad(run(q, k, v, index, bias), (q, k, v, bias)) for run in (loss, compiled)], strict=True
    ):
        torch.testing.assert_close(one, other)


def test_exported_with_any_number_of_items():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return attend(q, k, v, TokenMask(mask))

    q, k, v = random_qkv(SIZES, batch=2, heads=3)
    given = (q, k, v, torch.ones(2, 1, *SIZES, dtype=torch.bool).tril())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Layer(), given, dynamic_shapes={name: {0: batch} for name in ("q", "k", "v", "mask")})
    # Who loads it needs no attnkit, though eager calls are chunked.
    assert not [node for node in program.graph.nodes if "attnkit" in str(node.target)]
    more = [torch.cat([one] * 3) for one in given]
    torch.testing.assert_close(program.module()(*more), Layer()(*more))


def test_counted_operations():
    """Listed keys are counted and not all, though products with all are what runs; 4 slots and 2 shared keys here."""
    q, k, v = random_qkv(SIZES, batch=2, heads=3, value_dim=5, grad=True)
    index = TokenSets(lists(1, 1), SIZES[1]).index
    pairs = 2 * 3 * (1 * 11 + 8 * 6)
    width = q.shape[3]
    with FlopCounterMode(display=False) as counter:
        out, *_ = TOKEN_SETS.op(q, k, v, index, None, None, PREFIX[1], PREFIX[0], 1.0, None)
    assert counter.get_total_flops() == 2 * pairs * (width + 5)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * width + 2 * 5)


def test_under_autocast():
    q, k, v, *rest = with_gradients(problems()[3])
    exact, *_ = TOKEN_SETS.op(q, k, v, *rest)
    with torch.autocast("cpu", torch.bfloat16):
        out, total, peak = TOKEN_SETS.op(q, k, v, *rest)
    assert (out.dtype, total.dtype, peak.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """Products and sums are float32, gradients over many queries too: 2048 times 1/4 is 512, in bfloat16 at most 64."""
    queries, keys = 2048, 4
    layout = TokenSets(torch.arange(keys).expand(queries, keys), keys)
    q, k = (torch.zeros(1, 1, size, 4, dtype=dtype) for size in (queries, keys))
    v = torch.ones(1, 1, keys, 4, dtype=dtype, requires_grad=True)
    out = attend(q, k, v, layout, backend="chunked")
    assert out.dtype == dtype and torch.equal(out, torch.ones_like(out))
    (gradient,) = torch.autograd.grad(out, v, torch.ones_like(out))
    assert gradient.dtype == dtype and torch.equal(gradient, torch.full_like(v, queries / keys))


@pytest.mark.parametrize("seen", ["lists", "mask"])
@pytest.mark.parametrize("grad", [False, True])
def test_queries_without_keys(seen, grad):
    q, k, v = random_qkv((5, 7), batch=1, heads=2, grad=grad)
    index = torch.tensor([[0, 3], [-1, -1], [6, -1], [-1, -1], [2, 2]])
    layout = TokenSets(index, 7)
    layout = layout.lower("token_mask") if seen == "mask" else layout
    out, lse = attend(q, k, v, layout, return_lse=True, backend="chunked")
    for row in (1, 3):
        assert torch.equal(out[:, :, row], torch.zeros_like(out[:, :, row]))
        assert (lse[:, :, row] == -math.inf).all()
    if grad:
        # A gradient that arrives at -inf goes nowhere.
        gradients = torch.autograd.grad((out.sum() + lse.sum()), (q, k, v))
        assert all(one.isfinite().all() for one in gradients)
        assert (gradients[0][:, :, 1] == 0).all() and (gradients[1][:, :, [1, 4, 5]] == 0).all()


@pytest.mark.parametrize("spoiled", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["keys", "values", "both"])
def test_keys_that_nobody_sees_may_hold_anything(spoiled, dtype, where):
    q, k, v = random_qkv((5, 7), batch=1, heads=2, dtype=dtype, grad=True)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[:, [0, 6]] = False
    layout = TokenMask(mask)
    clean = attend(q, k, v, layout, backend="chunked")
    near_k, near_v = (one.detach().clone() for one in (k, v))
    if where != "values":
        near_k[:, :, [0, 6]] = spoiled
    if where != "keys":
        near_v[:, :, [0, 6]] = spoiled
    inputs = [q, near_k.requires_grad_(), near_v.requires_grad_()]
    found = attend(*inputs, layout, backend="chunked")
    torch.testing.assert_close(found, clean)
    right = torch.autograd.grad(clean.sum(), (q, k, v))
    for one, other in zip(torch.autograd.grad(found.sum(), inputs), right, strict=True):
        torch.testing.assert_close(one, other)


def test_lists_of_int32_give_the_same():
    q, k, v = random_qkv(SIZES, batch=2, heads=3)
    index = TokenSets(lists(2, 3), SIZES[1]).index
    wide, short = (
        TOKEN_SETS.op(q, k, v, one, None, None, PREFIX[1], PREFIX[0], 0.3, None) for one in (index, index.int())
    )
    assert all(torch.equal(one, other) for one, other in zip(wide, short, strict=True))


def test_the_output_lies_in_the_order_of_tokens():
    """A projection over all heads then reads it without a copy, wherever q, k and v lie."""
    q, k, v = torch.randn(2, 9, 3 * 4 * 8).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).requires_grad_()
    mask = TokenMask(torch.ones(9, 9, dtype=torch.bool).tril())
    out = attend(q, k, v, mask, backend="chunked")
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, attend(q, k, v, mask, backend="reference"))


def test_a_gain_is_refused():
    q, k, v = random_qkv((4, 4))
    layout = TokenMask(torch.ones(4, 4, dtype=torch.bool))
    with recording() as choices:
        attend(q, k, v, layout, gain=torch.ones(1, 1, 1, 1))
    assert "a gain multiplies the weights after the softmax" in choices[0].reasons["chunked"][0]


def test_nothing_of_all_pairs_is_held():
    """Of 2048 tokens and 4 heads all logits are 64 MiB, a mask of them 16; chunks, keys and gradients are less."""
    tokens, heads, width = 2048, 4, 16
    q, k, v = random_qkv((tokens, tokens), heads=heads, head_dim=width, dtype=torch.float32, grad=True)
    layout = TokenSets((torch.arange(tokens)[:, None] + torch.arange(64)) % tokens, tokens)
    assert q.shape == (1, heads, tokens, width)
    map_bytes = 4 * q.numel()
    chunks = 3 * 4 * token_sets.LOGITS + 8 * 64 * token_sets.LOGITS // tokens

    def both():
        out = attend(q, k, v, layout, backend="chunked")
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    with torch.no_grad():
        assert peak_memory(lambda: attend(q, k, v, layout, backend="chunked")) < 1.2 * (chunks + 3 * map_bytes)
    assert peak_memory(both) < 1.2 * (chunks + 8 * map_bytes)
    assert 1.2 * (chunks + 8 * map_bytes) < heads * tokens**2
