"""The safety net of the test suite itself."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch


def module_named(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    source = """
import torch

def allocated(dtype=torch.float32):
    like = torch.zeros(3, dtype=dtype)
    return torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3)

def unwritten(x):
    out = torch.empty_like(x)
    out.copy_(x + x.new_empty(2, 3).zero_())
    return out * torch.empty(3).fill_(2.0)
"""
    exec(source, module.__dict__)
    return module


@pytest.fixture
def importable(monkeypatch) -> types.ModuleType:
    """A module that Dynamo can import again by its name, as that of torch 2.10 does."""
    module = module_named("attnkit.somewhere")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_attnkit_code_gets_nan_from_uninitialised_memory():
    inside = module_named("attnkit.somewhere")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64):
        assert all(tensor.isnan().all() for tensor in inside.allocated(dtype))
    for dtype in (torch.int64, torch.uint8):
        assert all((tensor == torch.iinfo(dtype).max).all() for tensor in inside.allocated(dtype))
    assert all(tensor.all() for tensor in inside.allocated(torch.bool))


def test_what_is_poisoned_can_still_be_a_parameter():
    inside = module_named("attnkit_models.somewhere")
    exec("made = torch.empty(2, requires_grad=True)", inside.__dict__)
    assert inside.made.isnan().all()
    assert inside.made.is_leaf and inside.made.requires_grad


def test_other_code_is_left_alone(monkeypatch):
    def refuse(tensor):
        raise AssertionError("poisoned")

    monkeypatch.setitem(torch.empty.__globals__, "poison", refuse)
    module_named("elsewhere").allocated()
    torch.nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="poisoned"):
        module_named("attnkit").allocated()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_poisoned_code_still_compiles_to_one_graph(backend, importable):
    x = torch.randn(2, 3)
    function = importable.unwritten
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), function(x))


def test_poisoned_code_still_exports(importable):
    class Wrapped(torch.nn.Module):
        def forward(self, x):
            return importable.unwritten(x)

    x = torch.randn(2, 3)
    for strict in (False, True):
        assert torch.equal(torch.export.export(Wrapped(), (x,), strict=strict).module()(x), 2 * x)


def test_warnings_are_errors():
    with pytest.raises(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_poisoned_code_still_allocates_where_it_is_told_to():
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in module_named("attnkit.somewhere").allocated())
        # More than any machine has.
        assert torch.nn.Linear(10**7, 10**7).weight.is_meta
