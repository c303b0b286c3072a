"""What each recipe is made of, held against its paper, and dense models against timm's."""

from __future__ import annotations

import re

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import attnkit
from attnkit import factory
from attnkit.errors import ConfigError
from attnkit.primitives import Conv, Dense, LearnedQuery, MaskPredictor, PooledGlobal, RandomWindow, TopKRegion, Window
from attnkit_models.bigbird import bigbird


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_biformer_routes_in_three_stages_and_is_dense_in_the_last(size):
    config = factory.config(f"biformer_{size}")
    groups = [stage.mix.groups for stage in config.stages]
    width = config.stages[0].dim // 32
    assert groups[:3] == [
        (TopKRegion(width << at, 7, topk, scale="group", lepe=5),) for at, topk in enumerate((1, 4, 16))
    ]
    assert groups[3] == (Dense(8, lepe=5, lepe_on="x"),)
    assert [stage.mix.qkv_bias for stage in config.stages] == [True, True, True, False]
    assert (config.block.mlp_ratio, config.block.position_conv, config.final_norm) == (3.0, 3, "batch")


def test_the_two_biformers_in_swin_s_shapes_differ_in_one_convolution():
    first, second = (factory.config(f"biformer_stl{tail}") for tail in ("", "_nchw"))
    assert first != second
    assert factory.override(second, {"stages[3].mix.groups[0].lepe_on": "x"}) == first
    assert all(stage.merge.norm_first for stage in first.stages[1:])


def test_region_logits_are_scaled_by_the_whole_width():
    model = attnkit.build("biformer_micro")
    assert model.stages[0].blocks[0].mix.groups[0].scale == 48**-0.5
    assert model.stages[1].blocks[0].mix.groups[0].scale == 24**-0.5


def test_qna_orders_its_blocks_windows_first_and_the_stride_last():
    config = factory.config("qna_vit_small")
    kinds = [(stage.mix.groups[0].kind, stage.depth, stage.mix.groups[0].heads) for stage in config.stages]
    query = "learned_query"
    assert kinds == [
        (query, 2, 8),
        (query, 1, 16),
        (query, 3, 16),
        (query, 1, 32),
        ("window", 12, 8),
        (query, 6, 32),
        (query, 1, 64),
        ("window", 2, 16),
    ]
    assert [stage.dim for stage in config.stages] == [64, 64, 128, 128, 256, 256, 256, 512]
    for stage in config.stages:
        assert not stage.mix.qkv_bias and not stage.mix.proj_bias
        group = stage.mix.groups[0]
        if isinstance(group, LearnedQuery):
            assert stage.out_dim == stage.dim * group.stride and group.queries == 2
    assert [stage.mix.groups[0].window for stage in config.stages if isinstance(stage.mix.groups[0], Window)] == [14, 7]
    assert config.block.activation == "gelu_tanh" and not config.stem[0].bias


def test_qna_s_kernels():
    for name, kernel in (("qna_vit_tiny", 3), ("qna_vit_tiny_7x7", 7)):
        groups = [stage.mix.groups[0] for stage in factory.config(name).stages]
        assert {group.kernel for group in groups if isinstance(group, LearnedQuery)} == {kernel}


@pytest.mark.parametrize("name", attnkit.list_models("sparsifiner*"))
def test_sparsifiner_keeps_a_quarter_of_the_keys(name):
    config = factory.config(name)
    (group,) = config.mix.groups
    assert isinstance(group, MaskPredictor)
    assert (group.keep, group.tokens, group.prefix) == (0.25, config.grid.image_tokens, config.grid.prefix)


def test_lvvit_s_second_classifier_counts_half(images):
    model = attnkit.build("sparsifiner_lvvit_small", depth=1, num_classes=5).eval()
    features = model.forward_features(images())
    second = model.aux_head(features[:, 1:]).amax(1)
    torch.testing.assert_close(model.forward_head(features), model.head(features[:, 0]) + 0.5 * second)
    model.reset_classifier(3)
    assert model.aux_head.out_features == 3


@pytest.mark.parametrize("name", attnkit.list_models("bigbird*"))
def test_how_big_bird_splits_its_heads(name):
    shares = (1, 2, 1) if name.endswith("_lineage") else (1, 1, 1)
    for stage in factory.config(name).stages:
        assert [type(group) for group in stage.mix.groups] == [Conv, RandomWindow, PooledGlobal]
        heads = [group.heads for group in stage.mix.groups]
        assert heads == [share * heads[0] for share in shares]


def test_big_bird_s_options_are_set_stage_by_stage(images):
    config = bigbird(
        (12, 24, 24),
        (1, 2, 1),
        ((1, 2, 1), (2, 0, 2), (0, 4, 0)),
        pools=(8, 3, 1),
        windows=(5, 6, 7),
        seed=9,
        resample=4,
        eval_draws=2,
        img_size=64,
    )
    random = {"seed": 9, "resample": 4}
    assert [stage.mix.groups for stage in config.stages] == [
        (Conv(1), RandomWindow(2, 5, **random), PooledGlobal(1, 8)),
        (Conv(2), PooledGlobal(2, 3)),
        (RandomWindow(4, 7, **random),),
    ]
    model = config.build().eval()
    x = images(height=64, width=64)
    assert config.eval_draws == 2 and model(x).shape == (2, 1000)
    # The same by path, on a recipe.
    changes = {"stages[1].mix.groups[1].window": 25, "stages[0].mix.groups[2].pool": 4}
    stages = factory.override(factory.config("bigbird_vit_tiny"), changes).stages
    assert stages[1].mix.groups[1].window == 25 and stages[0].mix.groups[2].pool == 4
    assert stages[2] == factory.config("bigbird_vit_tiny").stages[2]


GOOD = {"dims": (12, 24), "depths": [1, 1], "heads": [[1, 1, 1], (2, 2, 2)], "pools": (2, 1), "windows": (5, 5)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depths": (1,)}, "depths=(1,): needs one entry for each of the 2 stages in dims"),
        ({"windows": (5,) * 4}, "windows=(5, 5, 5, 5): needs one entry for each of the 2 stages in dims"),
        ({"dims": 48}, "dims must be a list of integers, but got 48"),
        ({"pools": "44"}, "pools must be a list of integers, but got '44'"),
        ({"depths": (1, "2")}, "depths[1] must be an integer, but got '2'"),
        ({"heads": (3, 3)}, "heads[0] must be a list of 3 integers, but got 3"),
        ({"heads": ((1, 1), (2, 2, 2))}, "heads[0] must be a list of 3 integers, but got (1, 1)"),
        ({"heads": ((1, 1, 1), (0, 0, 0))}, "heads[1]=(0, 0, 0): a stage needs at least one head"),
        ({"eval_draw": 3}, "unknown option 'eval_draw' for bigbird; did you mean 'eval_draws'? (options: dims, depths"),
        (dict.fromkeys(GOOD, ()), "dims=(): needs at least one stage"),
        ({"depths": (1,), "pools": 3}, "pools must be a list of integers, but got 3; depths=(1,): needs one entry for"),
        ({"heads": ((1, -1, 1), (2, 2, 2))}, "heads=-1): must be >= 1"),
    ],
)
def test_mistakes_in_big_bird_s_lists(changes, says):
    assert len(bigbird(**GOOD).stages) == 2
    with pytest.raises(ConfigError) as caught:
        bigbird(**{**GOOD, **changes})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_heads_that_do_not_divide_the_width():
    for groups, says in (([Conv(7)], "into 7 heads; "), ([Conv(3), PooledGlobal(4, 1)], "into 3 + 4 = 7 heads; ")):
        with pytest.raises(ConfigError, match=re.escape(says)):
            attnkit.HeadMix(48, groups)


def test_the_sizes_of_the_lineage():
    """Within the last digit of what was found for CSWin's table with Big Bird's layer."""
    for size, parameters in (("tiny", 21.54), ("small", 33.39), ("base", 74.61)):
        with torch.device("meta"):
            model = attnkit.build(f"bigbird_vit_{size}_lineage")
        found = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert abs(found - parameters) <= 0.005


def from_timm(name: str) -> str:
    for theirs, ours in (("patch_embed.proj", "stem.0.conv"), (".attn.", ".mix.")):
        name = name.replace(theirs, ours)
    return name


def test_a_dense_vit_is_timm_s(images):
    theirs = VisionTransformer(img_size=32, patch_size=4, embed_dim=72, depth=4, num_heads=3, num_classes=5).eval()
    ours = attnkit.build("vit_micro", num_classes=5).eval()
    ours.load_state_dict({from_timm(name): one for name, one in theirs.state_dict().items()})
    x = images(height=32, width=32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), rtol=1e-5, atol=1e-5)
    maps = theirs.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(ours.forward_intermediates(x, intermediates_only=True), maps, rtol=1e-5, atol=1e-5)
