"""A step of training: every parameter learns, and checkpointing changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import attnkit
from attnkit.blocks import DropPath
from attnkit.errors import ShapeError
from attnkit.primitives import HeadGroup


def gradients(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    target = torch.arange(len(x)) % model.num_classes
    F.cross_entropy(model(x), target).backward()
    return {name: one.grad for name, one in model.named_parameters()}


def test_every_parameter_gets_a_finite_gradient(model, images):
    for one in model.modules():
        if isinstance(one, DropPath):
            one.rate = 0.0
    found = gradients(model.train(), images())
    # A hard choice of keys passes no gradient to what made it; the paper trains its predictor by another loss.
    missing = {name for name, one in found.items() if one is None}
    assert missing == {name for name in found if ".predictor." in name}
    assert all(one.isfinite().all() for one in found.values() if one is not None)
    silent = {name for name, one in found.items() if one is not None and not one.any()}
    assert not silent


def test_every_parameter_learns_on_one_pixel(micro, images):
    found = gradients(micro.train(), images(4, 1, 5, 7))
    assert all(one.isfinite().all() for one in found.values() if one is not None)


def test_checkpointing_changes_no_gradient(model, images):
    x = images()
    model.train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for _ in range(2):
        # Dropped paths are drawn from the global generator, which a recomputed block must find as it was.
        torch.manual_seed(3)
        expected = gradients(model, x)
        torch.manual_seed(3)
        found = gradients(twin, x)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(model.named_buffers()))


def test_checkpointing_a_whole_bird_from_outside(images):
    bird = attnkit.build("bigbird_vit_micro", num_classes=5).train()
    twin = copy.deepcopy(bird)
    x, target = images(height=32, width=32), torch.tensor([0, 1])
    F.cross_entropy(bird(x), target).backward()
    F.cross_entropy(checkpoint(twin, x, use_reentrant=False), target).backward()
    expected = {name: one.grad for name, one in bird.named_parameters()}
    torch.testing.assert_close({name: one.grad for name, one in twin.named_parameters()}, expected)


def test_training_draws_other_windows_than_evaluation(images):
    bird = attnkit.build("bigbird_vit_micro", num_classes=5)
    x = images(height=32, width=32)
    with torch.no_grad():
        assert not torch.equal(bird(x), bird(x))
        bird.eval()
        assert torch.equal(bird(x), bird(x))


def test_dropped_paths_rise_from_stage_to_stage():
    model = attnkit.build("biformer_micro", drop_path=0.3)
    rates = [one.rate for one in model.modules() if isinstance(one, DropPath)]
    assert rates == sorted(rates) and rates[0] == 0.0 and rates[-1] == 0.3


def test_a_dropped_path_leaves_the_shortcut(images):
    model = attnkit.build("vit_micro", drop_path=0.999, depth=2, num_classes=5).train()
    block, x = model.blocks[-1], torch.randn(4, 65, 72)
    torch.manual_seed(0)
    out = block.run(x, model.config.grid).x
    assert torch.equal(out, x)


def test_no_training_pass_touches_the_global_generator(micro, images):
    state = torch.random.get_rng_state()
    micro.train()(images(2, 1, 32, 32))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bfloat16_autocast_runs_and_stays_near(micro, images):
    x = images(2, 1, 32, 32)
    exact = micro(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = micro(x)
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).norm() / exact.norm()
    # A mask or route that flips moves more than rounding does.
    assert error < (0.3 if any(chooses(one) for one in micro.modules()) else 0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(micro.train()(x), torch.tensor([1, 2]))
    loss.backward()
    assert all(one.grad.isfinite().all() for one in micro.parameters() if one.grad is not None)


def chooses(module: torch.nn.Module) -> bool:
    return isinstance(module, HeadGroup) and module.options.kind in ("topk_region", "mask_predictor")


def test_a_model_in_half_precision_runs(micro, images):
    logits = micro.bfloat16()(images(2, 1, 32, 32).bfloat16())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_double_precision_agrees_with_single(micro, images):
    x = images(2, 1, 32, 32)
    single = micro(x)
    torch.testing.assert_close(micro.double()(x.double()).float(), single, rtol=1e-3, atol=1e-4)


def test_batch_norm_that_has_nothing_to_average_over_says_so(images):
    model = attnkit.build("biformer_tiny", num_classes=2, **{"stages[*].depth": 1})
    with pytest.raises(ShapeError, match=r"batch norm cannot train on one image that has shrunk to one token, \(1,"):
        model(images(1, 3, 16, 16))
    assert model(images(2, 3, 16, 16)).shape == (2, 2)
    assert model.eval()(images(1, 3, 16, 16)).isfinite().all()
