"""Arguments of BiFormer's authors: what is unknown, does not fit or has no counterpart is one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnkit
from attnkit.errors import CheckpointError, ConfigError, ShapeError
from attnkit_models import export_official, import_official, import_official_layer
from attnkit_models.checkpoints.family import family_named, layer_named

STATE = {"wo.weight": torch.zeros(8, 8)}
BRA = {"dim": 8, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("BiLevelRoutingAttention", {}, "option 'dim' of 'BiLevelRoutingAttention' is missing; it is an integer"),
        ("BiLevelRoutingAttention", {**BRA, "top_k": 3}, r"unknown option 'top_k' for .*; did you mean 'topk'\?"),
        ("BiLevelRoutingAttention", {**BRA, "topk": 0}, "topk=0: must be >= 1"),
        ("BiLevelRoutingAttention", {**BRA, "topk": "4"}, "topk must be an integer, but got '4'"),
        ("BiLevelRoutingAttention", {**BRA, "num_heads": 3}, "dim=8: does not divide into 3 heads"),
        ("BiLevelRoutingAttention", {**BRA, "qk_dim": 5}, "qk_dim=5: does not divide into 2 heads"),
        ("BiLevelRoutingAttention", {**BRA, "side_dwconv": 4}, "side_dwconv=4: must be odd"),
        ("BiLevelRoutingAttention", {**BRA, "qk_scale": -1.0}, r"qk_scale=-1.0: must be a finite number > 0"),
        ("BiLevelRoutingAttention", {**BRA, "diff_routing": True}, "diff_routing=True: needs soft_routing=True"),
        (
            "BiLevelRoutingAttention",
            {**BRA, "soft_routing": True, "param_routing": True},
            "param_routing=True: needs diff_routing=True",
        ),
        (
            "BiLevelRoutingAttention",
            {**BRA, "kv_downsample_mode": "conv"},
            "kv_downsample_mode must be one of 'identity', 'ada_avgpool', .*, but got 'conv'",
        ),
        (
            "BiLevelRoutingAttention",
            {**BRA, "kv_downsample_mode": "ada_avgpool", "kv_per_win": -1},
            "kv_per_win=-1: must be >= 1 for 'ada_avgpool'",
        ),
        (
            "BiLevelRoutingAttention",
            {**BRA, "kv_downsample_mode": "maxpool", "kv_downsample_ratio": None},
            "kv_downsample_ratio=None: 'maxpool' needs a number of tokens",
        ),
        ("BiLevelRoutingAttention", {**BRA, "param_attention": "qk"}, "must be one of 'qkvo', 'qkv', but got 'qk'"),
        ("nchwBRA", {**BRA, "qk_dim": 8}, "unknown option 'qk_dim' for 'nchwBRA'"),
        ("nchwBRA", {**BRA, "n_win": 0}, "n_win=0: must be >= 1"),
        ("Attention", {"dim": 12}, "dim=12: does not divide into 8 heads"),
        ("Attention", {"dim": 8, "attn_drop": 0.1}, "attn_drop=0.1: must be 0; attnkit's attention has no dropout"),
        ("Attention", {"dim": 8, "side_dwconv": 5}, "unknown option 'side_dwconv' for 'Attention'"),
        ("AttentionLePE", {"dim": 8, "side_dwconv": 2}, "side_dwconv=2: must be odd"),
        ("nchwAttentionLePE", {"dim": 8, "head": 8}, "unknown option 'head' for 'nchwAttentionLePE'"),
        ("Block", {**BRA, "topk": -3}, "topk=-3: must be a number of regions, 0, -1 or -2"),
        ("Block", {**BRA, "before_attn_dwconv": 5}, "before_attn_dwconv=5: must be 3, or 0 for none"),
        ("Block", {"dim": 12, "topk": -2}, "dim=12: does not divide into 8 heads"),
    ],
)
def test_arguments_of_layers(name, arguments, says):
    with pytest.raises(ConfigError, match=says):
        import_official_layer(name, STATE, arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("biformer", {"depths": [2, 2, 8, 2]}, r"unknown option 'depths' for 'biformer'; did you mean 'depth'\?"),
        ("biformer", {"depth": 4}, "depth must be a list of integers, but got 4"),
        ("biformer", {"depth": [2, 2, 8]}, r"depth=\[2, 2, 8\]: needs one entry for each of 4 stages"),
        ("biformer", {"topks": [1, 4]}, r"topks=\[1, 4\]: needs one entry for each of 4 stages"),
        ("biformer", {"head_dim": 100}, "head_dim=100: leaves no head in a stage of 64 channels"),
        ("biformer", {"pe": "sine"}, "pe must be None, but got 'sine'"),
        ("biformer", {"representation_size": 512}, "representation_size must be None, but got 512"),
        ("biformer", {"topks": [8, -5, -1, -1]}, r"Block\(topk=-5\): must be a number of regions, 0, -1 or -2"),
        ("biformer_stl", {"kv_per_wins": [2, 2, 2, 2]}, "unknown option 'kv_per_wins' for 'biformer_stl'"),
        ("biformer_stl", {"norm_layer": "BatchNorm"}, r"must be one of .*; did you mean 'BatchNorm2d'\?"),
        ("biformer_stl_nchw", {"topks": [1, 4, 16, -2]}, "topks=.*: -2 is neither >= 1 nor -1"),
    ],
)
def test_arguments_of_models(name, arguments, says):
    with pytest.raises(ConfigError, match=says):
        import_official(name, STATE, arguments)


def test_arguments_that_change_nothing():
    plain = family_named("biformer").config({"drop_path_rate": 0.2})
    more = {"drop_rate": 0.3, "use_checkpoint_stages": [1], "kv_downsample_kernels": [4, 2, 1, 1], "pe_stages": [0]}
    assert family_named("biformer").config({"drop_path_rate": 0.2, **more}) == plain
    stl = family_named("biformer_stl").config({"norm_layer": nn.BatchNorm2d, "qk_scale": 0.3, "n_wins": 7})
    assert stl == family_named("biformer_stl").config({"norm_layer": "BatchNorm2d"})
    mix = layer_named("BiLevelRoutingAttention").build({**BRA, "kv_downsample_kernel": 3}, {})
    assert mix.options == layer_named("BiLevelRoutingAttention").build(BRA, {}).options
    nchw = layer_named("nchwBRA").build({**BRA, "auto_pad": True, "attn_backend": "torch"}, {})
    assert nchw.layer.options == layer_named("nchwBRA").build(BRA, {}).layer.options


def test_what_a_layer_takes():
    layer = layer_named("nchwBRA").build(BRA, {}).eval()
    assert layer(torch.randn(2, 8, 7, 9)).shape == (2, 8, 7, 9)
    for wrong in (torch.randn(2, 7, 9, 8), torch.randn(8, 7, 9), "x"):
        with pytest.raises(ShapeError, match=r"takes maps \(B, 8, H, W\)|must be a tensor"):
            layer(wrong)


def test_layers_of_another_kind_cannot_be_written():
    routed, dense = (layer_named(name).build({"dim": 8}, {}) for name in ("BiLevelRoutingAttention", "Attention"))
    nchw = layer_named("nchwBRA").build({"dim": 8}, {})
    for name, module in (
        ("Attention", routed),
        ("BiLevelRoutingAttention", dense),
        ("BiLevelRoutingAttention", nchw),
        ("nchwBRA", routed),
        ("Block", routed),
        ("Block", nn.Linear(2, 2)),
        ("nchwBRA", nn.Linear(2, 2)),
    ):
        with pytest.raises(CheckpointError, match=f"cannot be written as a '{name}' of its authors"):
            export_official(name, module)
    for name in ("biformer", "biformer_stl", "biformer_stl_nchw"):
        with pytest.raises(CheckpointError, match="a mix of conv, random_window, pooled_global has no counterpart"):
            export_official(name, attnkit.build("bigbird_vit_micro"))


def test_the_weights_of_the_other_code_do_not_fit():
    state = export_official("biformer_stl_nchw", attnkit.build("biformer_stl_nchw"))
    with pytest.raises(CheckpointError, match="it looks like a state dict of 'biformer_stl_nchw'"):
        import_official("biformer_stl", state, {"norm_layer": "BatchNorm2d"})
