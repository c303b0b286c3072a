"""Position tables on maps of other sizes than they were made for."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed

import attnkit
from attnkit import Grid
from attnkit.testing import random_tensor
from attnkit_models.backbones.isotropic import resized_positions

SIZES = [(4, 6), (9, 5), (7, 21), (14, 3), (1, 1), (30, 40)]


def table_for(grid, width=3, dtype=torch.float32):
    return random_tensor(1, grid.tokens, width, seed=1, dtype=dtype)


@pytest.mark.parametrize("made_for", [(7, 7), (4, 10)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("prefix", [0, 1])
def test_the_table_is_resized_as_in_timm(sizes, made_for, prefix):
    before, after = Grid(*made_for, prefix=prefix), Grid(*sizes, prefix=prefix)
    table = table_for(before)
    theirs = resample_abs_pos_embed(table, list(sizes), list(made_for), num_prefix_tokens=prefix)
    torch.testing.assert_close(resized_positions(table, before, after), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_constant_table_stays_constant(sizes):
    before, after = Grid(5, 8, prefix=2), Grid(*sizes, prefix=2)
    table = random_tensor(1, 1, 3, seed=0, dtype=torch.float32).expand(1, before.tokens, 3)
    resized = resized_positions(table, before, after)
    assert resized.shape == (1, after.tokens, 3)
    torch.testing.assert_close(resized, table[:, :1].expand_as(resized), rtol=1e-5, atol=1e-6)


def test_prefix_tokens_and_the_dtype_are_kept():
    before, after = Grid(4, 4, prefix=1), Grid(7, 3, prefix=1)
    table = table_for(before, dtype=torch.bfloat16)
    resized = resized_positions(table, before, after)
    assert resized.dtype == torch.bfloat16 and torch.equal(resized[:, :1], table[:, :1])
    assert resized_positions(table, before, before) is table


def test_a_model_sees_its_positions_where_they_were():
    model = attnkit.build("vit_micro", img_size=16, num_classes=0).eval()
    before = model.config.grid
    with torch.no_grad():
        model.pos_embed.copy_(table_for(before, model.pos_embed.shape[-1]))
        sizes = (before.sizes[0] * 2, before.sizes[1] + 1)
        pixels = [16 * new // old for new, old in zip(sizes, before.sizes, strict=True)]
        x = random_tensor(1, 3, *pixels, seed=2, dtype=torch.float32)
        here = model(x)
        model.pos_embed.data = resample_abs_pos_embed(
            model.pos_embed, list(sizes), list(before.sizes), num_prefix_tokens=before.prefix
        )
        other = attnkit.build("vit_micro", img_size=tuple(pixels), num_classes=0).eval()
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(here, other(x), rtol=1e-4, atol=1e-5)
