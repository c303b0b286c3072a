"""The names that everything else is built on, and the first parameters they keep."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import attnkit
import attnkit_models
from attnkit.registry import PRIMITIVES, load

FIRST_PARAMETERS = {
    "build": ("name_or_config",),
    "list_models": ("pattern",),
    "list_primitives": ("pattern",),
    "attend": ("q", "k", "v", "layout"),
    "explain": ("model_or_layer", "image_size"),
    "flops": ("model", "image_size"),
    "use_backend": ("name",),
    "HeadMix": ("dim", "groups"),
    "Block": ("dim", "groups", "mlp_ratio"),
    "Dense": ("heads",),
    "TopKRegion": ("heads", "regions", "topk"),
    "MaskPredictor": ("heads", "tokens", "keep"),
    "LearnedQuery": ("heads", "kernel"),
    "LearnedUpsample": ("heads", "kernel"),
    "RandomWindow": ("heads", "window"),
    "PooledGlobal": ("heads", "pool"),
    "Conv": ("heads",),
    "Window": ("heads", "window"),
    "CrossShaped": ("heads", "stripe"),
    "Neighborhood": ("heads", "kernel"),
    "Linformer": ("heads", "tokens", "rank"),
    "layouts.Blocks.from_regions": ("grid", "regions_per_side", "index"),
    "testing.check_primitive": ("options",),
    "testing.random_layout": ("kind", "grid"),
    "HeadMix.forward": ("self", "x", "grid"),
    "Block.forward": ("self", "x", "grid"),
}
KEYWORDS = {
    "attend": {"scale", "bias", "backend", "return_lse", "gain"},
    "testing.random_layout": {"batch", "heads", "seed"},
    "Grid": {"prefix", "height", "width"},
}


def found(path):
    value = attnkit
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("name", attnkit.__all__)
def test_every_public_name_resolves(name):
    assert getattr(attnkit, name) is getattr(attnkit, name)
    assert name in dir(attnkit)
    value = getattr(attnkit, name)
    assert inspect.getdoc(value)


@pytest.mark.parametrize(
    "module", [attnkit.layouts, attnkit.kernels, attnkit.primitives, attnkit.testing, attnkit.errors]
)
def test_every_public_name_of_a_module_resolves(module):
    names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
    assert names
    for name in names:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("path", sorted(FIRST_PARAMETERS))
def test_first_parameters(path):
    parameters = list(inspect.signature(found(path)).parameters.values())
    first = FIRST_PARAMETERS[path]
    assert tuple(one.name for one in parameters[: len(first)]) == first
    assert all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters[: len(first)])
    if inspect.isclass(found(path)) and path not in ("HeadMix", "Block", "use_backend"):
        assert all(one.kind is one.KEYWORD_ONLY for one in parameters[len(first) :])


@pytest.mark.parametrize("path", sorted(KEYWORDS))
def test_keywords(path):
    parameters = inspect.signature(found(path)).parameters
    named = {name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert KEYWORDS[path] <= named


def test_layouts():
    for name in ("Dense", "Stencil", "Blocks", "TokenSets", "TokenMask"):
        layout = found(f"layouts.{name}")
        assert {"to_mask", "density", "flops"} <= set(dir(layout))


def test_the_error_family():
    family = [
        one for one in vars(attnkit.errors).values() if inspect.isclass(one) and one.__module__ == "attnkit.errors"
    ]
    assert len(family) >= 8
    assert all(issubclass(one, attnkit.errors.AttnkitError) for one in family)
    assert issubclass(attnkit.errors.AttnkitError, ValueError) and attnkit.AttnkitError is attnkit.errors.AttnkitError
    assert issubclass(attnkit.errors.MissingExtraError, ImportError)


def test_the_six_papers_and_the_rest_are_registered():
    kinds = {cls.kind: name for name in attnkit.__all__ if isinstance(cls := getattr(attnkit, name), type)
             and issubclass(cls, attnkit.primitives.PrimitiveOptions)}  # fmt: skip
    assert sorted(kinds) == attnkit.list_primitives()
    for kind, name in kinds.items():
        assert name.lower() == kind.replace("_", "")


def test_type_checkers_see_the_primitives_of_the_table():
    place = Path(attnkit.__file__).parent / "primitives" / "classes.py"
    lines = place.read_text().splitlines()
    wanted = []
    for target in PRIMITIVES.values():
        module, _, name = target.partition(":")
        wanted += [f"from {module} import {name}", f'    "{name}",']
    missing = [line for line in wanted if line not in lines]
    assert not missing, f"add to {place}:\n" + "\n".join(missing)
    surplus = [line for line in lines if line.startswith(("from ", " ")) and line not in wanted]
    assert not surplus, f"remove from {place}, or add to PRIMITIVES in attnkit/registry.py:\n" + "\n".join(surplus)


@pytest.mark.parametrize("target", PRIMITIVES.values())
def test_a_line_of_the_table_is_a_public_name(target):
    name = target.partition(":")[2]
    for module in (attnkit, attnkit.primitives):
        assert name in module.__all__ and name in dir(module)
        assert getattr(module, name) is load(target)


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'attnkit' has no attribute 'bild'"):
        attnkit.bild  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'attnkit\.primitives' has no attribute 'Windw'"):
        attnkit.primitives.Windw  # noqa: B018


def test_the_models_package_has_the_names_for_official_weights():
    for name, first in (
        ("import_official", ["name", "state_dict", "hparams"]),
        ("export_official", ["name", "model"]),
        ("import_official_layer", ["upstream_class", "state_dict", "hparams"]),
    ):
        assert list(inspect.signature(getattr(attnkit_models, name)).parameters)[: len(first)] == first


def test_documented_calls():
    x = torch.randn(1, 6, 6, 12)
    groups = [attnkit.Conv(heads=2), attnkit.RandomWindow(heads=2, window=9), attnkit.PooledGlobal(heads=2, pool=4)]
    mix = attnkit.HeadMix(12, groups)
    assert mix(x).shape == x.shape
    assert mix(torch.randn(1, 37, 12), attnkit.Grid(6, 6, prefix=1)).shape == (1, 37, 12)
    with attnkit.use_backend("reference"):
        assert attnkit.Block(12, groups, 2.0)(x).shape == x.shape
    layout, (queries, keys) = attnkit.testing.random_layout("blocks", attnkit.Grid(3, 4), batch=2, heads=2, seed=1)
    q, k = torch.randn(2, 2, queries, 4), torch.randn(2, 2, keys, 4)
    assert attnkit.attend(q, k, k, layout, scale=None, bias=None, backend=None).shape == q.shape
    assert attnkit.flops(attnkit.build("bigbird_vit_micro"), 32).total > 0
