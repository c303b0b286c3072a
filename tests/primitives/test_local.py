"""learned_query, conv and locally enhanced positional encoding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from attnkit import Conv, Dense, Grid, LearnedQuery, PooledGlobal
from attnkit.errors import ConfigError, ShapeError
from attnkit.kernels import recording
from attnkit.primitives import BuildContext
from attnkit.registry import list_primitives, primitive_class
from attnkit.testing import random_options, random_tensor
from attnkit.testing.strategies import grids, seeds


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gained", ["window", "window_ones", "query", "signs", "mean", "none"])
@given(
    grid=grids(max_height=5, max_width=6),
    half=st.integers(0, 3),
    stride=st.integers(1, 3),
    queries=st.integers(1, 3),
    heads=st.integers(1, 2),
    norm=st.sampled_from(["unit", "unit_detached", "none"]),
    scaled=st.booleans(),
    key_bias=st.booleans(),
    seed=seeds(),
)
def test_learned_query(
    biased, gained, random_mix, agree, grid, half, stride, queries, heads, norm, scaled, key_bias, seed
):
    kernel, width = 2 * half + 1, 3
    assume(gained != "signs" or queries * heads % 2 == 0)
    options = LearnedQuery(
        heads,
        kernel,
        stride=stride,
        queries=queries,
        query_norm=norm,
        relative_bias=biased,
        scaled_bias=biased and scaled,
        key_bias=key_bias,
        gain=gained,
    )
    mix = random_mix(options, head_dim=width, seed=seed)
    group = mix.groups[0]
    down, right = (-(-size // stride) for size in grid.sizes)

    def windows(rows, fill):
        """(B, channels, image tokens) -> (B, channels, k * k, places): what the window of every place holds."""
        padded = F.pad(rows.unflatten(2, grid.sizes), (half,) * 4, value=fill)
        found = F.unfold(padded, kernel, stride=stride).unflatten(1, (rows.shape[1], kernel**2))
        assert found.shape[3] == down * right
        return found

    def expected(x):
        length = group.query.square().sum(2, keepdim=True).sqrt() + 1e-6
        length = {"unit": length, "unit_detached": length.detach(), "none": 1.0}[norm]
        keys = torch.einsum("bnc,mdc->bnmd", x, group.key.unflatten(0, (heads, width)))
        keys = keys + group.key_bias if key_bias else keys
        scores = torch.einsum("bnmd,qmd->bqmn", keys, group.query / length / math.sqrt(width))
        v = torch.stack((x @ mix.qkv.weight.T + mix.qkv.bias).chunk(heads, dim=-1), dim=1)
        near = windows(scores[..., grid.prefix :].flatten(1, 2), -torch.inf).unflatten(1, (queries, heads))
        values = windows(v[:, :, grid.prefix :].transpose(2, 3).flatten(1, 2), 0.0).unflatten(1, (heads, width))
        logits, factor = near, torch.ones_like(near)
        if biased:
            bias = group.relative_bias.view(1, queries, heads, -1, 1)
            logits = logits + (bias / math.sqrt(width) if scaled else bias)
        if gained in ("window", "window_ones"):
            factor = group.gain.view(1, queries, heads, -1, 1).expand_as(near)
        # Prefix tokens are further keys of every window, without bias and with gain 1.
        first = scores[..., : grid.prefix, None].expand(-1, -1, -1, -1, down * right)
        weights = torch.cat([first, logits], dim=3).softmax(3) * torch.cat([torch.ones_like(first), factor], dim=3)
        image = torch.einsum("bqmpn,bmpd->bqmnd", weights[..., : grid.prefix, :], v[:, :, : grid.prefix])
        image = image + torch.einsum("bqmtn,bmdtn->bqmnd", weights[..., grid.prefix :, :], values)
        row = torch.einsum("bqmn,bmnd->bqmd", scores.softmax(-1), v)[..., None, :].expand(-1, -1, -1, grid.prefix, -1)
        out = torch.cat([row, image], dim=3)
        # One factor for everything that a query's head gives, prefix tokens included.
        whole = torch.ones(queries * heads, dtype=x.dtype)
        if gained == "signs":
            whole[queries * heads // 2 :] = -1.0
        whole = group.gain if gained == "query" else whole / queries if gained == "mean" else whole
        out = torch.einsum("bqmnd,qm->bmnd", out, whole.view(queries, heads))
        return torch.cat(list(out.unbind(1)), dim=-1) @ mix.proj.weight.T + mix.proj.bias

    agree(mix, grid, expected, seed=seed)
    assert mix.run(random_tensor(1, grid.tokens, mix.dim, seed=0), grid).grid == Grid(down, right, prefix=grid.prefix)


def test_options_of_learned_queries_that_do_not_fit_together():
    with pytest.raises(ConfigError, match=r"gain='signs'\): 1 queries of 3 heads have no half"):
        LearnedQuery(3, 3, queries=1, gain="signs")
    with pytest.raises(ConfigError, match=r"scaled_bias=True\): goes with relative_bias=True"):
        LearnedQuery(3, 3, relative_bias=False, scaled_bias=True)


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e6])
def test_scores_of_any_size_are_exact(random_mix, factor):
    """In float32, where exp alone would overflow at 89; a far larger score elsewhere does not wipe out a window."""
    mix = random_mix(LearnedQuery(2, 3, query_norm="none"), head_dim=4)
    with torch.no_grad():
        mix.groups[0].key.mul_(factor)
    x = random_tensor(1, 48, 8, seed=1)
    x[:, 40:] *= 10
    found, expected = (mix.to(x.dtype)(x, Grid(6, 8)) for x in (x.float(), x))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_learned_query_makes_no_keys(random_mix):
    """Also beside others: the projection holds values only, and a score is one number per query and head."""
    mix = random_mix([LearnedQuery(2, 3), Dense(2)], head_dim=4)
    assert mix.qkv.out_features == 2 * 4 + 3 * 2 * 4
    with recording() as choices:
        mix(random_tensor(1, 6, 16, seed=0), Grid(2, 3))
    assert choices[0].call.k.shape == (1, 4, 6, 1)


def test_learned_query_starts_with_even_weights_and_small_gains():
    mix = LearnedQuery(2, 3).build(BuildContext(8, 4))
    assert (mix.relative_bias == 0).all()
    assert (LearnedQuery(2, 3, gain="window_ones").build(BuildContext(8, 4)).gain == 1).all()
    assert 0.005 < float(mix.gain.detach().std()) < 0.05
    assert float(mix.query.detach().std()) < 1.5 * 4**-0.5


@pytest.mark.parametrize("pointwise", [True, False])
@given(
    grid=grids(max_height=5, max_width=6),
    half=st.integers(0, 2),
    stride=st.integers(1, 3),
    heads=st.integers(1, 2),
    seed=seeds(),
)
def test_conv(pointwise, random_mix, agree, grid, half, stride, heads, seed):
    mix = random_mix(Conv(heads, kernel=2 * half + 1, stride=stride, pointwise=pointwise), seed=seed)
    group = mix.groups[0]
    assert mix.qkv.out_features == 2 * heads

    def expected(x):
        v = x @ mix.qkv.weight.T + mix.qkv.bias
        places = list(itertools.product(*(range(0, size, stride) for size in grid.sizes)))
        rows = [v[:, at] for at in range(grid.prefix)]
        for down, right in places:
            total = group.depthwise.bias.expand(len(x), -1)
            for tap in itertools.product(range(-half, half + 1), repeat=2):
                key = (down + tap[0], right + tap[1])
                if 0 <= key[0] < grid.height and 0 <= key[1] < grid.width:
                    weight = group.depthwise.weight[:, 0, tap[0] + half, tap[1] + half]
                    total = total + weight * v[:, grid.prefix + key[0] * grid.width + key[1]]
            if pointwise:
                active = total * 0.5 * (1 + torch.erf(total / math.sqrt(2)))
                total = active @ group.pointwise.weight[:, :, 0, 0].T + group.pointwise.bias
            rows.append(total)
        return torch.stack(rows, dim=1) @ mix.proj.weight.T + mix.proj.bias

    agree(mix, grid, expected, seed=seed)


SOFTMAX = [name for name in list_primitives() if hasattr(primitive_class(name), "lepe")]


@pytest.mark.parametrize("source", ["v", "x"])
@pytest.mark.parametrize("name", SOFTMAX)
@given(grid=grids(max_height=4, max_width=4), kernel=st.sampled_from([1, 3, 5]), seed=seeds())
def test_lepe_adds_a_depthwise_convolution(name, source, random_mix, grid, kernel, seed):
    fixed = {"prefix": 0} if hasattr(primitive_class(name), "prefix") else {}
    options = random_options(name, seed=seed, lepe=kernel, lepe_on=source, **fixed)
    mix = random_mix(options, seed=seed)
    x = random_tensor(2, grid.tokens, mix.dim, seed=seed)
    conv = mix.groups[0].lepe
    with_lepe = mix(x, grid)
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
    without = mix(x, grid)
    # The values are the last columns of the group's projection.
    tokens = x if source == "x" else (x @ mix.qkv.weight.T + mix.qkv.bias)[..., -mix.dim :]
    image = tokens[:, grid.prefix :].transpose(1, 2).unflatten(2, grid.sizes)
    local = F.conv2d(image, weight, bias, padding=kernel // 2, groups=mix.dim).flatten(2).transpose(1, 2)
    expected = F.pad(local, (0, 0, grid.prefix, 0)) @ mix.proj.weight.T
    torch.testing.assert_close(with_lepe - without, expected, rtol=1e-9, atol=1e-9)


def test_lepe_on_the_input_needs_all_heads(random_mix):
    with pytest.raises(ConfigError, match=r"lepe_on='x' adds all 8 channels of the input to this group's 4"):
        random_mix([PooledGlobal(2, 2, lepe=3, lepe_on="x"), Dense(2)])


@pytest.mark.parametrize("options", [Conv(2), LearnedQuery(2, 3, relative_bias=False, gain="none"), Dense(2, lepe=3)])
def test_convolutions_need_two_axes(random_mix, options):
    mix, grid = random_mix(options), Grid(6)
    x = random_tensor(1, 6, 4, seed=0)
    if options.kind == "learned_query":
        assert mix(x, grid).shape == x.shape
        return
    with pytest.raises(ShapeError, match=r"a 2-D convolution needs a grid of height and width, but got Grid\(6\)"):
        mix(x, grid)
