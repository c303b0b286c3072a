"""HeadMix: groups side by side on one projection."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnkit
from attnkit import Block, Conv, Dense, Grid, HeadMix, LearnedQuery, Mix, RandomWindow, TopKRegion
from attnkit.primitives import HeadGroup, HeadOutput
from attnkit.testing import random_options, random_tensor
from attnkit.testing.strategies import grids, seeds

GRID = Grid(3, 4, prefix=1)


def alone(mix, number):
    """One group of a mix as a mix of its own, with its share of the weights."""
    options, width = mix.options[number], mix.head_dim
    single = HeadMix(mix.dim, [options], head_dim=width, out_dim=mix.out_dim, proj_bias=False).to(mix.proj.weight)
    single.eval()
    single.groups[0].load_state_dict(mix.groups[number].state_dict())
    if options.kind == "random_window":
        single.groups[0].place = mix.groups[number].place
    sizes = [one.q + one.k + one.v for one in mix.columns]
    rows = slice(sum(sizes[:number]), sum(sizes[: number + 1]))
    columns = slice(*(width * sum(group.heads for group in mix.options[:end]) for end in (number, number + 1)))
    with torch.no_grad():
        if single.qkv is not None:
            single.qkv.weight.copy_(mix.qkv.weight[rows])
            single.qkv.bias.copy_(mix.qkv.bias[rows])
        single.proj.weight.copy_(mix.proj.weight[:, columns])
    return single


@given(
    names=st.lists(st.sampled_from(attnkit.list_primitives()), min_size=1, max_size=4),
    grid=grids(max_height=5, max_width=5),
    seed=seeds(),
)
def test_a_mix_is_the_sum_of_its_groups(random_mix, names, grid, seed):
    """Groups do not see each other: every mix of primitives is each group alone, projected and added."""
    predictors = ("mask_predictor", "threshold_mask_predictor", "competing_mask_predictor", "mask_reconstruction")
    fixed = {**{name: {"prefix": 0} for name in predictors}, "conv": {"stride": 1}, "learned_query": {"stride": 1}}
    fixed["learned_upsample"] = {"scale": 1}
    groups = [
        random_options(name, seed=seed + at, lepe_on="v", **fixed.get(name, {}))
        if hasattr(attnkit.registry.primitive_class(name), "lepe_on")
        else random_options(name, seed=seed + at, **fixed.get(name, {}))
        for at, name in enumerate(names)
    ]
    mix = random_mix(groups, seed=seed, dim=6).double()
    x = random_tensor(2, grid.tokens, 6, seed=seed)
    expected = sum(alone(mix, number)(x, grid) for number in range(len(groups))) + mix.proj.bias
    torch.testing.assert_close(mix(x, grid), expected, rtol=1e-10, atol=1e-10)


def test_maps_and_tokens_are_the_same(random_mix, sample):
    mix = random_mix(sample)
    x = random_tensor(2, 4, 6, 8, seed=0, dtype=torch.float32)
    found = mix(x)
    tokens = mix(x.flatten(1, 2), Grid(4, 6))
    assert torch.equal(found.flatten(1, 2), tokens)
    assert found.shape[1:3] == Grid(4, 6).strided(sample.output_stride()).refined(sample.output_scale()).sizes
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(mix(strided), found)


@pytest.mark.parametrize("sizes", [(7,), (2, 3, 4)])
def test_maps_of_other_numbers_of_axes(random_mix, sizes):
    mix = random_mix(Dense(2))
    if len(sizes) == 1:
        with pytest.raises(attnkit.AttnkitError, match=r"takes a map \(B, H, W, C\), or tokens"):
            mix(torch.zeros(1, *sizes, 8))
        return
    assert mix(torch.zeros(1, *sizes, 8)).shape == (1, *sizes, 8)


def test_groups_come_as_options_or_plain_dicts():
    options = [Conv(heads=2), RandomWindow(heads=2, window=4), TopKRegion(2, 2, 2, routing="per_head")]
    plain = HeadMix(12, [one.to_dict() for one in options])
    mixed = HeadMix(12, [options[0], options[1].to_dict(), options[2]])
    assert plain.options == mixed.options == tuple(options)
    assert {name: one.shape for name, one in plain.state_dict().items()} == {
        name: one.shape for name, one in HeadMix(12, options).state_dict().items()
    }


def test_a_mix_as_data_builds_the_same_module():
    config = {"kind": "mix", "dim": 12, "groups": [{"kind": "conv", "heads": 1}, {"kind": "dense", "heads": 2}]}
    built = attnkit.build(config)
    assert isinstance(built, HeadMix)
    assert built.options == (Conv(1), Dense(2))
    assert Mix((Conv(1), Dense(2)), dim=12).to_dict() == config


class Loud(HeadGroup):
    def forward(self, inputs):
        return HeadOutput(torch.ones_like(inputs.v), inputs.grid, {"loudness": inputs.v.square().mean()})


def test_what_groups_say_beside_their_output(monkeypatch):
    mix = HeadMix(8, [Dense(1), Conv(1)])
    mix.groups[1] = Loud()
    found = mix.run(torch.ones(1, 13, 8), GRID)
    assert set(found.aux) == {"1.loudness"}
    assert found.grid == GRID


def test_groups_that_give_other_grids_are_refused(random_mix):
    for groups in ([LearnedQuery(1, 3, stride=2), Dense(1)], [LearnedQuery(1, 3), LearnedQuery(1, 3, stride=2)]):
        with pytest.raises(attnkit.AttnkitError, match="all groups need one stride"):
            HeadMix(8, groups)
    assert HeadMix(8, [LearnedQuery(1, 3, stride=2), Conv(1, stride=2)])(torch.zeros(1, 4, 6, 8)).shape == (1, 2, 3, 8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [HeadMix, Block])
def test_no_items_give_no_items(sample, make, training):
    layer = make(8, [sample]).train(training)
    out_map = Grid(4, 6).strided(sample.output_stride()).refined(sample.output_scale()).sizes
    mask = torch.ones(0, 25, dtype=torch.bool)
    for out, expected in (
        (layer(torch.zeros(0, 4, 6, 8, requires_grad=True)), (0, *out_map, 8)),
        (layer(torch.zeros(0, 25, 8, requires_grad=True), Grid(4, 6, prefix=1)), (0, 1 + math.prod(out_map), 8)),
        (layer(torch.zeros(0, 25, 8), Grid(4, 6, prefix=1), token_mask=mask), (0, 1 + math.prod(out_map), 8)),
    ):
        assert out.shape == expected
        out.sum().backward()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(5, 3, prefix=2)], ids=repr)
def test_every_parameter_gets_a_gradient(random_mix, sample, grid, training):
    mix = random_mix(sample).train(training)
    x = random_tensor(2, grid.tokens, 8, seed=0, dtype=torch.float32, grad=True)
    out = mix(x, grid)
    (out * random_tensor(*out.shape, seed=1, dtype=torch.float32)).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any(-1).all()
    for name, parameter in mix.named_parameters():
        if ".predictor." in name:
            # Trained by imitation of a teacher, as in its paper; the choice of keys is hard.
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_shapes_and_dtypes_without_values(random_mix, sample):
    """On the meta device a mix says what it would give."""
    mix = random_mix(sample).to("meta")
    assert mix(torch.zeros(2, 4, 6, 8, device="meta")).device.type == "meta"
    assert mix.train()(torch.zeros(2, 25, 8, device="meta"), Grid(4, 6, prefix=1)).shape[0] == 2


def test_it_shows_what_it_is():
    text = repr(HeadMix(8, [Dense(1), RandomWindow(1, 4)]))
    assert "dim=8, head_dim=4, out_dim=8" in text
    assert "RandomWindow(heads=1" in text
