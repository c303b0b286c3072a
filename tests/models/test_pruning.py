"""Token pruning: masked in training, dropped in evaluation, one function; nothing is kept on the module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import attnkit
from attnkit import CompetingMaskPredictor, Conv, Dense, MaskPredictor, Mix, ThresholdMaskPredictor
from attnkit.errors import ConfigError
from attnkit.kernels import recording
from attnkit.testing import random_tensor, randomize_parameters

KEEP = [1.0, 0.6, 0.6, 0.3]


def made(name="vit_micro", **changes):
    model = attnkit.build(name, **{"num_classes": 5, "keep_tokens": KEEP, **changes})
    return randomize_parameters(model, seed=1).double()


def images(*size, seed=0):
    return random_tensor(2, 3, *(size or (32, 32)), seed=seed)


def as_trained(model):
    """Masks instead of drops; norms as in evaluation."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


MIXES = {
    "dense": Mix((Dense(3),)),
    "budget": Mix((MaskPredictor(3, 64, 0.25, prefix=1),)),
    "threshold": Mix((ThresholdMaskPredictor(3, 64, score=0.3, prefix=1),)),
    "two": Mix((Dense(1), MaskPredictor(2, 64, 0.4))),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("size", [(32, 32), (48, 24), (7, 9)], ids=str)
def test_dropped_tokens_are_masked_tokens(mix, size):
    model, x = made(mix=MIXES[mix]), images(*size).requires_grad_()
    results = []
    for one in (model.eval(), as_trained(model)):
        logits = one(x)
        features, left = one.forward_tokens(x)
        maps = one.forward_intermediates(x, intermediates_only=True)
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
        results.append((logits, features, left, gradient, *maps))
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def test_fewer_tokens_are_really_computed():
    model = made()
    full = made(keep_tokens=())
    with recording() as choices:
        model.eval()(images())
    assert [choice.call.q.shape[2] for choice in choices] == [65, 65, 40, 40]
    assert attnkit.flops(model.float(), 32).total < 0.85 * attnkit.flops(full.float(), 32).total
    with recording() as choices:
        made().train()(images())
    assert [choice.call.q.shape[2] for choice in choices] == [65] * 4


def test_those_stay_that_the_class_token_attends_to_most():
    model, x = made(keep_tokens=[0.5, 0.5, 0.25, 0.25]).eval(), images()
    block = model.blocks[0]
    rows = model.stem(x).flatten(2).mT
    rows = torch.cat([model.cls_token.expand(2, -1, -1), rows], dim=1) + model.pos_embed
    q, k, _ = block.mix.qkv(block.norm1(rows)).view(2, 65, 3, 3, 24).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, :1] @ k.mT / 24**0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    expected = torch.zeros(2, 64, dtype=torch.bool).scatter(1, weights.topk(32).indices, True)
    steps = list(model.steps(x))
    assert torch.equal(steps[0].left(), F.pad(expected, (1, 0), value=True))
    assert [int(step.left().sum()) for step in steps] == [66, 66, 34, 34]
    assert not (steps[2].left() & ~steps[1].left()).any()
    assert steps[0].whole()[~steps[0].left()].abs().sum() == 0


def test_a_token_that_is_gone_does_not_matter():
    model, x = made().eval(), images()
    features, left = model.forward_tokens(x)
    assert (features[~left] - model.norm.bias).abs().max() < 1e-12
    assert (features[left] - model.norm.bias).abs().max() > 1e-3


@pytest.mark.parametrize("train", [False, True])
def test_what_is_told_about_tokens_is_of_one_type_at_every_image_size(train):
    model = made().train(train)
    for size in ((4, 4), (8, 4), (32, 32)):
        features, left = model.forward_tokens(images(*size))
        assert left.dtype == torch.bool and left.shape == features.shape[:2]
        assert left[:, 0].all() and left.all() == (size == (4, 4))
    assert made(keep_tokens=(1.0,) * 4).train(train).forward_tokens(images())[1].all()
    assert made(keep_tokens=()).train(train).forward_tokens(images())[1] is None


def test_mixes_that_need_all_tokens_are_masked():
    """The same in evaluation as in training."""
    for mix in (Mix((Conv(1), Dense(2))), Mix((CompetingMaskPredictor(3, 64, 0.25, prefix=1),))):
        model, x = made(mix=mix), images()
        with recording() as choices:
            found = model.eval()(x)
        assert {choice.call.q.shape[2] for choice in choices} == {65}
        assert torch.equal(as_trained(model)(x), found)


def test_no_state_is_left_behind():
    model, x = made("sparsifiner_micro").eval(), images()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    small = model(images(12, 16))
    first = model(x)
    assert torch.equal(model(images(12, 16)), small) and torch.equal(model(x), first)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_compiled_exported_and_checkpointed(training):
    model = made("sparsifiner_micro").float()
    model = as_trained(model) if training else model.eval()
    x = images().float()
    right = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), right)
    if not training:
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), right)
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    for name, one in gradients[0].items():
        assert (one is None) == (gradients[1][name] is None)
        if one is not None:
            torch.testing.assert_close(gradients[1][name], one)


def test_a_mix_for_each_block():
    mixes = (Mix((Dense(3),)), Mix((MaskPredictor(3, 64, 0.25),)), Mix((Dense(3),)), Mix((Conv(3),)))
    model = attnkit.build("vit_micro", mix=mixes)
    assert [block.mix.options[0].kind for block in model.blocks] == ["dense", "mask_predictor", "dense", "conv"]
    assert attnkit.build(model.config.to_dict()).config == model.config
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    changed = attnkit.build(model.config, **{"mix[1].groups[0].keep": 0.5})
    assert changed.config.mix[1].groups[0].keep == 0.5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep_tokens": [1.0, 0.5]}, r"keep_tokens=\[1.0, 0.5\]: needs one share for each of 4 blocks"),
        ({"keep_tokens": [1.0, 0.5, 0.6, 0.5]}, r"tokens that are gone do not come back, so shares must not grow"),
        ({"keep_tokens": [1.0, 0.5, 0.0, 0.0]}, r"shares must be in \(0, 1\]"),
        ({"keep_tokens": KEEP, "global_pool": "avg"}, r"goes with class_token=True, and with neither"),
        ({"keep_tokens": KEEP, "aux_head": True}, r"goes with class_token=True, and with neither"),
        ({"keep_tokens": KEEP, "class_token": False, "global_pool": ""}, r"goes with class_token=True"),
        ({"mix": [{"groups": [{"kind": "dense", "heads": 3}]}] * 3}, r"3 mixes for 4 blocks; give one for each"),
        (
            {"mix": [{"groups": [{"kind": "conv", "heads": 3, "stride": 2}]}] * 4},
            r"the blocks of an isotropic model keep their map",
        ),
    ],
    ids=str,
)
def test_mistakes(changes, says):
    with pytest.raises(ConfigError, match=says):
        attnkit.build("vit_micro", **changes)


def test_a_mix_without_softmax_has_nothing_to_choose_by():
    model = attnkit.build("vit_micro", mix=Mix((Conv(3),)), keep_tokens=KEEP).eval()
    with pytest.raises(ConfigError, match="chooses by the class token's attention, but no group of the mix has any"):
        model(torch.zeros(1, 3, 32, 32))
