"""build: from names, options and dicts, with overrides by name and by path."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import Block, Conv, Dense, HeadMix, Mix, PooledGlobal, RandomWindow
from attnkit.blocks import BlockConfig
from attnkit.errors import AttnkitError, ConfigError
from attnkit.factory import config, override

MICRO = "bigbird_vit_micro"


def pyramid(**more):
    """A pyramid of one block as a plain dict."""
    stage = {"dim": 8, "depth": 1, "mix": {"groups": [{"kind": "conv", "heads": 1}, {"kind": "dense", "heads": 1}]}}
    stem = [{"dim": 8, "kernel": 3, "stride": 2}]
    return {"kind": "pyramid", "stem": stem, "stages": [stage], "num_classes": 3, "img_size": 8, **more}


def refused(*args, **overrides):
    with pytest.raises(AttnkitError) as caught:
        attnkit.build(*args, **overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_model_by_name():
    model = attnkit.build(MICRO, num_classes=7, img_size=24, in_chans=1)
    assert model.training
    assert model(torch.randn(2, 1, 24, 24)).shape == (2, 7)
    assert (model.config.num_classes, model.config.in_chans, model.config.image) == (7, 1, (24, 24))


def test_the_name_alone_is_the_tiny_model():
    assert config("bigbird_vit") == config("bigbird_vit_tiny")


def test_a_deep_override_on_the_full_model():
    with torch.device("meta"):
        model = attnkit.build(
            "bigbird_vit", num_classes=10, img_size=(96, 160), **{"stages[2].mix.groups[1].window": 64}
        )
    assert model.config.num_classes == model.head.out_features == 10 and model.config.img_size == (96, 160)
    windows = [[group.window for group in stage.mix.groups if group.kind == "random_window"]
               for stage in model.config.stages]  # fmt: skip
    assert windows == [[49], [49], [64], [49]]
    used = {block.mix.groups[1].random.window for block in model.stages[2].blocks}
    assert used == {64}


def test_a_deep_override_changes_what_the_small_one_computes():
    models = []
    for more in ({}, {"stages[1].mix.groups[1].window": 2}):
        torch.manual_seed(4)
        models.append(attnkit.build(MICRO, num_classes=10, img_size=(24, 40), **more).eval())
    assert [name for name, _ in models[0].named_parameters()] == [name for name, _ in models[1].named_parameters()]
    x = torch.randn(1, 3, 24, 40)
    plain, changed = (model(x) for model in models)
    assert plain.shape == changed.shape == (1, 10)
    assert not torch.allclose(plain, changed)


def test_a_star_stands_for_every_entry():
    model = attnkit.build(MICRO, **{"stages[*].mix.groups[1].window": 8, "stages[*].mix.groups[*].heads": 1})
    for stage in model.config.stages:
        assert [group.heads for group in stage.mix.groups] == [1, 1, 1]
        assert stage.mix.groups[1].window == 8


def test_dicts_inside_overrides():
    dense = {"kind": "dense", "heads": 3}
    changes = {"stages[0].mix": {"kind": "mix", "groups": [dense]}, "stages[1].mix.groups": [dense, dense]}
    model = attnkit.build(MICRO, num_classes=2, **changes)
    assert model.config.stages[0].mix == Mix([Dense(3)]) and model.config.stages[1].mix == Mix([Dense(3), Dense(3)])
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 2)
    assert attnkit.build(MICRO, **{"stages[0].mix": {"groups": [dense]}}).config.stages[0].mix == Mix([Dense(3)])
    one = {"kind": "dense", "heads": 1}
    assert attnkit.build(MICRO, **{"stages[0].mix.groups[2]": one}).config.stages[0].mix.groups[2] == Dense(1)
    assert attnkit.build(MICRO, block={"norm": "post"}).config.block.norm == "post"


def test_options_as_override_values():
    mix = Mix([Conv(1), PooledGlobal(2, 1)])
    assert attnkit.build(MICRO, **{"stages[1].mix": mix}).config.stages[1].mix == mix


def test_a_mix():
    mix = attnkit.build({"kind": "mix", "dim": 12, "groups": [{"kind": "conv", "heads": 1}, Dense(2)], "out_dim": 6})
    assert isinstance(mix, HeadMix) and mix.options == (Conv(1), Dense(2))
    assert mix(torch.randn(1, 3, 2, 12)).shape == (1, 3, 2, 6)
    assert isinstance(attnkit.build(Mix([Dense(2)], dim=4)), HeadMix)
    assert attnkit.build(Mix([Dense(2)]), dim=4).dim == 4
    assert "needs its width" in refused(Mix([Dense(2)]))


def test_a_block():
    plain = {"kind": "block", "dim": 12, "mix": {"kind": "mix", "groups": [{"kind": "dense", "heads": 3}]}}
    block = attnkit.build(plain, mlp_ratio=2.0)
    assert isinstance(block, Block) and block.mlp.fc1.out_features == 24
    assert block(torch.randn(1, 3, 2, 12)).shape == (1, 3, 2, 12)
    assert isinstance(attnkit.build(BlockConfig(Mix([Dense(3)], dim=12))), Block)
    assert "needs its width" in refused(BlockConfig(Mix([Dense(3)])))


def test_a_pyramid():
    model = attnkit.build(pyramid(), in_chans=2)
    assert model(torch.randn(1, 2, 8, 8)).shape == (1, 3)


def test_a_recipe_as_a_dict():
    plain = {"kind": MICRO, "num_classes": 4, "stages[1].mix.groups[1].window": 3}
    model = attnkit.build(plain, in_chans=1, num_classes=5)
    assert model.config.num_classes == 5 and model.config.in_chans == 1
    assert model.config.stages[1].mix.groups[1] == RandomWindow(2, 3)
    assert plain["kind"] == MICRO


@pytest.mark.parametrize("name", [MICRO, "vit_micro"])
def test_a_models_own_dict_makes_it_again(name):
    model = attnkit.build(name, num_classes=6)
    again = attnkit.build(model.config.to_dict())
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_options_that_only_fit_together_may_be_changed_together():
    changes = {
        "stages[0].mix.groups[0].stride": 2,
        "stages[0].mix.groups[1]": {"kind": "conv", "heads": 1, "stride": 2},
    }
    model = attnkit.build(pyramid(), **changes)
    assert model.config.stages[0].mix.output_stride == 2
    assert "stride" in refused(pyramid(), **{"stages[0].mix.groups[0].stride": 2})


def test_nothing_is_changed_in_place():
    options = config(MICRO)
    before = options.to_dict(full=True)
    changed = override(options, {"num_classes": 3, "stages[0].mix.groups[0].kernel": 5})
    assert options.to_dict(full=True) == before and changed != options
    plain = pyramid()
    attnkit.build(plain, num_classes=9)
    assert plain == pyramid()


def test_all_wrong_paths_are_collected():
    text = refused(
        MICRO,
        num_clases=10,
        img_size="big",
        **{
            "stages[7].mix": 3,
            "stages[1].mix.groups[1].windw": 64,
            "stages[0].mix.groups[1].window": 0,
            "stages..mix": 1,
            "num_classes[0]": 1,
            "in_chans.deep": 1,
            "stages[0]mix": 1,
        },
    )
    for part in (
        "override 'num_clases': unknown option 'num_clases' for 'pyramid'; did you mean 'num_classes'?",
        "override 'stages[7].mix': index 7 is beyond the 2 entries (0..1)",
        "override 'stages[1].mix.groups[1].windw': unknown option 'windw' for 'random_window'; did you mean 'window'?",
        "stages[0].mix.groups[1].window=0: must be >= 1",
        "img_size must be an integer or a list of 2 integers, but got 'big'",
        "override path 'stages..mix' is not of the form",
        "override path 'stages[0]mix' is not of the form",
        "override 'num_classes[0]': there is no list before [0]",
        "override 'in_chans.deep': there are no options before 'deep'",
    ):
        assert part in text


def test_what_is_wrong_in_all_entries_is_said_once():
    assert refused(MICRO, **{"stages[*].mix.groups[1].window": 0}) == "stages[*].mix.groups[1].window=0: must be >= 1"
    assert refused(MICRO, **{"stages[*].depth": "2"}) == "stages[*].depth must be an integer, but got '2'"
    text = refused(MICRO, **{"stages[*].mix.groups[1].windw": 4})
    assert text.startswith("override 'stages[*].mix.groups[1].windw': unknown option 'windw'")
    assert text.count("windw") == 2 and text.count("did you mean") == 1
    text = refused(MICRO, **{"stages[*].mix.groups[*]": None})
    assert text == "stages[*].mix.groups[*] must be primitive options, but got None"
    text = refused(MICRO, **{"stages[*].mix": {"groups": []}})
    assert text == "stages[*].mix.groups=(): a mix needs at least one head group"
    text = refused(MICRO, **{"stages[*].depth": 0, "stages[1].dim": -1})
    assert all(text.count(f"stages[{at}].depth=0: must be >= 1") == 1 for at in "*1")


def test_a_wrong_path_hides_no_wrong_value_beside_it():
    group = "stages[0].mix.groups[1]"
    text = refused(MICRO, **{f"{group}.windw": 4, f"{group}.window": 0, f"{group}.heads": "1", f"{group}.lepe": 2})
    for part in (
        "unknown option 'windw'",
        f"{group}.window=0",
        f"{group}.heads must be",
        f"{group}.lepe=2: must be odd",
    ):
        assert part in text
    assert "but got '1'" in text


def test_what_only_fits_with_a_change_that_failed_is_not_complained_about():
    text = refused(pyramid(), **{"stages[0].mix.groups[0].stride": 2, "stages[0].mix.groups[1].strid": 2})
    assert "unknown option 'strid'" in text and "need one stride" not in text
    text = refused("vit_micro", featurs_only=True, out_indices=(0,), pos_embed="non")
    assert "did you mean 'features_only'" in text and "out_indices=" not in text and "pos_embed must be" in text
    assert "out_indices=(0,): goes with features_only=True" in refused("vit_micro", out_indices=(0,))


def test_long_lists_are_not_printed():
    assert refused(MICRO, **{"stages.depth": 2}) == (
        "override 'stages.depth': a list of 2 stands before 'depth'; add [0], or [*] for all"
    )
    assert len(refused(MICRO, num_classes=[Dense(2)] * 50)) < 200
    assert len(refused(torch.nn.Sequential(*[torch.nn.Linear(2, 2)] * 9))) < 200


def test_mistakes_inside_a_dict_that_overrides():
    groups = [{"kind": "dense", "head": 3}, {"kind": "conf", "heads": 1}]
    text = refused(MICRO, **{"stages[1].mix.groups": groups})
    assert "stages[1].mix.groups[0]: unknown option 'head' for 'dense'; did you mean 'heads'?" in text
    text = refused(MICRO, **{"stages[1].mix": {"groups": groups}})
    assert "stages[1].mix.groups[0]: unknown option 'head' for 'dense'; did you mean 'heads'?" in text
    assert "stages[1].mix.groups[1]: unknown primitive 'conf'; did you mean 'conv'?" in text
    text = refused(MICRO, **{"stages[1].mix": {"kind": "dense", "heads": 2}})
    assert "stages[1].mix: kind 'dense' does not fit here; Mix is expected" in text
    text = refused(MICRO, **{"stages[1].mix": Dense(2)})
    assert "stages[1].mix must be Mix options, but got Dense(heads=2" in text


def test_a_primitive_alone_needs_a_mix():
    for alone in ({"kind": "dense", "heads": 2}, Dense(2)):
        text = refused(alone)
        assert "'dense' is a head group, which needs a mix around it" in text
        assert "{'kind': 'mix', 'dim': 96, 'groups': [{'kind': 'dense', 'heads': 2}]}" in text


@pytest.mark.parametrize(
    "plain",
    [
        {"kind": "conv_norm", "dim": 8, "kernel": 3, "stride": 1},
        {"kind": "stage", "dim": 8, "depth": 1, "mix": {"groups": [{"kind": "dense", "heads": 1}]}},
        {"kind": "block_style"},
    ],
)
def test_parts_of_a_model_alone_are_refused(plain):
    assert repr(plain["kind"]) in refused(plain) and "head group" not in refused(plain)


def test_unknown_names():
    assert "unknown model 'bigbird_vit_mirco'; did you mean 'bigbird_vit_micro'?" in refused("bigbird_vit_mirco")
    assert "unknown kind 'pyramidd'; did you mean 'pyramid'?" in refused(pyramid(kind="pyramidd"))
    assert "unknown kind 'vit_mirco'; did you mean 'vit_micro'?" in refused({"kind": "vit_mirco"})
    assert "needs a 'kind'" in refused({"dim": 8})
    assert "needs a 'kind'" in refused({"kind": 3})


@pytest.mark.parametrize("wrong", [None, 3, ["vit_micro"], torch.nn.Linear(1, 1), Dense])
def test_what_is_neither_name_nor_options(wrong):
    assert "build needs a model's name, options or a plain dict, but got" in refused(wrong)


@pytest.mark.parametrize("kind", ["mix", MICRO])
def test_keys_that_are_no_strings(kind):
    assert "3" in refused({"kind": kind, 3: 4})


def test_errors_are_config_errors():
    for wrong in (None, "vit_mirco", {"kind": "mix", "groups": []}):
        with pytest.raises(ConfigError):
            attnkit.build(wrong)
