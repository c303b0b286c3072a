"""Feature maps: forward_intermediates, features_only, and feature_info that tells the truth about both."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit.errors import ConfigError, ShapeError


def test_intermediates_begin_with_the_features(model, images):
    x = images()
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x))
    assert len(maps) == len(model.feature_info)
    for image, level in zip(maps, model.feature_info, strict=True):
        side = -(-64 // level["reduction"])
        assert image.shape == (2, level["num_chs"], side, side)
        assert model.get_submodule(level["module"]) is not None


def test_intermediates_are_the_same_under_checkpointing(model, images):
    x = images()
    expected = model.forward_intermediates(x)
    model.set_grad_checkpointing()
    found = model.forward_intermediates(x)
    torch.testing.assert_close(found, expected)
    assert found[0].requires_grad


def test_chosen_levels(model, images):
    x = images()
    maps = model.forward_intermediates(x, intermediates_only=True)
    levels = len(maps)
    for indices in ([0], [-1], [-levels], [0, -1], (0, levels - 1)):
        found = model.forward_intermediates(x, indices, intermediates_only=True, stop_early=True)
        torch.testing.assert_close(found, [maps[index] for index in sorted({index % levels for index in indices})])
    torch.testing.assert_close(model.forward_intermediates(x, 1, intermediates_only=True), maps[-1:])
    torch.testing.assert_close(model.forward_intermediates(x, [0])[1], maps[:1])


def test_levels_that_do_not_exist(model, images):
    levels = len(model.feature_info)
    for indices in ([levels], [-levels - 1], [], levels + 1, 0, -1, [0.5]):
        with pytest.raises(ConfigError, match="feature level"):
            model.forward_intermediates(images(), indices)
    with pytest.raises(ConfigError, match="NHWC"):
        model.forward_intermediates(images(), output_fmt="NHWC")


def test_tokens_instead_of_maps(model, images):
    maps = model.forward_intermediates(images(), intermediates_only=True)
    tokens = model.forward_intermediates(images(), intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(tokens, [image.flatten(2).transpose(1, 2) for image in maps])


def test_the_final_norm_on_the_last_level(model, images):
    features, maps = model.forward_intermediates(images(), norm=True)
    plain = model.forward_intermediates(images(), intermediates_only=True)
    torch.testing.assert_close(maps[:-1], plain[:-1])
    last = features if features.ndim == 4 else features[:, 1:].transpose(1, 2).unflatten(2, maps[-1].shape[2:])
    torch.testing.assert_close(maps[-1], last)


def test_a_model_of_features_only(recipe, model, images):
    config = {**model.config.to_dict(), "features_only": True}
    backbone = attnkit.build(config).eval()
    weights = {f"model.{name}": one for name, one in model.state_dict().items() if "head." not in name}
    backbone.load_state_dict(weights)
    maps = backbone(images())
    torch.testing.assert_close(maps, model.forward_intermediates(images(), intermediates_only=True))
    assert backbone.feature_info.channels() == [image.shape[1] for image in maps]
    assert backbone.feature_info.reduction() == [64 // image.shape[2] for image in maps]
    assert not [name for name, _ in backbone.named_parameters() if "head" in name]


@pytest.mark.parametrize("name", attnkit.list_models("*_micro"))
def test_some_features_only(name, images):
    backbone = attnkit.build(name, features_only=True, out_indices=(0, -1))
    maps = backbone(images(height=32, width=48))
    assert len(maps) == 2 == len(backbone.feature_info)
    assert backbone.feature_info.channels() == [image.shape[1] for image in maps]
    assert backbone.feature_info.reduction() == [32 // image.shape[2] for image in maps]
    assert attnkit.build(backbone.config.to_dict()).out_indices == backbone.out_indices
    backbone.set_grad_checkpointing()
    assert len(backbone(images(height=32, width=48))) == 2
    with pytest.raises(ConfigError, match="feature level"):
        attnkit.build(name, features_only=True, out_indices=(9,))
    with pytest.raises(ConfigError, match="features_only=True"):
        attnkit.build(name, out_indices=(0,))
    with pytest.raises(ShapeError, match="in_chans"):
        backbone(torch.zeros(1, 4, 32, 32))


@pytest.mark.parametrize("family", ["biformer_tiny", "bigbird_vit_tiny", "qna_vit_tiny"])
def test_a_pyramid_has_the_four_usual_levels(family):
    with torch.device("meta"):
        model = attnkit.build(family)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    width = model.feature_info.channels()[0]
    assert model.feature_info.channels() == [width, 2 * width, 4 * width, 8 * width]


@pytest.mark.parametrize("indices", [1.0, "01", [None], [0.5], [True], {0}, [], True, 0])
def test_levels_that_cannot_be(indices):
    model = attnkit.build("vit_micro", depth=2).eval()
    with pytest.raises(ConfigError, match="feature level"):
        model.forward_intermediates(torch.zeros(1, 3, 8, 8), indices)
