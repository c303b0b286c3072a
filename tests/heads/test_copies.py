"""Copies of a mix, made in any way, give what the original gives."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from attnkit import Grid, HeadMix
from attnkit.testing import random_tensor

GRID = Grid(4, 6, prefix=1)


def reloaded(mix):
    other = HeadMix(mix.dim, mix.options, head_dim=mix.head_dim)
    other.load_state_dict(mix.state_dict())
    return other.train(mix.training)


def saved(mix):
    buffer = io.BytesIO()
    torch.save(mix, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def from_dicts(mix):
    other = HeadMix(mix.dim, [group.to_dict() for group in mix.options], head_dim=mix.head_dim)
    buffer = io.BytesIO()
    torch.save(mix.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other.train(mix.training)


COPIES = {
    "pickled": lambda mix: pickle.loads(pickle.dumps(mix)),
    "deep-copied": copy.deepcopy,
    "reloaded": reloaded,
    "saved": saved,
    "rebuilt from plain dicts": from_dicts,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_copies_agree(random_mix, sample, how, training):
    mix = random_mix(sample).train(training)
    x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32)
    # Two passes first, so that a count of draws has to travel too.
    mix(x, GRID)
    mix(x, GRID)
    other = COPIES[how](mix)
    for _ in range(2):
        assert torch.equal(other(x, GRID), mix(x, GRID))
    assert all(one is not two for one, two in zip(mix.parameters(), other.parameters(), strict=True))


def test_options_can_be_pickled_and_compared(sample):
    other = pickle.loads(pickle.dumps(sample))
    assert other == sample
    assert hash(other) == hash(sample)
    assert copy.deepcopy(sample) == sample


@pytest.mark.parametrize("backend", ["reference", "sdpa,reference"])
def test_half_precision_and_autocast_are_close(random_mix, sample, backend):
    from attnkit import use_backend

    if sample.kind in ("topk_region", "mask_predictor"):
        # What rounds to another choice is no error; with the full budget there is no choice.
        full = {"topk_region": {"topk": 4}, "mask_predictor": {"keep": 1.0}}[sample.kind]
        sample = type(sample).from_dict({**sample.to_dict(), **full})
    mix = random_mix(sample)
    x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32)
    with torch.no_grad(), use_backend(backend):
        exact = copy.deepcopy(mix).double()(x.double(), GRID)
        size = float(exact.abs().max())
        single = mix(x, GRID)
        torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-5 * size)
        with torch.autocast("cpu", torch.bfloat16):
            cast = mix(x, GRID)
        assert cast.dtype == torch.bfloat16
        assert float((cast.double() - exact).abs().max()) < 0.06 * size
        for dtype, share in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
            half = copy.deepcopy(mix).to(dtype)(x.to(dtype), GRID)
            assert half.dtype == dtype
            assert float((half.double() - exact).abs().max()) < share * size


def test_gradients_under_autocast_are_finite_and_close(random_mix, sample):
    if sample.kind in ("topk_region", "mask_predictor"):
        full = {"topk_region": {"topk": 4}, "mask_predictor": {"keep": 1.0}}[sample.kind]
        sample = type(sample).from_dict({**sample.to_dict(), **full})
    mix = random_mix(sample)
    found = []
    for enabled in (False, True):
        x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32, grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = mix(x, GRID)
        found.append(torch.autograd.grad(out.float().sum(), x)[0])
    assert found[1].isfinite().all()
    assert float((found[0] - found[1]).abs().max()) < 0.08 * float(found[0].abs().max())
