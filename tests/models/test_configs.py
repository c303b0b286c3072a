"""Configurations: plain data in and out, and overrides by path."""

from __future__ import annotations

import json
import re

import pytest
import torch

import attnkit
from attnkit import factory
from attnkit.errors import ConfigError
from attnkit.options import Options
from attnkit.primitives import Dense, RandomWindow


def test_a_configuration_survives_json(recipe):
    name, model = recipe
    for config in (factory.config(name), model.config):
        for full in (False, True):
            again = Options.from_dict(json.loads(json.dumps(config.to_dict(full=full))))
            assert again == config
            assert hash(again) == hash(config)


def test_a_model_is_rebuilt_from_its_configuration(model, images):
    twin = attnkit.build(json.loads(json.dumps(model.config.to_dict()))).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(twin(images()), model(images()), rtol=0, atol=0)
    assert twin.config == model.config


def test_a_name_in_a_plain_dict():
    by_dict = factory.config({"kind": "bigbird_vit_micro", "num_classes": 10, "in_chans": 1})
    by_name = factory.override(factory.config("bigbird_vit_micro"), {"num_classes": 10, "in_chans": 1})
    assert by_dict == by_name


def test_overrides_by_path():
    path = "stages[2].mix.groups[1].window"
    with torch.device("meta"):
        model = attnkit.build("bigbird_vit", num_classes=10, img_size=(96, 160), **{path: 64})
    assert model.config.stages[2].mix.groups[1].window == 64
    assert model.config.stages[1].mix.groups[1].window == 49
    assert (model.num_classes, model.img_size) == (10, (96, 160))
    assert [group.window for group in (stage.mix.groups[1] for stage in model.config.stages)] == [49, 49, 64, 49]


def test_overrides_of_every_entry_and_of_whole_parts():
    changes = {"stages[*].mix.groups[1].seed": 3, "stages[0].mix": {"groups": [{"kind": "dense", "heads": 3}]}}
    config = factory.override(factory.config("bigbird_vit_micro"), {**changes, "block": {"drop_path": 0.5}})
    assert config.stages[0].mix.groups == (Dense(3),)
    assert isinstance(config.stages[1].mix.groups[1], RandomWindow) and config.stages[1].mix.groups[1].seed == 3
    assert config.block.drop_path == 0.5


def test_a_part_is_replaced_before_what_is_inside_it_is_changed():
    config = factory.override(
        factory.config("vit_micro"),
        {"mix.groups": [{"kind": "window", "heads": 3, "window": 4}], "mix.groups[0].window": 2},
    )
    assert config.mix.groups[0].window == 2


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_micro", {"out_indices": (0, -1), "features_only": True}),
        ("vit_micro", {"global_pool": "avg", "class_token": False}),
        ("vit_micro", {"class_token": False, "global_pool": "avg"}),
        ("vit_micro", {"global_pool": "", "num_classes": 0}),
        ("bigbird_vit_micro", {"stages[1].dim": 60, "stages[1].merge.dim": 60}),
        ("bigbird_vit_micro", {"stages[0].dim": 60, "stem[0].dim": 60}),
    ],
)
def test_changes_that_only_fit_together(name, changes):
    for order in (changes, dict(reversed(changes.items()))):
        config = factory.override(factory.config(name), order)
        assert factory.override(config, order) == config
        config.build()


def test_mistakes_are_all_named_with_what_was_meant():
    with pytest.raises(ConfigError) as caught:
        attnkit.build("bigbird_vit_micro", num_clases=3, **{"stages[9].depth": 1, "stages[0].mix.groups[1].windw": 4})
    message = str(caught.value)
    assert "num_classes" in message and "stages[9].depth" in message and "'window'" in message
    with pytest.raises(ConfigError, match="biformer_tiny"):
        attnkit.build("biformer_tyny")


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("vit_micro", {"num_classes": -1}, "num_classes=-1"),
        ("vit_micro", {"num_classes": "ten"}, "an integer"),
        ("vit_micro", {"in_chans": 0}, "in_chans=0"),
        ("vit_micro", {"img_size": 0}, "1 x 1 pixels"),
        ("vit_micro", {"img_size": (32, 32, 32)}, "img_size"),
        ("vit_micro", {"drop_path": 1.0}, "drop_path"),
        ("vit_micro", {"global_pool": "max"}, "'avg'"),
        ("vit_micro", {"global_pool": ""}, "num_classes=0"),
        ("vit_micro", {"class_token": False}, "class_token=True"),
        ("vit_micro", {"depth": 0}, "depth=0"),
        ("vit_micro", {"mix.groups[0].heads": 5}, "72 .*5 heads"),
        ("vit_micro", {"init": "lecun"}, "lecun_normal"),
        ("biformer_micro", {"global_pool": "token"}, "class token"),
        ("biformer_micro", {"stages[0].dim": 50}, "stages[0].dim=50"),
        ("biformer_micro", {"stages": []}, "at least one"),
        ("biformer_micro", {"stages[0].mix.groups[0].topk": 0}, "topk=0"),
        ("qna_vit_micro", {"stages[1].depth": 2}, "stride"),
        ("qna_vit_micro", {"stages[0].mix.groups[0].kernel": 4}, "odd"),
        ("sparsifiner_micro", {"mix.groups[0].keep": 0.0}, "keep=0.0"),
        ("sparsifiner_micro", {"mix.groups[0].prefix": -1}, "prefix=-1"),
    ],
)
def test_values_that_cannot_be(name, changes, says):
    with pytest.raises(ConfigError) as caught:
        attnkit.build(name, **changes)
    assert says in str(caught.value) or re.search(says, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "path"), [("vit_micro", "depth"), ("bigbird_vit_micro", "stages[1].depth")])
def test_a_depth_that_nobody_can_mean(name, path):
    for depth, said in ((10**9, "must be <= 1000 blocks"), (0, "must be >= 1")):
        with pytest.raises(ConfigError, match=f"depth={depth}: {said}"):
            factory.override(factory.config(name), {path: depth})


@pytest.mark.parametrize("norm_eps", [0.0, -1e-6, float("nan"), float("inf")])
def test_an_epsilon_of_a_stem_that_cannot_be(norm_eps):
    with pytest.raises(ConfigError, match=r"norm_eps=.*must be a finite number > 0"):
        factory.override(factory.config("vit_micro"), {"stem[0].norm_eps": norm_eps})
