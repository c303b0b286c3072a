"""Derivatives in forward mode and by torch.func: hand-written backward passes are left to other backends."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from attnkit import Grid, attend
from attnkit.errors import BackendError
from attnkit.kernels import dispatch, recording, transforms, use_backend
from attnkit.kernels.ops.token_sets import TOKEN_SETS
from attnkit.kernels.triton import backend as triton_backend
from attnkit.layouts import Blocks, Stencil, TokenMask, TokenSets
from attnkit.testing import random_qkv, random_tensor

pytestmark = [
    # Of PyTorch's own: what it has under vmap, and what its forward mode loads.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning"),
]
TOKENS = 16
LAYOUTS = {
    "stencil": lambda: Stencil(Grid(4, 4), 3),
    "blocks": lambda: Blocks.windows(Grid(4, 4), 2),
    "token_mask": lambda: TokenMask(torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()),
    "token_sets": lambda: TokenSets((torch.arange(TOKENS)[:, None] + torch.arange(3)) % TOKENS, TOKENS),
}
QKV = random_qkv((TOKENS, TOKENS), batch=2, heads=2)
TANGENTS = tuple(random_tensor(*one.shape, seed=seed) for seed, one in enumerate(QKV, start=7))


def in_forward_mode(function):
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(one, tangent) for one, tangent in zip(QKV, TANGENTS, strict=True)))
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        return tangent


WAYS = {
    "jvp": lambda function: torch.func.jvp(function, QKV, TANGENTS)[1],
    "forward mode": in_forward_mode,
    "grad": lambda function: torch.func.grad(lambda q: function(q, *QKV[1:]).square().sum())(QKV[0]),
    "vjp": lambda function: torch.func.vjp(function, *QKV)[1](TANGENTS[0])[1],
    "jacrev": lambda function: torch.func.jacrev(lambda q: function(q, *QKV[1:])[0, 0, 5])(QKV[0]),
    "per sample": lambda function: torch.vmap(torch.func.grad(lambda *qkv: function(*qkv).square().sum()))(
        *(one[:, None] for one in QKV)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_other_ways_of_differentiating(kind, way):
    """Right also where a call that is alike was chunked before, and chunked again after."""
    layout = LAYOUTS[kind]()
    dispatch.forget()

    def plain():
        with recording() as choices, use_backend("chunked,auto"):
            attend(*QKV, layout)
        return choices[0].backend

    assert plain() == "chunked"
    with use_backend("chunked,auto"):
        found = WAYS[way](lambda *qkv: attend(*qkv, layout))
    right = WAYS[way](lambda *qkv: attend(*qkv, layout, backend="reference"))
    assert right.abs().amax() > 0
    torch.testing.assert_close(found, right)
    assert plain() == "chunked"
    with pytest.raises(BackendError, match="backward passes are written by hand"):
        WAYS[way](lambda *qkv: attend(*qkv, layout, backend="chunked"))


@pytest.mark.parametrize("way", ["jvp", "grad"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_compiled_derivatives(kind, way):
    layout = LAYOUTS[kind]()

    def derivative(q, k, v):
        def function(q):
            return attend(q, k, v, layout)

        if way == "jvp":
            return torch.func.jvp(function, (q,), (TANGENTS[0],))[1]
        return torch.func.grad(lambda q: function(q).square().sum())(q)

    with use_backend("chunked,auto"):
        found = torch.compile(derivative, fullgraph=True, backend="aot_eager")(*QKV)
    with use_backend("reference"):
        torch.testing.assert_close(found, derivative(*QKV))


def test_constant_results_are_marked_as_pytorch_marks_them():
    marked = vars(torch.compiler.assume_constant_result(lambda: True))
    assert marked
    for one in (transforms._constant_transformed, transforms._constant_differentiated, triton_backend._capability):
        assert {name: vars(one)[name] for name in marked} == marked


@pytest.mark.parametrize("way", ["jvp", "forward mode", "grad", "vjp"])
def test_an_operator_refuses_rather_than_being_silently_constant(way):
    seen = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    with pytest.raises(BackendError, match="attnkit::token_sets has a backward pass only"):
        WAYS[way](lambda *qkv: TOKEN_SETS.op(*qkv, seen, None, None, 0, 0, 1.0, None)[0])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_vmap_alone_is_chunked(kind):
    layout = LAYOUTS[kind]()
    stacked = [torch.stack([one, -one]).requires_grad_() for one in QKV]

    def answer(backend):
        out = torch.vmap(lambda *qkv: attend(*qkv, layout, backend=backend))(*stacked)
        return out, *torch.autograd.grad(out.square().sum(), stacked)

    for found, right in zip(answer("chunked"), answer("reference"), strict=True):
        torch.testing.assert_close(found, right)
