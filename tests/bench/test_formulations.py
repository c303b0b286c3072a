"""Every formulation computes what attnkit computes, in values and gradients, and all are held to float64."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit.registry import BACKENDS
from attnkit_models.bench.case import OURS
from attnkit_models.bench.guests import GUESTS, guest_backend
from tests.bench.small import SMALL, make_small

LAYERS = [name for name in SMALL if name not in ("mix", "recipe_step", "models")]


@pytest.mark.parametrize("problem", LAYERS)
def test_all_contenders_give_the_same_numbers(problem):
    made = make_small(problem)
    ours = made.contenders[OURS]
    out = ours.forward()
    arriving = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    grads = torch.autograd.grad(out, list(ours.leaves), arriving)
    others = {name: one for name, one in made.contenders.items() if one.same and name != OURS and not one.why_not}
    assert others
    for name, one in others.items():
        theirs = one.forward()
        torch.testing.assert_close(theirs, out, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        for mine, other in zip(grads, torch.autograd.grad(theirs, list(one.leaves), arriving), strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("problem", SMALL)
def test_all_contenders_pass_the_gate(problem):
    made = make_small(problem)
    checked = {name: one.check(one) for name, one in made.contenders.items() if one.check and not one.why_not}
    assert len(checked) >= 2
    for name, errors in checked.items():
        assert set(errors) >= {"output", "gradients"}, name
        assert max(errors.values()) < 1e-9, (name, errors)


def test_dense_attention_is_called_in_several_ways_that_agree():
    dense = make_small("regions").contenders["dense SDPA"]
    outputs = [variant() for variant in dense.variants.values()]
    assert len(outputs) == 2
    torch.testing.assert_close(outputs[0], outputs[1])


def test_dense_attention_of_many_tokens_is_measured_on_a_share(monkeypatch):
    monkeypatch.setattr("attnkit_models.bench.problems.WHOLE", 100)
    dense = make_small("regions").contenders["dense SDPA"]
    assert dense.times == 16
    assert dense.forward().shape[2] == 144 // 16
    assert max(dense.check(dense).values()) < 1e-9


@pytest.mark.parametrize("sides", [(12, 12), (13, 9), (5, 5), (4, 14)])
def test_a_layer_on_biformers_gather_gives_what_attnkit_gives(sides):
    """Also where regions do not divide the map, and where some hold no token."""
    torch.manual_seed(0)
    mix = attnkit.HeadMix(32, [attnkit.TopKRegion(heads=2, regions=3, topk=2, scale="group", lepe=3)]).double()
    x = torch.randn(2, *sides, 32, dtype=torch.float64)
    with guest_backend("biformer_gather"), attnkit.use_backend("biformer_gather"):
        theirs = mix(x)
        assert attnkit.explain(mix, sides).rows[0].backend == "biformer_gather"
    with attnkit.use_backend("reference"):
        torch.testing.assert_close(theirs, mix(x), rtol=1e-10, atol=1e-10)


def test_guests_leave_no_trace_and_are_never_chosen():
    before = dict(BACKENDS)
    mix = attnkit.HeadMix(32, [attnkit.TopKRegion(heads=2, regions=2, topk=1)])
    for name in GUESTS:
        with guest_backend(name):
            assert name in BACKENDS
            assert attnkit.explain(mix, (8, 8)).rows[0].backend not in GUESTS
        assert before == BACKENDS


def test_biformers_gather_says_what_it_cannot_do():
    mix = attnkit.HeadMix(32, [attnkit.Window(heads=2, window=2)])
    with (
        guest_backend("biformer_gather"),
        attnkit.use_backend("biformer_gather"),
        pytest.raises(attnkit.errors.BackendError, match="routed regions"),
    ):
        mix(torch.randn(1, 4, 4, 32))
