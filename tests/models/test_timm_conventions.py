"""timm's conventions for models, on every recipe."""

from __future__ import annotations

import pytest
import torch
from timm.data import resolve_model_data_config
from timm.models._manipulate import group_parameters
from torch import nn

import attnkit
from attnkit.errors import ConfigError


def test_forward_is_features_then_head(model, images):
    x = images()
    assert model(x).shape == (2, 5)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)))


def test_pre_logits_are_what_the_classifier_gets(model, images):
    features = model.forward_features(images())
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)
    if getattr(model, "aux_head", None) is None:
        torch.testing.assert_close(model.get_classifier()(pooled), model.forward_head(features))


def test_no_classes_leave_pooled_features(model, images):
    x = images()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.num_classes == model.config.num_classes == 0
    torch.testing.assert_close(model(x), pooled)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)


def test_no_pooling_leaves_the_feature_map(model, images):
    features = model.forward_features(images())
    model.reset_classifier(0, "")
    assert model.global_pool == ""
    torch.testing.assert_close(model(images()), features)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features)


def test_another_number_of_classes(model, images):
    before = {name for name, _ in model.named_parameters()}
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)
    assert model.get_classifier() is model.head and model.head.out_features == 7
    assert {name for name, _ in model.named_parameters()} == before
    assert model.config.num_classes == 7
    model.reset_classifier(0, "")
    model.reset_classifier(3, "avg")
    assert model(images()).shape == (2, 3)


def test_a_classifier_that_cannot_be_leaves_the_model_alone(model, images):
    expected = model(images())
    for arguments in ((-1,), (2.5,), (True,), (5, "mean"), (5, "")):
        with pytest.raises(ConfigError):
            model.reset_classifier(*arguments)
    if not hasattr(model, "cls_token"):
        with pytest.raises(ConfigError, match="class token"):
            model.reset_classifier(5, "token")
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize("name", attnkit.list_models())
def test_built_without_a_classifier_and_for_other_channels(name, outline):
    pooled = outline(name, num_classes=0, in_chans=1)
    x = torch.zeros(2, 1, 64, 96, device="meta")
    assert isinstance(pooled.get_classifier(), nn.Identity)
    assert (pooled.num_classes, pooled.in_chans) == (0, 1)
    assert pooled(x).shape == (2, pooled.num_features)
    # Without pooling too, a map is left, or the tokens of a model that has a class token.
    bare = outline(name, num_classes=0, in_chans=1, global_pool="")
    reduction = bare.feature_info.reduction()[-1]
    sizes = [-(-side // reduction) for side in (64, 96)]
    tokens = (2, 1 + sizes[0] * sizes[1], bare.num_features)
    assert bare(x).shape == (tokens if hasattr(bare, "cls_token") else (2, bare.num_features, *sizes))


@pytest.mark.parametrize("name", attnkit.list_models())
def test_what_timm_s_tools_ask_of_a_model(name, outline):
    model = outline(name, in_chans=4, img_size=(96, 64), num_classes=7)
    cfg = model.pretrained_cfg
    first = model.get_submodule(cfg["first_conv"])
    assert isinstance(first, nn.Conv2d) and first.in_channels == 4
    assert next(one for one in model.modules() if isinstance(one, nn.Conv2d)) is first
    names = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else list(cfg["classifier"])
    assert model.get_submodule(names[0]) is model.get_classifier()
    assert [path for path, one in model.named_modules() if getattr(one, "out_features", 0) == 7] == names
    assert cfg["num_classes"] == model.num_classes == 7
    assert resolve_model_data_config(model)["input_size"] == (4, 96, 64)


@pytest.mark.parametrize("name", attnkit.list_models())
def test_levels_of_whole_models(name):
    with torch.device("meta"):
        model = attnkit.build(name)
        backbone = attnkit.build(name, features_only=True, out_indices=(0, -1))
    info = model.feature_info
    assert len(info) >= (2 if name.endswith("_micro") else 3)
    assert info.channels()[-1] == model.num_features == model.head_hidden_size
    for level in info:
        model.get_submodule(level["module"])
    assert backbone.feature_info == [info[0], info[-1]]
    if hasattr(model, "cls_token"):
        assert len(info) == model.config.depth and len(set(info.reduction())) == 1
    else:
        assert info.reduction() == [info.reduction()[0] << at for at in range(len(info))]


def test_another_input_size_changes_no_result(model, images):
    x = images(height=48, width=80)
    expected = model(x)
    made_for = model.img_size
    model.set_input_size((48, 80))
    assert model.img_size == model.config.img_size == (48, 80) != made_for
    torch.testing.assert_close(model(x), expected)
    assert model.pretrained_cfg["input_size"] == (3, 48, 80)
    if getattr(model, "pos_embed", None) is not None:
        assert model.pos_embed.shape[1] == model.config.grid.tokens
    # What was set is what is built anew, and what the weights fit.
    twin = attnkit.build(model.config.to_dict()).eval()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x), expected)
    model.set_input_size(32)
    assert model.img_size == (32, 32)
    with pytest.raises(ConfigError, match="img_size"):
        model.set_input_size(0)
    assert model.img_size == (32, 32) and model(x).shape == (2, 5)


def test_parameters_without_weight_decay_exist(model):
    names = dict(model.named_parameters())
    spared = model.no_weight_decay()
    assert spared <= set(names)
    assert {"pos_embed", "cls_token"} & set(names) <= spared
    assert {name for name in names if name.endswith(("relative_bias", "gain"))} <= spared


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_for_layer_wise_learning_rates(model, coarse):
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    last = max(groups.values())
    for name, layer in groups.items():
        if name.startswith(("stem", "pos_embed", "cls_token")):
            assert layer == 0, name
        elif name.startswith(("head", "aux_head")):
            assert layer == last, name
        elif ".blocks." in name or name.startswith("blocks."):
            assert 0 < layer < last, name


def test_layers_grow_with_depth():
    bird = attnkit.build("bigbird_vit_micro")
    groups = group_parameters(bird, bird.group_matcher(), reverse=True)
    block = [groups[f"stages.{stage}.blocks.{at}.norm1.weight"] for stage in (0, 1) for at in (0, 1)]
    assert block == sorted(set(block))
    assert groups["stages.0.blocks.1.norm1.weight"] < groups["stages.1.merge.conv.weight"] <= block[2]


def test_checkpointing_is_a_switch(model):
    assert not model.grad_checkpointing
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


def test_models_are_built_for_training():
    assert all(attnkit.build(name).training for name in attnkit.list_models("*_micro"))
