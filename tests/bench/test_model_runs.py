"""Whole models: what is compiled, in a graph or in half precision is held to the model that is not."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit_models.bench import model_problems, model_runs
from attnkit_models.bench.case import Setting
from attnkit_models.bench.gate import apart, passes
from attnkit_models.bench.model_problems import images, model_check
from attnkit_models.bench.model_runs import Trainer, Way, built, model_limits

LOW = torch.bfloat16
BATCH = images(2, 32, 0)


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    monkeypatch.setattr(model_runs, "COMPILER", "eager")
    monkeypatch.setattr(model_runs, "captured", lambda call, device: call)


def shallow() -> torch.nn.Module:
    """One block of every kind: a compiler takes seconds for more of the same code."""
    torch.manual_seed(0)
    return attnkit.build("biformer_micro", img_size=32, num_classes=10, **{"stages[*].depth": 1})


def held(trainer: Trainer) -> bool:
    one = trainer.contender(None, same=True)
    return passes(one.check(one), torch.float64, one.limits)


@pytest.mark.parametrize("way", [Way("m", compiled=True), Way("m", graph=True), Way("m", compiled=True, graph=True)])
@pytest.mark.parametrize("low", [None, LOW])
def test_what_computes_the_same_passes(way, low):
    assert held(Trainer(shallow(), BATCH, low, way))


def test_a_compiled_model_with_wrong_numbers_is_red():
    trainer = Trainer(shallow(), BATCH, LOW, Way("m", compiled=True))
    right = trainer.called
    trainer.called = lambda batch: 1.2 * right(batch)
    assert not held(trainer)


def test_right_outputs_with_wrong_gradients_are_red():
    trainer = Trainer(shallow(), BATCH, LOW, Way("m", compiled=True))
    right = trainer.called

    def steeper(batch):
        out = right(batch)
        return out + 0.2 * (out - out.detach())

    trainer.called = steeper
    assert not held(trainer)


def test_a_graph_that_replays_other_numbers_is_red(monkeypatch):
    def stale(call, device):
        other = call()
        return lambda: tuple(one.roll(1) for one in other) if isinstance(other, tuple) else other.roll(1)

    monkeypatch.setattr(model_runs, "captured", stale)
    assert not held(Trainer(built("biformer_micro", 32, 0), BATCH, None, Way("m", graph=True)))


def test_a_model_that_is_wrong_in_half_precision_is_red(monkeypatch):
    setting = Setting(dtype=LOW)
    limits = model_limits(LOW)

    def passed() -> bool:
        found = model_check(Way("qna_vit_micro", compiled=True), setting)
        assert set(limits) & set(found) == {"output beside float32", "gradients beside float32"}
        return passes(found, torch.float64, limits)

    model_problems._half_errors.cache_clear()
    assert passed()

    def spoilt(*given):
        model = built(*given)
        model.register_forward_hook(lambda _, __, out: out * (1.2 if torch.is_autocast_enabled("cpu") else 1.0))
        return model

    monkeypatch.setattr(model_problems, "built", spoilt)
    model_problems._half_errors.cache_clear()
    try:
        assert not passed()
    finally:
        model_problems._half_errors.cache_clear()


def test_distance():
    exact = torch.tensor([3.0, 4.0])
    assert apart(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert apart(torch.tensor([3.0, torch.nan]), exact) == float("inf")
