"""The registry: names, patterns, third parties' primitives and plugins."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import attnkit
from attnkit import Dense, HeadMix, registry
from attnkit.errors import AttnkitError, ConfigError
from attnkit.layouts import Dense as DenseLayout
from attnkit.options import Options
from attnkit.primitives import Plan, SoftmaxHeads, SoftmaxOptions


class TwiceAsSharpHeads(SoftmaxHeads):
    def plan(self, inputs):
        return Plan(DenseLayout(inputs.grid.tokens))


def sharp_class(kind=""):
    """A primitive of one's own, each time another class."""

    @dataclass(frozen=True)
    class Sharp(SoftmaxOptions):
        sharpness: int

        def problems(self):
            return [*super().problems(), *([] if self.sharpness > 0 else [f"sharpness={self.sharpness}: must be > 0"])]

        def build(self, context):
            return TwiceAsSharpHeads(self, context)

    Sharp.kind = kind
    return Sharp


@pytest.fixture
def registered():
    """Registers a primitive and forgets it afterwards."""
    names = []

    def register(name, options):
        attnkit.register_primitive(name, options)
        names.append(name)
        return options

    yield register
    for name in names:
        if name in registry._registered:
            registry.unregister_primitive(name)


@pytest.fixture
def plugins(monkeypatch):
    """Makes entry points visible as if packages with them were installed."""
    points = []

    def entry_points(*, group):
        assert group == "attnkit.primitives"
        return points

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return lambda name, value: points.append(EntryPoint(name, value, "attnkit.primitives"))


@pytest.mark.parametrize("pattern", ["*", "biformer*", "*_micro", "vit_[ts]*", "vit_????", "nothing*"])
def test_models_by_pattern(pattern):
    names = attnkit.list_models(pattern)
    assert names == sorted(name for name in registry.RECIPES if fnmatch.fnmatchcase(name, pattern))


def test_models_that_must_be_there():
    sizes = ("micro", "tiny", "small", "base")
    needed = {"bigbird_vit", "biformer_stl", "biformer_stl_nchw", "biformer_micro", "sparsifiner_micro"}
    needed |= {f"{family}_{size}" for family in ("bigbird_vit", "vit") for size in sizes}
    needed |= {f"biformer_{size}" for size in sizes[1:]} | {f"sparsifiner_deit_{size}" for size in sizes[1:]}
    needed |= {"sparsifiner_lvvit_small", "qna_vit_micro", "qna_vit_tiny_7x7", *(f"qna_vit_{s}" for s in sizes[1:])}
    assert needed <= set(attnkit.list_models())


def test_primitives_by_pattern():
    assert attnkit.list_primitives() == sorted(registry.PRIMITIVES)
    assert attnkit.list_primitives("*window*") == ["random_window", "window"]
    assert attnkit.list_primitives("?????") == ["dense"]


@pytest.mark.parametrize("function", [attnkit.list_models, attnkit.list_primitives])
@pytest.mark.parametrize("pattern", [None, 3, ["a"]])
def test_patterns_are_strings(function, pattern):
    with pytest.raises(ConfigError, match=r"pattern must be a string.*but got"):
        function(pattern)


@pytest.mark.parametrize("name", [None, [], {"kind": "dense"}, {3}])
def test_what_is_no_name_is_unknown(name):
    for function, said in (
        (registry.primitive_class, "unknown primitive"),
        (registry.recipe, "unknown model"),
        (registry.unregister_primitive, "no primitive"),
    ):
        with pytest.raises(ConfigError, match=said):
            function(name)


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(ConfigError, match="unknown primitive 'randomwindow'; did you mean 'random_window'"):
        registry.primitive_class("randomwindow")
    with pytest.raises(ConfigError, match=r"unknown model 'bigbird_vit_tniy'; did you mean 'bigbird_vit_tiny'\?"):
        registry.recipe("bigbird_vit_tniy")
    with pytest.raises(ConfigError) as caught:
        registry.primitive_class("zzz")
    assert "did you mean" not in str(caught.value) and "random_window" in str(caught.value)


@pytest.mark.parametrize("table", ["PRIMITIVES", "STRUCTURES", "RECIPES"])
def test_every_entry_names_something_that_exists(table):
    for target in getattr(registry, table).values():
        assert callable(registry.load(target)), target


def test_a_primitive_of_ones_own_in_a_mix(registered):
    sharp = registered("sharp", sharp_class())
    assert sharp.kind == "sharp" and "sharp" in attnkit.list_primitives() and "sharp" in attnkit.list_primitives("sh*")
    assert registry.primitive_class("sharp") is sharp
    torch.manual_seed(3)
    mix = HeadMix(16, [{"kind": "sharp", "heads": 2, "sharpness": 1}, {"kind": "conv", "heads": 2}]).eval()
    torch.manual_seed(3)
    other = HeadMix(16, [Dense(2), attnkit.Conv(2)]).eval()
    x = torch.randn(2, 3, 4, 16)
    assert torch.equal(mix(x), other(x))
    assert mix.options[0] == sharp(2, 1)
    assert attnkit.build({"kind": "mix", "dim": 8, "groups": [sharp(2, 4).to_dict()]}).options[0].sharpness == 4


def test_its_mistakes_are_named_like_any_other(registered):
    registered("sharp", sharp_class())
    with pytest.raises(ConfigError, match=r"groups\[0\]: unknown option 'sharpnes' for 'sharp'; did you mean 'sharpn"):
        HeadMix(16, [{"kind": "sharp", "heads": 2, "sharpnes": 1}])
    with pytest.raises(ConfigError, match=r"groups\[1\].*sharpness=0: must be > 0"):
        HeadMix(16, [Dense(2), {"kind": "sharp", "heads": 2, "sharpness": 0}])
    with pytest.raises(ConfigError, match="unknown primitive 'shap'; did you mean 'sharp'"):
        HeadMix(16, [{"kind": "shap", "heads": 2}])


def test_forgetting(registered):
    registered("sharp", sharp_class())
    registry.unregister_primitive("sharp")
    assert "sharp" not in attnkit.list_primitives()
    with pytest.raises(ConfigError, match="unknown primitive 'sharp'"):
        registry.primitive_class("sharp")
    for name in ("sharp", "dense"):
        with pytest.raises(ConfigError, match=f"no primitive '{name}' was registered in this process"):
            registry.unregister_primitive(name)


def test_a_taken_name_is_refused(registered):
    sharp = registered("sharp", sharp_class())
    registered("sharp", sharp)
    with pytest.raises(ConfigError, match=r"'sharp' is already registered by .*choose another name"):
        attnkit.register_primitive("sharp", sharp_class())
    assert registry.primitive_class("sharp") is sharp
    with pytest.raises(ConfigError, match=r"primitive 'dense' is already registered by attnkit.primitives.dense:Dense"):
        attnkit.register_primitive("dense", sharp_class())
    assert registry.primitive_class("dense") is Dense
    for name in ("mix", "vit_tiny"):
        with pytest.raises(ConfigError, match=f"'{name}' is already registered by .*choose another name"):
            attnkit.register_primitive(name, sharp_class())


def test_another_kind_than_the_name_is_refused():
    with pytest.raises(ConfigError, match=r"Sharp.kind is 'sharp' but it is being registered as 'blunt'"):
        attnkit.register_primitive("blunt", sharp_class("sharp"))
    assert "blunt" not in attnkit.list_primitives()


@pytest.mark.parametrize("wrong", [None, 3, dict, Options, "sharp", Dense(2), torch.nn.Linear])
def test_what_is_no_options_class_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"needs a class derived from attnkit.primitives.PrimitiveOptions"):
        attnkit.register_primitive("sharp", wrong)
    assert "sharp" not in attnkit.list_primitives()


@pytest.mark.parametrize("name", [3, None, "", ["a"]])
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(AttnkitError):
        attnkit.register_primitive(name, sharp_class())
    assert name not in list(registry._registered)


@dataclass(frozen=True)
class Plugged(Dense):
    kind: ClassVar[str] = ""


@pytest.fixture
def module(monkeypatch):
    """A module that an entry point can name."""
    fake = types.ModuleType("a_plugin")
    fake.Plugged, fake.number = type("Plugged", (Plugged,), {"kind": ""}), 3
    monkeypatch.setitem(sys.modules, "a_plugin", fake)
    return fake


def test_a_plugin_is_found_by_name(plugins, module):
    plugins("plugged", "a_plugin:Plugged")
    assert "plugged" in attnkit.list_primitives()
    assert registry.primitive_class("plugged") is module.Plugged
    assert HeadMix(8, [{"kind": "plugged", "heads": 2}]).options[0].kind == "plugged"


@pytest.mark.parametrize("value", ["a_plugin_that_is_not_there:Thing", "a_plugin:Missing", "a_plugin:number"])
def test_a_broken_plugin_fails_only_under_its_own_name(plugins, module, value):
    plugins("broken", value)
    plugins("plugged", "a_plugin:Plugged")
    assert {"broken", "plugged", "dense"} <= set(attnkit.list_primitives())
    assert HeadMix(8, [{"kind": "plugged", "heads": 1}, {"kind": "dense", "heads": 1}])(torch.randn(1, 2, 2, 8)).shape
    with pytest.raises(ConfigError, match="unknown primitive 'dens'; did you mean 'dense'"):
        registry.primitive_class("dens")
    with pytest.raises(AttnkitError, match="broken") as caught:
        HeadMix(8, [{"kind": "broken", "heads": 2}])
    assert value in str(caught.value)


def test_plugins_may_not_take_each_others_names(plugins, module):
    plugins("plugged", "a_plugin:Plugged")
    with pytest.raises(ConfigError, match="'plugged' is already registered"):
        attnkit.register_primitive("plugged", sharp_class())
    assert registry.primitive_class("plugged") is module.Plugged
    plugins("plugged", "another:Thing")
    plugins("single", "a_plugin:Plugged")
    with pytest.raises(ConfigError, match="'plugged' is registered by several packages: a_plugin:Plugged and another"):
        registry.primitive_class("plugged")
    module.Plugged.kind = ""
    assert registry.primitive_class("single") is module.Plugged


@pytest.mark.parametrize("name", ["dense", "mix", "vit_tiny"])
def test_a_plugin_may_not_take_a_name_of_attnkit(plugins, module, name):
    plugins(name, "a_plugin:Plugged")
    plugins("plugged", "a_plugin:Plugged")
    with pytest.warns(UserWarning, match=rf"entry point '{name}' \(a_plugin:Plugged\) is left out"):
        assert attnkit.list_primitives() == sorted([*registry.PRIMITIVES, "plugged"])
    assert registry.primitive_class("dense") is Dense


def test_importing_registers_and_loads_nothing():
    code = (
        "import json, sys, attnkit; first = sorted(n for n in sys.modules if n.startswith('attnkit'));"
        "import attnkit.registry as r; r.list_models(); r.list_primitives();"
        "print(json.dumps([first, sorted(n for n in sys.modules if n.startswith('attnkit')), list(r._registered)]))"
    )
    root = Path(attnkit.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    first, later, names = json.loads(done.stdout)
    assert (
        first
        == later
        == [
            "attnkit",
            *(f"attnkit.{name}" for name in ("annotations", "arguments", "errors", "options", "registry")),
        ]
    )
    assert names == []
