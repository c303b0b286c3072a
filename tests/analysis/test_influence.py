"""reach: what can influence what, by gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnkit
from attnkit import Grid
from attnkit.analysis import reach
from attnkit.analysis.scene import scene_mix, scene_tokens
from attnkit.analysis.sight import Sight
from attnkit.analysis.tracing import unmarked, visits
from attnkit.errors import ConfigError, ShapeError


@pytest.mark.parametrize(
    "options",
    [
        attnkit.Window(heads=2, window=3),
        attnkit.Window(heads=2, window=4, partition="shifted"),
        attnkit.CrossShaped(heads=2, stripe=2),
        attnkit.Neighborhood(heads=2, kernel=3),
        attnkit.RandomWindow(heads=2, window=5),
        attnkit.PooledGlobal(heads=2, pool=2),
    ],
    ids=repr,
)
def test_one_layer_reaches_what_is_seen(options):
    grid = Grid(5, 6)
    mix = scene_mix([options], grid)
    with unmarked(mix):
        (visit,) = visits(mix, (scene_tokens(grid, mix.dim), grid))
    sight = Sight(visit)
    seen = torch.stack([sight.seen(query) > 0 for query in range(30)])
    assert torch.equal(reach(options, grid), seen | torch.eye(30, dtype=torch.bool))


def test_layers_reach_further():
    near = reach(attnkit.Conv(heads=2, kernel=3), (7, 7), layers=2)[24].view(7, 7)
    assert near.sum() == 25 and near[1:6, 1:6].all()
    window = attnkit.Window(heads=2, window=4)
    assert not reach(window, 8, layers=4).all()
    assert reach([attnkit.CrossShaped(heads=2, stripe=1)], 6, layers=2).all()


def test_random_windows_of_two_layers_differ():
    one, two = (reach(attnkit.RandomWindow(heads=2, window=6), 6, layers=n).float().mean() for n in (1, 2))
    assert two > 2 * one


def test_prefix_tokens_connect_everything_in_two_layers():
    grid = Grid(4, 4, prefix=1)
    assert not reach(attnkit.Window(heads=2, window=2), grid).all()
    assert reach(attnkit.Window(heads=2, window=2), grid, layers=2).all()


def test_some_outputs_only():
    options = attnkit.RandomWindow(heads=2, window=5)
    everything = reach(options, (5, 6), layers=2)
    assert torch.equal(reach(options, (5, 6), layers=2, outputs=[7, 0, 29]), everything[[7, 0, 29]])
    assert reach(options, (5, 6), outputs=range(3, 5)).shape == (2, 30)
    model = attnkit.build("bigbird_vit_micro", img_size=16, in_chans=1, num_classes=0)
    assert reach(model, 16, outputs=(3,)).shape == (1, 16, 16)
    for outputs in ([30], [-1], [], "0", 3, [0.5], [True]):
        with pytest.raises(ConfigError, match="output tokens, 0 to 29"):
            reach(options, (5, 6), outputs=outputs)


def test_modules_and_models():
    mix = attnkit.HeadMix(16, [attnkit.Window(heads=2, window=2)])
    assert reach(mix, 4)[0].view(4, 4).nonzero().amax(0).tolist() == [1, 1]
    block = attnkit.Block(16, [attnkit.Dense(heads=2)])
    assert reach(block, (2, 3)).all()
    model = attnkit.build("bigbird_vit_micro", img_size=16, in_chans=1, num_classes=0)
    assert reach(model, 16).shape == (4, 16, 16)


@pytest.mark.parametrize(
    ("what", "layers", "error", "words"),
    [
        ([attnkit.Dense(heads=2)], 0, ConfigError, "layers"),
        ("dense", 1, ConfigError, "needs a module"),
        (nn.Conv2d(3, 4, 1), 1, ConfigError, "forward_features"),
        ([attnkit.LearnedQuery(heads=2, kernel=3, stride=2)], 2, ShapeError, "2 times"),
    ],
)
def test_mistakes_are_named(what, layers, error, words):
    with pytest.raises(error, match=words):
        reach(what, 4, layers)
