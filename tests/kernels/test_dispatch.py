"""Which backend runs, what wins over what, and what is said about the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnkit
from attnkit import Grid, attend, use_backend
from attnkit.errors import BackendError
from attnkit.kernels import AttendCall, Backend, dispatch, recording
from attnkit.layouts import Blocks, Dense, Stencil, TokenMask
from attnkit.registry import BACKENDS, load
from attnkit.testing import random_qkv

GRID = Grid(8, 8)
# Large enough for fetching to pay off by far, whatever the estimates are fitted to.
LARGE = Grid(32, 32)


def backend_of(layout=None, **extra):
    """Name of the backend that a call ran on."""
    layout = Dense(64) if layout is None else layout
    with recording() as choices:
        attend(*random_qkv((layout.num_queries, layout.num_keys), heads=2), layout, **extra)
    assert len(choices) == 1
    return choices[0].backend


def test_without_a_wish_the_cheapest_that_can():
    assert backend_of() == "sdpa"
    assert backend_of(Blocks.windows(LARGE, 8)) == "gather"
    assert backend_of(TokenMask(torch.ones(64, 64, dtype=torch.bool))) == "sdpa"
    assert backend_of(return_lse=True) == "reference"
    assert backend_of(gain=torch.ones(1, 1, 1, 1)) == "reference"
    for layout in (Dense(64), Blocks.windows(GRID, 2), Stencil(GRID, 3)):
        call = AttendCall(*random_qkv((64, 64)), layout, 1.0)
        able = [name for name, target in BACKENDS.items() if target and not dispatch.backend_named(name).why_not(call)]
        costs = {name: dispatch.backend_named(name).cost(call) for name in able}
        assert dispatch.choose(call) == min(able, key=costs.__getitem__)


@pytest.fixture
def on_cuda():
    """Calls of tensors that say they lie on a GPU, and hold nothing."""
    with FakeTensorMode():
        yield lambda layout, **extra: AttendCall(
            *(torch.empty(1, 2, layout.num_queries, 8, device="cuda") for _ in range(3)), layout, 1.0, **extra
        )


def test_off_the_cpu_no_cost_decides(on_cuda, monkeypatch):
    def no_cost(self, call):
        raise AssertionError("nothing was measured there")

    for target in filter(None, BACKENDS.values()):
        monkeypatch.setattr(load(target), "cost", no_cost)
    chosen = {
        "dense": on_cuda(Dense(64)),
        "windows": on_cuda(Blocks.windows(LARGE, 8)),
        "stencil": on_cuda(Stencil(GRID, 3)),
        "mask": on_cuda(TokenMask(torch.ones(64, 64, dtype=torch.bool, device="cuda"))),
        "lse": on_cuda(Dense(64), return_lse=True),
    }
    named = {name: dispatch.choose(call) for name, call in chosen.items()}
    assert named == {"dense": "sdpa", "windows": "triton", "stencil": "triton", "mask": "triton", "lse": "reference"}
    said = dispatch.why_not_others(chosen["stencil"], "gather")
    assert said["sdpa"] == ("it could run; on cuda the first of triton, gather, sdpa, reference that can does",)
    assert said["chunked"] == ("q lies on cuda:0, where the operators of stencils are the triton backend's",)
    with use_backend("gather,auto"):
        assert dispatch.choose(chosen["stencil"]) == "gather" and dispatch.choose(chosen["dense"]) == "sdpa"


def test_off_the_cpu_triton_is_the_first_for_sparse_layouts_and_others_backends_are_asked_for(on_cuda, monkeypatch):
    class Willing(Backend):
        name = "willing"

        def why_not(self, call):
            return ()

        def cost(self, call):
            return 0.0

        def run(self, call):
            raise NotImplementedError

    for name in ("triton", "mine"):
        monkeypatch.setitem(BACKENDS, name, "here")
        monkeypatch.setitem(dispatch._backends, name, Willing())
    sparse, dense = on_cuda(Blocks.windows(GRID, 4)), on_cuda(Dense(64))
    assert dispatch.choose(sparse) == "triton" and dispatch.choose(dense) == "sdpa"
    assert dispatch.choose(sparse, "mine") == "mine"
    assert dispatch.choose(AttendCall(*random_qkv((64, 64)), Dense(64), 1.0)) in ("triton", "mine")


def test_the_argument_wins_over_the_context_manager_and_that_over_the_environment(monkeypatch):
    monkeypatch.setattr(dispatch, "_preferences", ["gather"])
    layout = Blocks.windows(GRID, 4)
    assert backend_of(layout) == "gather"
    with use_backend("sdpa"):
        assert backend_of(layout) == "sdpa"
        assert backend_of(layout, backend="reference") == "reference"
        with use_backend("reference"):
            assert backend_of(layout) == "reference"
            with use_backend(None):
                assert backend_of() == "sdpa"
            assert backend_of(layout) == "reference"
        assert backend_of(layout) == "sdpa"
    assert backend_of(layout) == "gather"


def test_auto_may_stand_behind_other_names():
    assert backend_of(Blocks.windows(GRID, 4), backend="gather,auto") == "gather"
    # Dense layouts are nothing to gather.
    assert backend_of(backend="gather,auto") == "sdpa"
    with use_backend("gather, auto"):
        assert backend_of(return_lse=True) == "reference"
    with use_backend("auto,gather"):
        assert backend_of(Blocks.windows(LARGE, 8)) == "gather" and backend_of() == "sdpa"


def test_auto_returns_to_the_automatic_choice(monkeypatch):
    monkeypatch.setattr(dispatch, "_preferences", ["reference"])
    assert backend_of(backend="auto") == "sdpa"
    with use_backend("auto"):
        assert backend_of() == "sdpa"
    assert backend_of() == "reference"


def test_an_error_inside_leaves_the_setting_as_it_was():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        1 / 0  # noqa: B018
    assert backend_of() == "sdpa"


def test_several_names_are_tried_in_order():
    assert backend_of(backend="gather,reference") == "reference"
    assert backend_of(backend="reference, gather") == "reference"
    assert backend_of(Blocks.windows(GRID, 2), backend="gather,reference") == "gather"
    with use_backend("gather,sdpa"):
        assert backend_of() == "sdpa"


def in_new_process(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(Path(attnkit.__file__).parents[1]), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    code = """
import torch
from attnkit import Grid, attend
from attnkit.layouts import Blocks

layout, x = Blocks.windows(Grid(4, 4), 2), torch.randn(1, 1, 16, 2)
compiled = torch.compile(lambda x: attend(x, x, x, layout), fullgraph=True, backend="eager")
found = compiled(x)
torch.testing.assert_close(found, attend(x, x, x, layout))
"""
    in_new_process(code)


def test_the_environment_is_read_once():
    code = """
import os
import torch
from attnkit import attend, use_backend
from attnkit.kernels import recording
from attnkit.layouts import Dense

def ran(**extra):
    with recording() as choices:
        attend(*(torch.ones(1, 1, 2, 2) for _ in range(3)), Dense(2), **extra)
    return choices[0].backend

os.environ["ATTNKIT_BACKEND"] = "gather"
assert ran() == "reference", ran()
assert ran(backend="sdpa") == "sdpa"
with use_backend("sdpa"):
    assert ran() == "sdpa"
with use_backend(None):
    assert ran() == "sdpa"
"""
    in_new_process(code, ATTNKIT_BACKEND="reference")


def test_a_misspelt_environment_is_an_error_at_the_first_call(monkeypatch):
    monkeypatch.setattr(dispatch, "_preferences", ["sdap"])
    with pytest.raises(BackendError, match=r"unknown backend 'sdap'; did you mean 'sdpa'"):
        backend_of()


def test_who_was_asked_for_and_cannot_never_passes_the_work_on():
    q, k, v = random_qkv((64, 64))
    with pytest.raises(BackendError) as caught:
        attend(q, k, v.float(), Dense(64), backend="sdpa", gain=q.new_ones(1, 1, 1, 1), return_lse=True)
    message = str(caught.value)
    for reason in ("a gain multiplies", "return_lse=True", "q and k are torch.float64 but v is torch.float32"):
        assert reason in message
    assert message.startswith("backend 'sdpa' cannot run this call: ")
    assert message.endswith("(q (1, 1, 64, 4), v (1, 1, 64, 4), torch.float64, cpu, dense layout)")
    with use_backend("gather"), pytest.raises(BackendError, match="a dense layout has no list of keys to fetch"):
        attend(q, k, v, Dense(64))


def test_several_that_cannot_all_say_why():
    q, k, v = random_qkv((4, 4))
    with pytest.raises(
        BackendError, match=r"backend 'gather' cannot .* \| backend 'flex' cannot .*float64.* \| backend 'triton'"
    ):
        attend(q, k, v, Dense(4), backend="gather,flex,triton")


def test_planned_backends_say_so(monkeypatch):
    monkeypatch.setitem(BACKENDS, "planned", "")
    with pytest.raises(BackendError, match="it is planned but not part of this version"):
        backend_of(backend="planned")


@pytest.mark.parametrize(
    ("name", "near"),
    [("refrence", "reference"), ("Gather", "gather"), ("flexx", "flex"), ("sdpa,gathr", "gather")],
)
def test_unknown_names_are_refused_at_once(name, near):
    with pytest.raises(
        BackendError, match=rf"unknown backend .*; did you mean '{near}'.*backends: auto, sdpa, triton, chunked"
    ):
        use_backend(name)
    with pytest.raises(BackendError, match=rf"did you mean '{near}'"):
        backend_of(backend=name)


@pytest.mark.parametrize("name", [3, True, ["sdpa"], ""])
def test_names_that_are_no_names(name):
    with pytest.raises(BackendError, match="unknown backend"):
        use_backend(name)


def test_recording_says_why_not_the_others():
    layout, qkv = Blocks.windows(LARGE, 8), random_qkv((1024, 1024))
    with recording() as outer:
        attend(*qkv, layout)
        with recording() as inner:
            attend(*qkv, layout, backend="reference")
    assert [choice.backend for choice in outer] == ["gather", "reference"]
    assert [choice.backend for choice in inner] == ["reference"]
    automatic, asked = outer
    assert set(automatic.reasons) == set(BACKENDS) - {"gather"}
    assert all(reasons for reasons in automatic.reasons.values())
    assert automatic.reasons["sdpa"][0] == "it could run; no times were measured to compare it by"
    with recording() as found:
        attend(*(one.float() for one in qkv), layout)
    assert "it could run, in about " in found[0].reasons["sdpa"][0]
    assert automatic.reasons["xformers"][0].endswith("and q lies on cpu; move q, k and v to a GPU")
    assert automatic.reasons["triton"][0].startswith("q lies on cpu, and its kernels are for GPUs; move q, k and v")
    assert any("float64" in reason for reason in automatic.reasons["flex"])
    assert asked.reasons["gather"][0].endswith(", but 'reference' was asked for")
    attend(*qkv, layout)
    assert len(outer) == 2


def test_backends_keep_to_their_interface():
    for name, target in BACKENDS.items():
        if target:
            backend = dispatch.backend_named(name)
            assert isinstance(backend, Backend)
            assert backend.name == name
            assert backend is dispatch.backend_named(name)


def test_refusals_look_at_no_values():
    """On the meta device there are no values: asking must not fail there, nor may the choice be another."""
    for layout in (Dense(64), Stencil(GRID, 3), Blocks.windows(GRID, 2, device="meta")):
        q, k, v = (torch.ones(1, 2, 64, 4, device="meta", dtype=torch.float64) for _ in range(3))
        there = AttendCall(q, k, v, layout, 1.0)
        for name, target in BACKENDS.items():
            if target:
                dispatch.backend_named(name).why_not(there)
        here = AttendCall(*random_qkv((64, 64), heads=2), layout, 1.0)
        assert dispatch.choose(there) == dispatch.choose(here)
        assert attend(q, k, v, layout).shape == (1, 2, 64, 4)
