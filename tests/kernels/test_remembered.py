"""Dispatch asks the backends once for calls that are alike, and again as soon as anything they look at changes."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from attnkit import Grid, attend, use_backend
from attnkit.errors import AttnkitError, BackendError, ShapeError
from attnkit.kernels import dispatch, reference
from attnkit.layouts import Blocks, Dense, Layout, RelativeTable, Stencil, TokenMask, TokenSets
from attnkit.registry import BACKENDS
from attnkit.testing import random_qkv

GRID = Grid(4, 4)
QKV = tuple(one.float() for one in random_qkv((16, 16), heads=2))


@pytest.fixture
def asked(monkeypatch):
    """How often `choose` was computed."""
    counts = []
    choose = dispatch.choose

    def counting(*arguments):
        counts.append(arguments)
        return choose(*arguments)

    monkeypatch.setattr(dispatch, "choose", counting)
    dispatch.forget()
    yield counts
    dispatch.forget()


def half(count):
    """A key mask that hides every second key."""
    return (torch.arange(count) % 2 == 0)[None, None]


LAYOUTS = {
    "dense": lambda: Dense(16),
    "windows": lambda: Blocks.windows(GRID, 2),
    "shifted": lambda: Blocks.windows(GRID, 2, shift=1),
    "padded": lambda: Blocks.windows(GRID, 3),
    "routed": lambda: Blocks.from_regions(GRID, 2, torch.tensor([[[0, 1]] * 4])),
    "stencil": lambda: Stencil(GRID, 3),
    "token_sets": lambda: TokenSets(torch.arange(16).view(1, 1, 16, 1), keys=16),
    "token_mask": lambda: TokenMask(torch.ones(16, 16, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_calls_ask_once(asked, name):
    for _ in range(3):
        attend(*QKV, LAYOUTS[name]())
    assert len(asked) == 1
    attend(*QKV, LAYOUTS[name]().restrict(half(16)))
    assert len(asked) == 2
    attend(*QKV, LAYOUTS[name]().restrict(~half(16)))
    assert len(asked) == 2


def test_whatever_a_backend_looks_at_is_asked_about_again(asked):
    """Every one of these calls differs from the one before it in one thing."""
    q, k, v = QKV
    table = torch.zeros(2, 3, 3)
    calls = [
        ((q, k, v, Dense(16)), {}),
        ((q[:, :1], k[:, :1], v[:, :1], Dense(16)), {}),
        ((q.double(), k.double(), v.double(), Dense(16)), {}),
        ((q, k, v.double(), Dense(16)), {}),
        ((q.clone().requires_grad_(), k, v, Dense(16)), {}),
        ((q, k, v, Dense(16)), {"return_lse": True}),
        ((q, k, v, Dense(16)), {"scale": 0.5}),
        ((q, k, v, Dense(16)), {"scale": -0.5}),
        ((q, k, v, Dense(16)), {"bias": torch.zeros(1, 1, 16, 16)}),
        ((q, k, v, Dense(16)), {"bias": torch.zeros(1, 1, 1, 16)}),
        ((q, k, v, Dense(16)), {"bias": torch.zeros(1, 1, 1, 16).requires_grad_()}),
        ((q, k, v, Dense(16)), {"gain": torch.zeros(1, 1, 1, 16)}),
        ((q, k, v, Dense(16)), {"bias": RelativeTable(table, GRID)}),
        ((q, k, v, Dense(16)), {"bias": RelativeTable(table, GRID, fill=1.0)}),
        ((q, k, v, Dense(16)), {"bias": RelativeTable(table, Grid(2, 8))}),
        ((q, k, v, Dense(16)), {"bias": RelativeTable(table.clone().requires_grad_(), GRID)}),
        ((q, k, v, Stencil(GRID, 3)), {}),
        ((q, k, v, Stencil(Grid(2, 8), 3)), {}),
        ((q, k, v, Stencil(GRID, 1)), {}),
        ((q, k, v, Stencil(GRID, 3, border="clamp")), {}),
    ]
    for arguments, keywords in calls:
        attend(*arguments, **keywords)
    assert len(asked) == len(calls)
    for arguments, keywords in calls:
        attend(*arguments, **keywords)
    assert len(asked) == len(calls)


def test_gradients_on_and_off_are_two_choices(asked):
    q = QKV[0].clone().requires_grad_()
    attend(q, *QKV[1:], Dense(16))
    with torch.no_grad():
        attend(q, *QKV[1:], Dense(16))
    assert len(asked) == 2


def test_a_preference_and_its_end_change_the_choice(asked):
    ran = []

    def note(call, compute):
        ran.append(call)
        return compute()

    def backend(**extra):
        with dispatch.recording() as choices, dispatch.wrapping(note):
            attend(*QKV, Dense(16), **extra)
        return choices[0].backend

    for _ in range(2):
        assert backend() == "sdpa"
        with use_backend("reference"):
            assert backend() == "reference"
            assert backend(backend="sdpa") == "sdpa"
        assert backend() == "sdpa"
        with use_backend("reference,auto"):
            assert backend() == "reference"
    assert len(asked) == 4
    assert len(ran) == 10


def test_a_backend_that_joins_or_leaves_is_asked(asked, monkeypatch):
    class Cheap(reference.ReferenceBackend):
        name = "cheap"

        def cost(self, call):
            return 0.0

    def backend():
        with dispatch.recording() as choices:
            attend(*QKV, Dense(16))
        return choices[0].backend

    assert backend() == "sdpa"
    with monkeypatch.context() as patch:
        patch.setitem(BACKENDS, "cheap", "elsewhere:Cheap")
        patch.setitem(dispatch._backends, "cheap", Cheap())
        assert backend() == "cheap"
        assert backend() == "cheap"
    assert backend() == "sdpa"
    assert len(asked) == 3


def test_a_wrong_call_that_looks_like_one_remembered_is_still_refused():
    q, k, v = QKV
    layout = Dense(16)
    attend(q, k, v, layout)
    attend(q, k, v, layout, scale=1)
    attend(q, k, v, layout, bias=torch.zeros(1, 1, 1, 16))
    wrong = [
        ((q, k, v[:, :, :15], layout), {}, ShapeError),
        ((q, k, v, Dense(15)), {}, ShapeError),
        ((q, k.double(), v, layout), {}, ShapeError),
        ((q, k, v.to("meta"), layout), {}, ShapeError),
        ((q, k, v.long(), layout), {}, ShapeError),
        ((q.tolist(), k, v, layout), {}, ShapeError),
        ((q, k, v, None), {}, AttnkitError),
        ((q, k, v, layout), {"scale": True}, ShapeError),
        ((q, k, v, layout), {"scale": float("nan")}, ShapeError),
        ((q, k, v, layout), {"scale": [1.0]}, ShapeError),
        ((q, k, v, layout), {"bias": torch.zeros(1, 1, 1, 15)}, ShapeError),
        ((q, k, v, layout), {"bias": torch.zeros(1, 1, 1, 16, dtype=torch.int64)}, ShapeError),
        ((q, k, v, layout), {"bias": 0.0}, ShapeError),
        ((q, k, v, layout), {"gain": torch.zeros(1, 1, 1, 16, device="meta")}, ShapeError),
        ((q, k, v, layout), {"backend": "spda"}, BackendError),
        ((q, k, v, layout), {"backend": ["sdpa"]}, BackendError),
        ((q, k, v, layout), {"backend": "sdpa", "return_lse": True}, BackendError),
        ((q, k, v, layout.restrict(torch.ones(3, 1, 16, dtype=torch.bool))), {}, ShapeError),
    ]
    for arguments, keywords, error in wrong * 2:
        with pytest.raises(error):
            attend(*arguments, **keywords)


def test_layouts_of_another_kind_are_asked_about_every_time(asked):
    """What a subclass holds beside its parent's fields is not known, so nothing is remembered of it."""

    @dataclass(frozen=True, eq=False)
    class Causal(Dense):
        key_mask: Tensor | None = field(default=None, repr=False)

    assert Causal(16).signature is None
    assert Layout.own_form(Causal(16)) is None
    attend(*QKV, Causal(16))
    attend(*QKV, Causal(16))
    assert len(asked) == 2


def test_only_so_many_choices_are_kept(asked, monkeypatch):
    monkeypatch.setattr(dispatch, "CAPACITY", 4)
    for scale in range(1, 11):
        attend(*QKV, Dense(16), scale=scale)
        assert len(dispatch._chosen) <= 4
    assert len(asked) == 10


def test_a_refusal_is_not_remembered(asked):
    for _ in range(2):
        with pytest.raises(BackendError, match="fused attention does not return the lse"):
            attend(*QKV, Dense(16), backend="sdpa", return_lse=True)
    assert len(asked) == 2
    assert not dispatch._chosen


def test_another_thread_s_preference_is_not_taken_for_this_call_s(monkeypatch):
    """A preference that changes between the question and the choice does not spoil what is remembered."""
    dispatch.forget()
    recalled = dispatch.recalled

    def interrupted(*arguments):
        found = recalled(*arguments)
        dispatch._preferences.append("reference")
        return found

    def backend():
        with dispatch.recording() as choices:
            attend(*QKV, Dense(16))
        return choices[0].backend

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_preferences", [None])
        patch.setattr(dispatch, "recalled", interrupted)
        assert backend() == "sdpa"
    assert backend() == "sdpa"
    dispatch.forget()


def other_tables():
    """Pairs of layouts that look alike and see other keys."""
    taken = torch.rand(16, 16) < 0.5
    lists = torch.arange(16).view(1, 1, 16, 1)
    return {
        "routed": [Blocks.from_regions(GRID, 2, torch.tensor([[pair] * 4])) for pair in ([0, 1], [2, 3])],
        "token_sets": [TokenSets(one, keys=16) for one in (lists, lists.flip(2))],
        "token_mask": [TokenMask(one) for one in (taken, ~taken)],
        "permuted": [Blocks.permuted(one, 4) for one in (torch.arange(16), torch.arange(16).view(4, 4).T.flatten())],
        "masked": [Dense(16).restrict(one) for one in (half(16), ~half(16))],
    }


@pytest.mark.parametrize("name", ["routed", "token_sets", "token_mask", "permuted", "masked"])
def test_layouts_that_look_alike_are_computed_each_with_its_own_tables(asked, name):
    pair = other_tables()[name]
    for layout in pair * 2:
        right = attend(*QKV, layout, backend="reference")
        torch.testing.assert_close(attend(*QKV, layout), right, rtol=1e-5, atol=1e-5)
    # The reference was asked for by name, which is a choice of its own.
    assert len(asked) == 2


@contextmanager
def without_chance():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": without_chance,
    "reference": lambda: use_backend("reference"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("state", STATES)
def test_what_was_remembered_elsewhere_changes_nothing(name, state):
    """Equal to the bit, whether a call is the first of its kind in a state or its like was computed before."""
    layout = LAYOUTS[name]()
    q = QKV[0].clone().requires_grad_()
    k = QKV[1].clone().requires_grad_()

    def inside():
        with STATES[state]():
            return attend(q, k, QKV[2], layout).detach().clone()

    dispatch.forget()
    first = inside()
    dispatch.forget()
    outside = attend(q, k, QKV[2], layout).detach()
    assert torch.equal(inside(), first)
    assert torch.equal(attend(q, k, QKV[2], layout).detach(), outside)


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_code_and_eager_code_do_not_share_choices(name):
    layout = LAYOUTS[name]()
    torch.compiler.reset()
    dispatch.forget()
    compiled = torch.compile(lambda *qkv: attend(*qkv, layout), backend="eager", fullgraph=True)
    out = compiled(*QKV)
    assert not dispatch._chosen
    torch.testing.assert_close(out, attend(*QKV, layout))
    torch.testing.assert_close(compiled(*QKV), out)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(*QKV), attend(*QKV, layout))


@pytest.mark.parametrize("name", ["dense", "windows"])
def test_under_vmap_it_is_the_inner_call_that_is_remembered(name):
    layout = LAYOUTS[name]()
    stacked = tuple(torch.stack([one, -one, 2 * one]) for one in QKV)
    for _ in range(2):
        with use_backend("reference"):
            right = torch.stack([attend(*(one[i] for one in stacked), layout) for i in range(3)])
            found = torch.func.vmap(lambda *qkv: attend(*qkv, layout))(*stacked)
        torch.testing.assert_close(found, right)


def test_inputs_that_move_are_asked_about_again(asked):
    for device in ("cpu", "meta", "cpu", "meta"):
        out = attend(*(one.to(device) for one in QKV), Dense(16))
        assert out.device.type == device
    assert len(asked) == 2
