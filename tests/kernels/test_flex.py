"""The flex backend: a few fixed cases, because every new shape compiles for seconds; and why it refuses."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnkit import Grid, attend
from attnkit.errors import BackendError
from attnkit.kernels import flex
from attnkit.kernels.call import AttendCall
from attnkit.kernels.dispatch import backend_named, choose, why_not_others
from attnkit.kernels.flex import FlexBackend
from attnkit.layouts import Blocks, Dense, RelativeTable, Stencil, TokenMask, cache
from attnkit.testing import assert_within_budget, dense_attention, naive_attention, random_qkv, random_tensor

GRID = Grid(3, 4, prefix=1)


@pytest.mark.slow
def test_masked_and_biased_with_an_empty_row_and_hidden_nan():
    # Item 0 has no key at all in head 1, and a NaN in a key that nobody sees.
    kept = torch.ones(2, 2, 13, dtype=torch.bool)
    kept[0, 1] = False
    kept[:, :, 5] = False
    layout = Blocks.windows(GRID, 2).restrict(kept)
    q, k, v = random_qkv((13, 13), batch=2, heads=2, head_dim=8, dtype=torch.float32)
    bias = random_tensor(1, 2, 13, 13, seed=1, dtype=torch.float32)
    mask = layout.to_mask()
    exact = dense_attention(q, k, v, mask, bias=bias)[0]
    plain = naive_attention(q, k, v, mask, bias=bias)
    k[:, :, 5], v[:, :, 5] = torch.nan, torch.inf
    with torch.no_grad():
        out = attend(q, k, v, layout, bias=bias, backend="flex")
    assert_within_budget(out, exact, plain, what="flex")
    assert (out[0, 1] == 0).all()


@pytest.mark.slow
def test_dense_without_bias():
    q, k, v = random_qkv((13, 6), batch=1, heads=2, head_dim=8, dtype=torch.float32)
    with torch.inference_mode():
        out = attend(q, k, v, Dense(13, 6), scale=0.3, backend="flex")
    mask = torch.ones(13, 6, dtype=torch.bool)
    exact, plain = dense_attention(q, k, v, mask, 0.3)[0], naive_attention(q, k, v, mask, 0.3)
    assert_within_budget(out, exact, plain, what="flex")


def reasons(q, k, v, layout=None, **extra):
    layout = Dense(q.shape[2], k.shape[2]) if layout is None else layout
    return backend_named("flex").why_not(AttendCall(q, k, v, layout, 1.0, **extra))


def tensors(dtype=torch.float32, device="cpu", width=32, count=5):
    return [torch.ones(1, 1, count, width, dtype=dtype, device=device) for _ in range(3)]


def test_it_accepts_what_it_can_run():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert reasons(*tensors(dtype)) == ()
        assert reasons(*tensors(dtype), bias=torch.zeros(1, 1, 5, 5)) == ()
    assert reasons(*tensors(), layout=Stencil(Grid(1, 5), 3)) == ()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: reasons(*tensors(torch.float64)), "takes float32, bfloat16 and float16, not torch.float64"),
        (lambda: reasons(*tensors(device="meta")), "no kernel for meta; it runs on cpu and cuda"),
        (lambda: reasons(*(one.requires_grad_() for one in tensors())), "no backward pass on the CPU"),
        (lambda: reasons(*tensors(), gain=torch.ones(1, 1, 1, 1)), "gain multiplies the weights after the softmax"),
        (lambda: reasons(*tensors(), return_lse=True), "return_lse=True"),
        (
            lambda: reasons(*tensors()[:2], tensors(torch.bfloat16)[2]),
            "q and k are torch.float32 but v is torch.bfloat16",
        ),
        (lambda: reasons(*tensors(count=0)), "does not take empty tensors"),
    ],
)
def test_it_says_why_not(call, reason):
    found = call()
    assert any(reason in text for text in found), found


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dtype": torch.float64}, "FlexAttention on CUDA does not take float64"),
        ({"width": 8}, "head width 8 is below the 16 that its CUDA kernel needs"),
        ({"gain": True}, "a gain multiplies the weights after the softmax"),
    ],
)
def test_it_says_why_not_on_a_gpu(given, reason):
    with FakeTensorMode():
        gain = torch.ones(1, 1, 1, 1, device="cuda") if given.pop("gain", False) else None
        found = reasons(*tensors(device="cuda", **given), gain=gain)
    assert len(found) == 1 and reason in found[0]


def test_on_a_gpu_it_trains_and_tells_the_lse():
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = [one.requires_grad_() for one in tensors(dtype, device="cuda")]
            assert reasons(*given, bias=torch.zeros(1, 1, 5, 5, device="cuda"), return_lse=True) == ()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "windows", "routed regions", "stencil"])
def test_on_a_gpu_it_computes_what_the_mask_says(name, dtype):
    grid = Grid(8, 8, prefix=1)
    layout = {
        "dense": Dense(65),
        "windows": Blocks.windows(grid, 3, device="cuda"),
        "routed regions": Blocks.from_regions(
            grid, 2, torch.tensor([[[0, 1], [1, -1], [2, 0], [3, 3]]], device="cuda")
        ),
        "stencil": Stencil(grid, 3),
    }[name]
    leaves = random_qkv((65, 65), batch=2, heads=2, head_dim=16, dtype=dtype)
    bias = random_tensor(1, 2, 65, 65, seed=1, dtype=dtype)
    mask = layout.to_mask("cuda").cpu()
    wide = [one.double().requires_grad_() for one in leaves]
    exact, exact_lse = dense_attention(*wide, mask, bias=bias.double())
    on = [one.cuda().requires_grad_() for one in leaves]
    out, lse = attend(*on, layout, bias=bias.cuda(), return_lse=True, backend="flex")
    plain = naive_attention(*leaves, mask, bias=bias)
    assert_within_budget(out.cpu(), exact, plain, what="flex")
    grads = torch.autograd.grad(out.float().sum() + lse.sum(), on)
    wanted = torch.autograd.grad(exact.sum() + exact_lse.sum(), wide)
    limit = {torch.float32: 2e-3, torch.bfloat16: 5e-2}[dtype]
    for found, one in zip(grads, wanted, strict=True):
        assert (found.cpu().double() - one).abs().max() <= limit * one.abs().max()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_makes_no_huge_masks(device):
    with FakeTensorMode():
        given = tensors(torch.bfloat16, device=device, count=2**15 + 1)
        (found,) = reasons(*given, layout=Stencil(Grid(1, 2**15 + 1), 3))
        assert found.startswith("it would make a tensor of 1,073,807,361 pairs of tokens, and makes none of more than")
        assert "such as gather" in found
        # Without a mask there is none to make.
        assert reasons(*given) == ()
        table = RelativeTable(torch.zeros(2, 1, 3, device=device), Grid(1, 2**15))
        heads = [torch.ones(1, 2, 2**15, 32, dtype=torch.bfloat16, device=device) for _ in range(3)]
        (found,) = reasons(*heads, bias=table)
        assert "2,147,483,648 pairs" in found


LAYOUTS = {
    "windows": Blocks.windows(Grid(16, 20), 4),
    "one token more than two tiles": Stencil(Grid(1, 257), 129),
    "prefix": Blocks.windows(GRID, 2),
    "random": TokenMask(torch.rand(2, 2, 150, 300, generator=torch.Generator().manual_seed(0)) < 0.1),
    "full tiles": TokenMask(torch.arange(256)[:, None] < 130 * torch.ones(1, 256, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_its_tiles_are_those_of_the_mask(name):
    from torch.nn.attention.flex_attention import create_block_mask

    layout = LAYOUTS[name]
    mask, seen, *tiles = flex._tables(layout, torch.device("cpu"))
    found = flex._block_mask(mask, *tiles)
    assert torch.equal(mask, layout.to_mask()) and torch.equal(seen, mask.any(-2)[..., None])
    wanted = create_block_mask(
        lambda b, h, i, j: mask[b % mask.shape[0], h % mask.shape[1], i, j], *mask.shape, device="cpu"
    )
    assert found.shape == wanted.shape and torch.equal(found.to_dense(), wanted.to_dense())
    for one in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, one), getattr(wanted, one)), one


def test_masks_of_sizes_only_are_made_once(monkeypatch):
    made = []
    monkeypatch.setattr("attnkit.kernels.flex._compiled", lambda: lambda q, k, v, **_: q + k + v)
    monkeypatch.setattr(flex, "_tables", lambda *given, tables=flex._tables: made.append(given) or tables(*given))
    cache.forget()
    q, k, v = tensors(count=13)
    with torch.no_grad():
        for _ in range(3):
            attend(q, k, v, Blocks.windows(GRID, 2), backend="flex")
        assert len(made) == 1
        routed = Blocks.from_regions(Grid(4, 4), 2, torch.zeros(1, 4, 1, dtype=torch.int64))
        q, k, v = tensors(count=16)
        for _ in range(2):
            attend(q, k, v, routed, backend="flex")
        # What a table says is looked at every time.
        assert len(made) == 3


def test_gradients_that_nobody_asked_for_are_no_reason():
    q, k, v = (one.requires_grad_() for one in tensors())
    with torch.no_grad():
        assert reasons(q, k, v) == ()


def test_all_its_reasons_come_in_one_sentence():
    q, k, v = random_qkv((3, 3), grad=True)
    with pytest.raises(
        BackendError,
        match=r"^backend 'flex' cannot run this call: FlexAttention has no backward pass.*; FlexAttention on the CPU",
    ) as caught:
        attend(q, k, v, Dense(3), backend="flex")
    assert "q (1, 1, 3, 4), v (1, 1, 3, 4), torch.float64, cpu, dense layout, with grad" in str(caught.value)


def test_it_is_never_chosen_on_its_own_however_fast_it_may_be(monkeypatch):
    monkeypatch.setattr(FlexBackend, "cost", lambda self, call: 0.0)
    q, k, v = tensors(count=GRID.tokens)
    for layout in (Dense(13), Stencil(GRID, 3), Blocks.windows(GRID, 2)):
        call = AttendCall(q, k, v, layout, 1.0)
        assert choose(call) != "flex"
        assert (
            "it runs on demand only, because a first call compiles for seconds"
            in why_not_others(call, "sdpa")["flex"][0]
        )


def test_without_gradients_it_takes_leaves_that_could_have_some(monkeypatch):
    """FlexAttention itself refuses them on the CPU."""
    monkeypatch.setattr("attnkit.kernels.flex._compiled", lambda: lambda q, k, v, **_: q + k + v)
    q, k, v = (one.requires_grad_() for one in tensors())
    with torch.no_grad():
        assert not attend(q, k, v, Dense(5, 5), backend="flex").requires_grad
    with pytest.raises(BackendError, match="no backward pass on the CPU"):
        attend(q, k, v, Dense(5, 5), backend="flex")
