"""flops: exact where a formula is known, the same on every backend, never above dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnkit
from attnkit import Grid, HeadMix
from attnkit.errors import ConfigError, LayoutError, ShapeError
from attnkit.registry import primitive_class


def examples() -> list[attnkit.primitives.PrimitiveOptions]:
    return [
        primitive_class(name)(**{"heads": 2, **example})  # type: ignore[attr-defined]
        for name in attnkit.list_primitives()
        for example in primitive_class(name).examples  # type: ignore[attr-defined]
    ]


def test_a_dense_vit_matches_the_formula():
    tokens, dim, depth = 197, 384, 12
    stem, head = 196 * 16 * 16 * 3 * dim, dim * 1000
    count = attnkit.flops(attnkit.build("vit_small"), 224)
    assert count.total == stem + depth * (12 * tokens * dim**2 + 2 * tokens**2 * dim) + head
    assert count.total == 4_598_882_304
    assert (count.attention, count.conv) == (depth * 2 * tokens**2 * dim, stem)


def test_a_mix_matches_the_formula_of_its_groups():
    n, dim, width = 196, 96, 32
    mix = HeadMix(
        dim,
        [attnkit.Conv(heads=2), attnkit.RandomWindow(heads=2, window=49), attnkit.PooledGlobal(heads=2, pool=4)],
    )
    count = attnkit.flops(mix, 14)
    rows = {row.path: row for row in count.rows}
    assert rows["groups.0"].conv == n * (9 * width + width**2)
    assert rows["groups.1"].attention == 2 * n * 49 * width
    assert rows["groups.1"].density == pytest.approx(0.25)
    assert rows["groups.2"].attention == 2 * n * 16 * width
    assert rows["groups.2"].linear == 16 * dim * 2 * width
    assert rows[""].linear == n * dim * (width + 3 * width + width) + n * dim * dim
    assert count.total == sum(row.total for row in count.rows) == count.attention + count.linear + count.conv


@pytest.mark.parametrize("options", examples(), ids=repr)
def test_the_backend_does_not_matter(options):
    mix = HeadMix(32, [options])
    automatic = attnkit.flops(mix, (9, 7))
    with attnkit.use_backend("reference"):
        assert attnkit.flops(mix, (9, 7)).rows == automatic.rows


@pytest.mark.parametrize("options", examples(), ids=repr)
def test_attention_never_costs_more_than_dense(options):
    count = attnkit.flops(HeadMix(32, [options]), (9, 7))
    assert all(row.attention <= row.dense for row in count.rows)


def test_attention_grows_with_the_budget():
    counts = [attnkit.flops(HeadMix(32, [attnkit.Window(heads=2, window=w)]), 12).attention for w in (1, 3, 6, 12)]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert counts[-1] == attnkit.flops(HeadMix(32, [attnkit.Dense(heads=2)]), 12).attention


def test_prefix_tokens_count():
    mix = HeadMix(32, [attnkit.Window(heads=2, window=4)])
    window, cls, n = 16, 1, 64
    pairs = cls * (cls + n) + n * (cls + window)
    assert attnkit.flops(mix, Grid(8, 8, prefix=cls)).attention == 2 * pairs * 32


def test_other_modules_attention_counts_although_fused():
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.conv(x).flatten(2).transpose(1, 2)[:, None]
            return F.scaled_dot_product_attention(tokens, tokens, tokens)

    assert attnkit.flops(Fused(), 4).total == 16 * 3 * 8 + 2 * 16 * 16 * 8


def test_fewer_queries_than_keys_and_values_wider_than_keys():
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.flatten(2).transpose(1, 2)[:, None]
            mask = torch.ones(1, 1, 5, rows.shape[2], dtype=torch.bool)
            mask[..., 3:] = False
            return attnkit.attend(rows[:, :, :5], rows, rows.repeat(1, 1, 1, 2), attnkit.layouts.TokenMask(mask))

    row = attnkit.flops(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), Own()), (3, 4)).rows[-1]
    assert row.attention == 5 * 3 * (8 + 16)
    assert row.dense == 5 * 12 * (8 + 16)


def test_it_leaves_no_mark():
    mix = HeadMix(32, [attnkit.RandomWindow(heads=2, window=4)])
    mix.draws += 3
    state, mode = torch.random.get_rng_state(), mix.training
    attnkit.flops(mix, 6)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert mix.training is mode and int(mix.draws) == 3
    assert not mix._forward_hooks and not mix._forward_pre_hooks


def test_a_module_without_numbers_is_counted_where_its_layouts_need_none():
    with torch.device("meta"):
        dense, routed = (attnkit.build(name) for name in ("vit_micro", "biformer_micro"))
    assert attnkit.flops(dense, 32).total == attnkit.flops(attnkit.build("vit_micro"), 32).total
    with pytest.raises(LayoutError, match="blocks layout are on the meta device"):
        attnkit.flops(routed, 32)
    assert attnkit.flops(routed.stages[1].blocks[0], 8).total > 0


def test_the_table_is_readable():
    text = str(attnkit.flops(attnkit.Block(32, [attnkit.Window(heads=2, window=3)]), (6, 9)))
    assert text.startswith("Block on 6 x 9 tokens: ")
    assert "mix.groups.0" in text and "window" in text and "17 %" in text
    assert text.splitlines()[-1].startswith("total")
    assert "<table>" in attnkit.flops(HeadMix(32, [attnkit.Dense(heads=2)]), 4)._repr_html_()


@pytest.mark.parametrize(
    ("model", "size", "error", "words"),
    [
        ("vit_micro", 32, ConfigError, "needs a module"),
        (HeadMix(8, [attnkit.Dense(heads=2)]), 0, ShapeError, "image_size"),
        (HeadMix(8, [attnkit.Dense(heads=2)]), (4, -1), ShapeError, "image_size"),
        (HeadMix(8, [attnkit.Dense(heads=2)]), "32", ShapeError, "image_size"),
        (HeadMix(8, [attnkit.Dense(heads=2)]), 1.5, ShapeError, "image_size"),
        (nn.Conv2d(3, 4, 1), Grid(4, 4, prefix=1), ShapeError, "image size"),
    ],
)
def test_mistakes_are_named(model, size, error, words):
    with pytest.raises(error, match=words):
        attnkit.flops(model, size)
