"""What a layer costs beside its arithmetic, in operators, which do not depend on the machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnkit import Dense, Grid, HeadMix, Neighborhood, PooledGlobal, RandomWindow, Window
from attnkit.kernels import AttendCall
from attnkit.layouts import Dense as DenseLayout
from attnkit.layouts import RelativeTable, cache
from attnkit.testing import random_qkv

GRID = Grid(4, 6, prefix=1)
COPIES = {"copy_", "clone", "cat", "stack", "_to_copy", "contiguous", "repeat"}


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class HandWritten(nn.Module):
    """Attention as everyone writes it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads

    def forward(self, x, grid):
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


def operators(layer, *, backward=False):
    x = torch.randn(2, GRID.tokens, 16, requires_grad=backward)
    with torch.set_grad_enabled(backward), Operators() as found:
        out = layer(x, GRID)
        if backward:
            out.sum().backward()
    return found.names


@pytest.mark.parametrize("backward", [False, True])
def test_a_dense_mix_runs_the_operators_of_a_hand_written_layer(backward):
    ours = operators(HeadMix(16, [Dense(heads=4)]), backward=backward)
    assert ours == operators(HandWritten(16, 4), backward=backward)
    assert backward or not COPIES & set(ours)


def test_several_groups_are_joined_by_one_copy():
    alone = operators(HeadMix(16, [Dense(heads=4)]))
    mixed = operators(HeadMix(16, [Dense(heads=1), Dense(heads=3)]))
    assert [name for name in mixed if name in COPIES] == ["cat"]
    # Twice the group's own, and what splits the columns and joins them.
    shared = alone.count("addmm")
    assert len(mixed) <= 2 * len(alone) - shared + 2


@pytest.mark.parametrize("heads", [[1, 3], [1, 1, 2], [1, 1, 1, 1]])
def test_however_many_groups_there_are_one_copy_joins_them_each_way(heads):
    layer = HeadMix(16, [Dense(heads=count) for count in heads])
    names = operators(layer, backward=True)
    assert [name for name in names if name in COPIES] == ["cat", "cat"]


SIZES_ONLY = {
    "window": Window(heads=4, window=2),
    "shifted": Window(heads=4, window=2, partition="shifted"),
    "padded": Window(heads=4, window=5),
    "random": RandomWindow(heads=4, window=5),
    "neighborhood": Neighborhood(heads=4, kernel=3),
    "pooled": PooledGlobal(heads=4, pool=2),
}


@pytest.mark.parametrize("name", SIZES_ONLY)
def test_what_depends_on_sizes_only_is_made_in_the_first_call(name):
    layer = HeadMix(16, [SIZES_ONLY[name]]).eval()
    cache.forget()
    making = {"arange", "ones", "zeros", "full", "scatter", "gather", "sort", "any", "_local_scalar_dense"}
    assert making & set(operators(layer))
    assert not making & set(operators(layer))


def test_needs_grad_sees_every_tensor():
    q, k, v = random_qkv((25, 25))
    bias = q.new_zeros(1, 1, 1, 1, requires_grad=True)
    table = RelativeTable(q.new_zeros(1, 3, 3, requires_grad=True), GRID)
    for extra in ({"bias": bias}, {"gain": bias}, {"bias": table}, {"gain": table}):
        call = AttendCall(q, k, v, DenseLayout(25), 1.0, **extra)
        assert call.needs_grad
        with torch.no_grad():
            assert not call.needs_grad
    assert not AttendCall(q, k, v, DenseLayout(25), 1.0).needs_grad
