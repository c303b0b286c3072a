"""Random windows in whole models: several draws in evaluation, schedules in training."""

from __future__ import annotations

import itertools

import pytest
import torch

import attnkit
from attnkit.errors import ConfigError


def bigbird(**overrides):
    torch.manual_seed(0)
    return attnkit.build("bigbird_vit_micro", num_classes=5, **overrides)


def test_logits_are_averaged_over_evaluation_draws(images):
    x = images(2, 3, 32, 32)
    one, two, many = (bigbird(eval_draws=draws).eval() for draws in (1, 2, 8))
    first = one(x)
    second = 2 * two(x) - first
    assert not torch.allclose(first, second)
    # The second draw differs in its windows only.
    assert (first - second).abs().max() < 0.5 * first.abs().max()
    assert torch.equal(many(x), many(x))
    assert not torch.allclose(many(x), two(x))
    # In training the option has no say, and features are those of the first draw.
    torch.testing.assert_close(many.forward_features(x), one.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(many.train()(x), one.train()(x))


def test_draws_do_nothing_without_random_windows(images):
    x = images(2, 3, 32, 32)
    torch.manual_seed(0)
    plain = attnkit.build("vit_micro", num_classes=5).eval()
    torch.manual_seed(0)
    several = attnkit.build("vit_micro", num_classes=5, eval_draws=3).eval()
    torch.testing.assert_close(several(x), plain(x))


def test_several_draws_compile_and_export(images):
    x = images(2, 3, 32, 32)
    model = bigbird(eval_draws=2).eval()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("resample", "kept"), [(1, [False] * 5), (3, [True, True, False, True, True]), (0, [True] * 5)]
)
def test_a_schedule_keeps_the_windows_for_some_passes(images, resample, kept):
    groups = {"stages[*].mix.groups[1].resample": resample}
    model = bigbird(**groups, drop_path=0.0).train()
    with torch.no_grad():
        outs = [model(images(2, 3, 32, 32)) for _ in range(6)]
    assert [torch.equal(one, other) for one, other in itertools.pairwise(outs)] == kept


def test_mistakes():
    with pytest.raises(ConfigError, match="eval_draws=0: must be >= 1"):
        bigbird(eval_draws=0)
    with pytest.raises(ConfigError, match=r"resample=-1\): must be >= 0 training passes, 0 for never"):
        attnkit.RandomWindow(1, 4, resample=-1)
