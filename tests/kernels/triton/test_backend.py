"""Which calls the triton backend refuses, and that nothing imports Triton before it is needed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from attnkit import CompetingMaskPredictor, Grid, HeadMix, MaskPredictor, ThresholdMaskPredictor
from attnkit.kernels import dispatch, recording
from attnkit.kernels.call import AttendCall
from attnkit.kernels.ops.stencil import STENCIL
from attnkit.kernels.ops.token_sets import SetTables
from attnkit.kernels.triton import backend, version
from attnkit.layouts import Blocks, Dense, RelativeTable, Stencil, TokenMask, TokenSets
from attnkit.testing import random_qkv

LAYOUT = Blocks.windows(Grid(4, 4), 2)
WINDOWS = Stencil(Grid(4, 4), 3)


def lists_of_16():
    return TokenSets(torch.zeros(16, 2, dtype=torch.int64), 16)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    """What is asked of a GPU, answered for the CPU that there is."""
    monkeypatch.setattr(backend, "INTERPRETING", True)
    monkeypatch.setattr(backend, "_MISSING", "")


def reasons(layout=LAYOUT, widths=(16, 16), dtype=torch.float32, **changes):
    given = random_qkv((16, 16), head_dim=widths[0], value_dim=widths[1], dtype=dtype)
    return " ".join(backend.TritonBackend().why_not(AttendCall(*given, layout, 1.0).replace(**changes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_it_takes(dtype):
    assert reasons(dtype=dtype) == ""
    assert reasons(widths=(256, 3), dtype=dtype) == ""


@pytest.mark.parametrize("layout", [lists_of_16(), TokenMask(torch.eye(16) > 0)])
def test_it_takes_token_sets(layout):
    assert reasons(layout) == ""


def lists_of(slots, *lead):
    return TokenSets(torch.zeros(*lead, 64, slots, dtype=torch.int64), 64, unique=True)


@pytest.mark.parametrize(
    ("layout", "backend", "why"),
    [
        (lists_of(3, 1, 1), "triton", ""),
        (lists_of(30, 16, 8), "triton", ""),
        (lists_of(40, 1, 1), "sdpa", "Lists of 40 of 64 keys that serve 128 items and heads cost dense"),
        (TokenMask(torch.zeros(16, 8, 64, 64, dtype=torch.bool)), "triton", ""),
        (TokenMask(torch.zeros(64, 64, dtype=torch.bool)), "sdpa", "A mask that serves 128 items and heads costs"),
        # Groups of each head make no masks of each head.
        (
            TokenMask(torch.zeros(64, 64, dtype=torch.bool), query_groups=torch.zeros(16, 8, 64, dtype=torch.int32)),
            "sdpa",
            "A mask that serves 128 items and heads costs",
        ),
    ],
)
def test_dense_attention_where_tiles_would_see_nearly_everything(layout, backend, why):
    """On a GPU, where nothing was measured; and why, among the reasons."""
    with FakeTensorMode():
        given = [torch.empty(16, 8, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        call = AttendCall(*given, layout, 1.0)
        assert dispatch.choose(call) == backend
        assert dispatch.choose(call.replace(return_lse=True)) == "triton"
        told = dispatch.why_not_others(call, backend).get("triton", ("",))[0]
    assert why in told


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    "group",
    [
        MaskPredictor(2, 64, 0.1),
        MaskPredictor(2, 64, 0.5),
        ThresholdMaskPredictor(2, 64),
        CompetingMaskPredictor(2, 64, 0.25, least_share=0.01),
    ],
    ids=lambda group: group.kind,
)
def test_tiles_take_queries_together_that_share_a_basis_row(group, prefix):
    """On a GPU mask predictors say which; on the CPU nobody asks."""
    mix, grid = HeadMix(32, [group]), Grid(8, 8, prefix=prefix)
    shapes = {name: one.shape for name, one in mix.state_dict().items()}
    with FakeTensorMode(), torch.device("cuda"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        with recording() as choices:
            functional_call(mix, state, (torch.empty(3, grid.tokens, 32), grid))
    (choice,) = choices
    layout = choice.call.layout
    rows = layout.num_queries - layout.global_queries
    assert choice.backend == "triton" and layout.query_groups.shape == (3, 2, rows)
    assert backend.TritonBackend().how(choice.call) == "tiles take queries of a group together"
    with recording() as choices:
        mix(torch.zeros(3, grid.tokens, 32), grid)
    assert choices[0].call.layout.query_groups is None
    assert backend.TritonBackend().how(choices[0].call) == ""


@pytest.mark.parametrize("groups", [None, torch.tensor([2, 0, 1, 0] * 4)])
def test_its_kernels_are_given_the_order_of_groups(monkeypatch, groups):
    """Their results would be right without it, and tiles would visit more."""
    given = []

    def op(q, k, v, *rest):
        given.append(SetTables(*rest))
        return v, q[..., 0], q[..., 0]

    monkeypatch.setattr(backend, "TOKEN_PAIR", SimpleNamespace(op=op))
    for layout in (TokenMask(torch.eye(16) > 0, query_groups=groups), replace(lists_of_16(), query_groups=groups)):
        backend.TritonBackend().run(AttendCall(*random_qkv((16, 16), dtype=torch.float32), layout, 1.0))
    for tables in given:
        if groups is None:
            assert tables.order is None
        else:
            first = [*range(1, 16, 2), *range(2, 16, 4), *range(0, 16, 4)]
            assert tables.order.dtype == torch.int32 and tables.order.flatten().tolist() == first
    assert len(given) == 2


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"layout": Dense(16)}, "a dense layout has no kernels here; it takes blocks, stencil, token_mask, token_sets"),
        ({"dtype": torch.float64}, "q is torch.float64; its kernels take float32, bfloat16 and float16"),
        ({"widths": (16, 260)}, "a head is 260 wide, and its kernels have room for 256"),
        ({"v": torch.zeros(1, 1, 16, 4, dtype=torch.float16)}, "q and k are torch.float32 but v is torch.float16"),
        ({"gain": torch.zeros(1, 1, 16, 16)}, "a gain multiplies the weights"),
        ({"layout": Stencil(Grid(2, 2, 2, 2), 3)}, "the grid has 4 axes, and its kernels have addresses for 3"),
        ({"layout": WINDOWS, "v": torch.zeros(1, 1, 16, 4, dtype=torch.float64)}, "v is torch.float64; its kernels"),
        ({"layout": WINDOWS, "dtype": torch.float64}, "q is torch.float64; its kernels take"),
    ],
)
def test_what_it_refuses(given, reason):
    assert reason in reasons(**given)


@pytest.mark.parametrize("border", ["mask", "clamp"])
def test_what_it_takes_of_stencils(border):
    layout = Stencil(Grid(4, 4), 3, border=border)
    gain = RelativeTable(torch.zeros(1, 3, 3), layout.grid)
    assert reasons(layout, gain=gain, v=torch.zeros(1, 1, 16, 4, dtype=torch.float16)) == ""


@pytest.mark.parametrize("border", ["mask", "clamp"])
def test_stencils_on_a_gpu_are_its_own(border):
    layout = Stencil(Grid(4, 4), 3, border=border)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 1, 16, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        call = AttendCall(q, k, v, layout, 1.0)
        assert dispatch.choose(call) == "triton"
        assert "are the triton backend's" in dispatch.why_not("chunked", call)[0]
        out, total, peak = STENCIL.op(q, k, v, None, None, None, [4, 4], 0, [3, 3], [1, 1], [1, 1], False, 1.0)
    assert (out.dtype, total.dtype, peak.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", False)
    monkeypatch.setattr(backend, "_INTERPRETED", ", or set TRITON_INTERPRET=1 before Python starts")
    way_out = "q lies on cpu, and its kernels are for GPUs; move q, k and v to one, or set TRITON_INTERPRET=1 before"
    assert reasons().startswith(way_out)
    # Another layout is one more reason, and hides no other.
    assert reasons(Dense(16)).startswith(way_out) and "it takes blocks" in reasons(Dense(16))


def test_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with FakeTensorMode():
        given = [torch.empty(1, 1, 16, 16, device="cuda") for _ in range(3)]
        found = backend.TritonBackend().why_not(AttendCall(*given, LAYOUT, 1.0))
    assert found == ("the GPU has compute capability 7.5; its kernels need 8.0",)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(version.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend, "_MISSING", version.missing())
    assert reasons().startswith("Triton is not installed; on Linux, pip install 'attnkit[triton]'")


@pytest.mark.parametrize(("found", "refused"), [("3.5.1", True), ("2.10.0", True), ("3.6.0", False), ("3.10", False)])
def test_an_old_triton(monkeypatch, found, refused):
    monkeypatch.setattr(version.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: found)
    assert (f"Triton is {found}, and its kernels need 3.6 or newer" == version.missing()) is refused
    assert bool(version.missing()) is refused
