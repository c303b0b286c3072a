"""learned_upsample: every token of the finer map is a learned query of its own on the window of the token under it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnkit
from attnkit import Grid, HeadMix, LearnedQuery, LearnedUpsample
from attnkit.errors import ConfigError, ShapeError
from attnkit.testing import random_tensor
from attnkit.testing.strategies import grids, seeds


@pytest.mark.parametrize("gained", ["window", "window_ones", "query", "none"])
@given(
    grid=grids(max_height=4, max_width=5),
    half=st.integers(0, 2),
    scale=st.integers(1, 3),
    heads=st.integers(1, 2),
    norm=st.sampled_from(["unit", "unit_detached", "none"]),
    biased=st.booleans(),
    seed=seeds(),
)
def test_learned_upsample(gained, random_mix, agree, grid, half, scale, heads, norm, biased, seed):
    shared = {"query_norm": norm, "relative_bias": biased, "scaled_bias": biased and seed % 2 == 0, "gain": gained}
    mix = random_mix(LearnedUpsample(heads, 2 * half + 1, scale=scale, **shared), head_dim=3, seed=seed)
    group = mix.groups[0]

    def expected(x):
        v = (x @ mix.qkv.weight.T + mix.qkv.bias).unflatten(-1, (heads, -1))
        out = torch.zeros(2, grid.prefix, heads * 3, dtype=x.dtype)
        fine = torch.zeros(2, scale * grid.height, scale * grid.width, heads * 3, dtype=x.dtype)
        for at, (down, right) in enumerate(itertools.product(range(scale), repeat=2)):
            single = LearnedQuery(heads, 2 * half + 1, queries=1, **shared)
            weights = {"key": group.key, "query": group.query[at : at + 1]}
            rows = slice(at * heads, (at + 1) * heads)
            tables = ("relative_bias", "gain")
            weights |= {name: getattr(group, name)[rows] for name in tables if getattr(group, name) is not None}
            inputs = attnkit.primitives.HeadInputs(x, None, None, v.transpose(1, 2), grid)
            layer = single.build(attnkit.primitives.BuildContext(mix.dim, 3)).double()
            found = torch.func.functional_call(layer, weights, (inputs,)).out.transpose(1, 2).flatten(2)
            out = out + found[:, : grid.prefix] / scale**2
            fine[:, down::scale, right::scale] = found[:, grid.prefix :].unflatten(1, grid.sizes)
        return torch.cat([out, fine.flatten(1, 2)], dim=1) @ mix.proj.weight.T + mix.proj.bias

    agree(mix, grid, expected, seed=seed)


def test_the_map_becomes_finer():
    mix = HeadMix(8, [LearnedUpsample(2, 3)], out_dim=4)
    assert mix(torch.zeros(2, 5, 6, 8)).shape == (2, 10, 12, 4)
    found = mix.run(torch.zeros(2, 31, 8), Grid(5, 6, prefix=1))
    assert found.grid == Grid(10, 12, prefix=1) and found.x.shape == (2, 121, 4)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match=r"scale=0\): must be >= 1"):
        LearnedUpsample(2, 3, scale=0)
    with pytest.raises(ConfigError, match="'window', 'window_ones', 'query', 'none'"):
        LearnedUpsample(2, 3, gain="signs")
    with pytest.raises(ShapeError, match=r"learned_upsample needs a grid of height and width, but got Grid\(6\)"):
        HeadMix(4, [LearnedUpsample(2, 3)])(random_tensor(1, 6, 4, seed=0, dtype=torch.float32), Grid(6))
    mix = {"groups": [{"kind": "learned_upsample", "heads": 2, "kernel": 3}]}
    stem = [{"dim": 8, "kernel": 4, "stride": 4}]
    with pytest.raises(ConfigError, match=r"stages\[0\].mix=...: maps never become finer in a pyramid"):
        attnkit.build({"kind": "pyramid", "stem": stem, "stages": [{"dim": 8, "depth": 1, "mix": mix}]})
    with pytest.raises(ConfigError, match="the blocks of an isotropic model keep their map"):
        attnkit.build({"kind": "isotropic", "stem": stem, "depth": 1, "mix": mix})
