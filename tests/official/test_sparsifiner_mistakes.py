"""Arguments and files of Sparsifiner's authors: what does not fit is one sentence; other images and bare backbones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import attnkit
from attnkit.errors import CheckpointError, ConfigError, ShapeError
from attnkit.testing import randomize_parameters
from attnkit_models import export_official, import_official, import_official_layer
from attnkit_models.checkpoints.sparsifiner_arguments import Sparsifiner, SparsifinerLVViT, configuration
from attnkit_models.checkpoints.sparsifiner_cfg import split

LAYER = {"dim": 32, "num_tokens": 17, "num_heads": 2, "reduce_n_factor": 2}
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "reduce_n_factor": 2}
MODEL |= {"num_classes": 5}


@pytest.mark.parametrize(
    ("changes", "cfg", "says"),
    [
        ({"num_head": 2}, {}, r"unknown option 'num_head' for 'SparsifinerAttention'; did you mean 'num_heads'\?"),
        ({"num_heads": 3}, {}, "dim=32: does not divide into num_heads=3 heads"),
        ({"num_tokens": 1}, {}, "num_tokens=1: the class token is one of them"),
        ({"attn_keep_rate": 0.0}, {}, r"attn_keep_rate=0.0: must be a share in \(0, 1\]"),
        ({"reduce_n_factor": 4}, {}, r"reduce_n_factor=4: leaves 4 basis rows of 17 tokens, too few for the 8"),
        ({}, {"BASIS_THRESHOL": 0.1}, r"unknown option 'BASIS_THRESHOL' for 'cfg'; did you mean 'BASIS_THRESHOLD'\?"),
        ({}, {"BASIS_COEF": {"TOPK": 0}}, "BASIS_COEF.TOPK=0: must be >= 1"),
        ({}, {"ATTN_SCORE": {"USE_TOPK": False, "THRESHOLD": 0.0}}, "ATTN_SCORE.THRESHOLD=0.0: must be > 0 where"),
        ({}, 3, r"hparams\['cfg'\] is a dict of names to values, but got 3"),
    ],
    ids=str,
)
def test_arguments_of_the_layer(changes, cfg, says):
    with pytest.raises(ConfigError, match=says):
        import_official_layer("SparsifinerAttention", {"x": torch.zeros(1)}, {"ctor": {**LAYER, **changes}, "cfg": cfg})


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("sparsifiner", {"img_size": 30}, "img_size=30: must be a multiple of patch_size=8"),
        ("sparsifiner", {"attn_keep_rate_list": [0.5]}, r"attn_keep_rate_list=\[0.5\]: needs one share for each of 2"),
        (
            "sparsifiner",
            {"token_keep_rate_list": [0.5]},
            r"token_keep_rate_list=\[0.5\]: needs one entry for each of 2",
        ),
        ("sparsifiner", {"token_pruning_loc_indicator": [True, False]}, "needs token_keep_rate_list"),
        (
            "sparsifiner",
            {"token_pruning_loc_indicator": [True, True], "token_keep_rate_list": [0.5, 0.7]},
            r"token_keep_rate_list=\[0.5, 0.7\]: must not grow where it prunes",
        ),
        (
            "sparsifiner",
            {"token_pruning_loc_indicator": [True, True], "token_keep_rate_list": [0.5, 0.0]},
            r"shares must be in \(0, 1\]",
        ),
        ("sparsifiner", {"representation_size": 64}, "representation_size must be None, but got 64"),
        ("sparsifiner", {"norm_layer": "BatchNorm"}, "norm_layer='BatchNorm': must be a layer norm"),
        ("sparsifiner_lvvit", {}, r"return_dense=False\): their model needs its second classifier"),
        ("sparsifiner_lvvit", {"return_dense": True, "order": ["tr", "mha"]}, r"order\[1\] must be one of 'tr'"),
        ("sparsifiner_lvvit", {"return_dense": True, "order": ["tr"]}, r"names 1 blocks, but depth=2"),
        ("sparsifiner_lvvit", {"return_dense": True, "patch_size": 1}, "patch_size=1: must be even"),
        ("sparsifiner_lvvit", {"return_dense": True, "token_keep_rate_list": [1.0]}, "unknown option 'token_keep_rate"),
    ],
    ids=str,
)
def test_arguments_of_models(family, changes, says):
    with pytest.raises(ConfigError, match=says):
        import_official(family, {"x": torch.zeros(1)}, {**MODEL, **changes})


def test_arguments_and_configuration_apart_and_nothing_else():
    with pytest.raises(ConfigError, match="hparams are 'ctor' and 'cfg', but there is 'depth' as well"):
        import_official("sparsifiner", {"x": torch.zeros(1)}, {"ctor": MODEL, "cfg": {}, "depth": 3})


def test_norms_and_what_changes_nothing():
    unused = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "distill": True, "cfg": {"REDUCE_N_FACTOR": 6, "ARCH": "dense"}}
    plain = configuration(Sparsifiner, MODEL)
    assert configuration(Sparsifiner, {**MODEL, **unused}) == plain
    assert plain.block.norm_eps == 1e-6
    for given in (nn.LayerNorm, "nn.LayerNorm", partial(nn.LayerNorm, eps=1e-5)):
        assert configuration(Sparsifiner, {**MODEL, "norm_layer": given}).block.norm_eps == 1e-5
    assert configuration(SparsifinerLVViT, {**MODEL, "return_dense": True}).block.norm_eps == 1e-5
    assert split({"cfg": {"SPAR": {"BASIS_THRESHOLD": 0.3}}})[1].BASIS_THRESHOLD == 0.3


def test_their_whole_models_have_our_recipes_shapes():
    """Sizes they publish, from their arguments: as many parameters as the recipes."""
    deit = {"embed_dim": 384, "num_heads": 6, "reduce_n_factor": 6}
    built = attnkit.build(configuration(Sparsifiner, deit))
    assert sum(one.numel() for one in built.parameters()) == 22_251_880
    lv_vit = {**deit, "depth": 16, "mlp_ratio": 3.0, "skip_lam": 2.0, "return_dense": True}
    config = configuration(SparsifinerLVViT, lv_vit)
    built = attnkit.build(config)
    assert sum(one.numel() for one in built.parameters()) == 26_420_112
    ours = attnkit.build("sparsifiner_lvvit_small")
    assert {name: one.shape for name, one in built.state_dict().items()} == {
        name: one.shape for name, one in ours.state_dict().items()
    }


def weights(name="sparsifiner", hparams=MODEL, arguments=Sparsifiner):
    model = attnkit.build(configuration(arguments, hparams))
    return export_official(name, randomize_parameters(model, seed=0))


def test_files_of_other_families():
    state = weights()
    del state["blocks.0.attn.mask_predictor.proj_n"]
    with pytest.raises(CheckpointError, match=r"1 is missing \(blocks.0.attn.mask_predictor.proj_n\)$"):
        import_official("sparsifiner", state, MODEL)
    lv_vit = {**MODEL, "return_dense": True}
    with pytest.raises(CheckpointError, match="it looks like a state dict of 'sparsifiner'"):
        import_official("sparsifiner_lvvit", state, lv_vit)
    with pytest.raises(CheckpointError, match="it looks like a state dict of 'sparsifiner_lvvit'"):
        import_official("sparsifiner", weights("sparsifiner_lvvit", lv_vit, SparsifinerLVViT), MODEL)
    with pytest.raises(
        CheckpointError, match=r"cannot be written as a 'sparsifiner' of its authors: .*its heads are dense"
    ):
        export_official("sparsifiner", attnkit.build("vit_micro"))
    with pytest.raises(CheckpointError, match="is no such layer"):
        export_official("SparsifinerAttention", attnkit.build("vit_micro"))


def test_a_backbone_without_predictors():
    """DeiT's files hold the weights under 'model'; the predictors are fresh."""
    state = {name: one for name, one in weights().items() if "mask_predictor" not in name}
    with pytest.raises(CheckpointError, match="a backbone without mask predictors loads with backbone_only=True"):
        import_official("sparsifiner", {"model": state}, MODEL)
    model = import_official("sparsifiner", {"model": state}, MODEL, backbone_only=True)
    again = export_official("sparsifiner", model)
    assert all(torch.equal(again[name], one) for name, one in state.items())
    up = again["blocks.1.attn.mask_predictor.proj_back_n"]
    assert 0 < up.std() < 0.03
    with pytest.raises(CheckpointError, match="1 is missing"):
        import_official(
            "sparsifiner", {n: one for n, one in state.items() if n != "cls_token"}, MODEL, backbone_only=True
        )
    with pytest.raises(CheckpointError, match="12 are not known"):
        import_official("sparsifiner", weights(), MODEL, backbone_only=True)
    with pytest.raises(ConfigError, match="backbone_only=True goes with models of Sparsifiner"):
        import_official("biformer_tiny", state, backbone_only=True)


def test_other_images():
    """Tables that are resized on the way in give what they give when they are resized at every call."""
    state = weights()
    larger = {**MODEL, "img_size": (48, 64), "reduce_n_factor": 6}
    with pytest.raises(CheckpointError, match="resize_tables=True resizes"):
        import_official("sparsifiner", state, larger)
    resized = import_official("sparsifiner", state, larger, resize_tables=True)
    assert resized.pos_embed.shape == (1, 49, 16)
    assert resized.blocks[0].mix.groups[0].predictor.up.shape == (49, 8)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(resized(images), import_official("sparsifiner", state, MODEL)(images))
    # Another number of basis rows cannot be made of these.
    with pytest.raises(CheckpointError, match=r"proj_n \(17, 8\) instead of \(49, 24\)"):
        import_official("sparsifiner", state, {**larger, "reduce_n_factor": 2}, resize_tables=True)


def test_positions_that_were_no_square_image_are_not_guessed():
    state = weights(hparams={**MODEL, "img_size": (32, 48)})
    with pytest.raises(CheckpointError, match=r"pos_embed \(1, 25, 16\) instead of \(1, 65, 16\)"):
        import_official("sparsifiner", state, {**MODEL, "img_size": 64}, resize_tables=True)


def test_layers_that_are_given_something_else():
    layer = import_official_layer("SparsifinerAttention", layer_weights(), LAYER)
    x = torch.zeros(2, 17, 32)
    with pytest.raises(ShapeError, match=r"token_mask is \(B, N - 1\), without the class token, but got \(2, 17\)"):
        layer(x, torch.ones(2, 17, dtype=torch.bool))
    with pytest.raises(ShapeError, match="token_mask must be a tensor"):
        layer(x, [True])
    with pytest.raises(ShapeError, match=r"17"):
        layer(torch.zeros(2, 20, 32))


def layer_weights():
    from attnkit_models.checkpoints.sparsifiner_layers import attention

    return export_official("SparsifinerAttention", attention(LAYER, {}))


def test_a_mask_that_keeps_all_changes_nothing():
    layer = import_official_layer("SparsifinerAttention", layer_weights(), {**LAYER, "attn_keep_rate": 1.0})
    x = torch.randn(2, 17, 32)
    torch.testing.assert_close(layer(x, torch.ones(2, 16, dtype=torch.bool)), layer(x))
