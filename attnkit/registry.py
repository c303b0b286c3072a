"""Names to classes: literal tables of strings, read on use; nothing registers itself on import."""

from __future__ import annotations

import fnmatch
import importlib
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from attnkit.errors import ConfigError, did_you_mean, listing, shown
from attnkit.options import Options, resolve_kinds_with

PRIMITIVES: dict[str, str] = {
    "dense": "attnkit.primitives.dense:Dense",
    "window": "attnkit.primitives.window:Window",
    "cross_shaped": "attnkit.primitives.cross_shaped:CrossShaped",
    "neighborhood": "attnkit.primitives.neighborhood:Neighborhood",
    "linformer": "attnkit.primitives.linformer:Linformer",
    "topk_region": "attnkit.primitives.topk_region:TopKRegion",
    "soft_topk_region": "attnkit.primitives.soft_topk_region:SoftTopKRegion",
    "padded_topk_region": "attnkit.primitives.padded_topk_region:PaddedTopKRegion",
    "mask_predictor": "attnkit.primitives.mask_predictor:MaskPredictor",
    "threshold_mask_predictor": "attnkit.primitives.threshold_mask_predictor:ThresholdMaskPredictor",
    "competing_mask_predictor": "attnkit.primitives.competing_mask_predictor:CompetingMaskPredictor",
    "mask_reconstruction": "attnkit.primitives.mask_reconstruction:MaskReconstruction",
    "learned_query": "attnkit.primitives.learned_query:LearnedQuery",
    "learned_upsample": "attnkit.primitives.learned_upsample:LearnedUpsample",
    "random_window": "attnkit.primitives.random_window:RandomWindow",
    "pooled_global": "attnkit.primitives.pooled_global:PooledGlobal",
    "conv": "attnkit.primitives.conv:Conv",
}

STRUCTURES: dict[str, str] = {
    "mix": "attnkit.mixes:Mix",
    "block": "attnkit.blocks:BlockConfig",
    "block_style": "attnkit.blocks:BlockStyle",
    "conv_norm": "attnkit_models.backbones.stem:ConvNorm",
    "stage": "attnkit_models.backbones.pyramid:Stage",
    "pyramid": "attnkit_models.backbones.pyramid:PyramidConfig",
    "isotropic": "attnkit_models.backbones.isotropic:IsotropicConfig",
}

# Structures that only stand inside others.
PARTS = ("block_style", "conv_norm", "stage")

RECIPES: dict[str, str] = {
    "bigbird_vit": "attnkit_models.bigbird:bigbird_vit_tiny",
    "bigbird_vit_micro": "attnkit_models.bigbird:bigbird_vit_micro",
    "bigbird_vit_tiny": "attnkit_models.bigbird:bigbird_vit_tiny",
    "bigbird_vit_small": "attnkit_models.bigbird:bigbird_vit_small",
    "bigbird_vit_base": "attnkit_models.bigbird:bigbird_vit_base",
    "bigbird_vit_tiny_lineage": "attnkit_models.bigbird:bigbird_vit_tiny_lineage",
    "bigbird_vit_small_lineage": "attnkit_models.bigbird:bigbird_vit_small_lineage",
    "bigbird_vit_base_lineage": "attnkit_models.bigbird:bigbird_vit_base_lineage",
    "biformer_micro": "attnkit_models.biformer:biformer_micro",
    "biformer_tiny": "attnkit_models.biformer:biformer_tiny",
    "biformer_small": "attnkit_models.biformer:biformer_small",
    "biformer_base": "attnkit_models.biformer:biformer_base",
    "biformer_stl": "attnkit_models.biformer:biformer_stl",
    "biformer_stl_nchw": "attnkit_models.biformer:biformer_stl_nchw",
    "sparsifiner_micro": "attnkit_models.sparsifiner:sparsifiner_micro",
    "sparsifiner_deit_tiny": "attnkit_models.sparsifiner:sparsifiner_deit_tiny",
    "sparsifiner_deit_small": "attnkit_models.sparsifiner:sparsifiner_deit_small",
    "sparsifiner_deit_base": "attnkit_models.sparsifiner:sparsifiner_deit_base",
    "sparsifiner_lvvit_small": "attnkit_models.sparsifiner:sparsifiner_lvvit_small",
    "qna_vit_micro": "attnkit_models.qna:qna_vit_micro",
    "qna_vit_tiny": "attnkit_models.qna:qna_vit_tiny",
    "qna_vit_tiny_7x7": "attnkit_models.qna:qna_vit_tiny_7x7",
    "qna_vit_small": "attnkit_models.qna:qna_vit_small",
    "qna_vit_base": "attnkit_models.qna:qna_vit_base",
    "vit_micro": "attnkit_models.vit:vit_micro",
    "vit_tiny": "attnkit_models.vit:vit_tiny",
    "vit_small": "attnkit_models.vit:vit_small",
    "vit_base": "attnkit_models.vit:vit_base",
}

# In the order in which equal costs are settled.
BACKENDS: dict[str, str] = {
    "sdpa": "attnkit.kernels.sdpa:SdpaBackend",
    "triton": "attnkit.kernels.triton.backend:TritonBackend",
    "chunked": "attnkit.kernels.chunked.backend:ChunkedBackend",
    "gather": "attnkit.kernels.gather:GatherBackend",
    "flex": "attnkit.kernels.flex:FlexBackend",
    "xformers": "attnkit.kernels.xformers:XFormersBackend",
    "reference": "attnkit.kernels.reference:ReferenceBackend",
}

COMMANDS: dict[str, str] = {
    "train": "attnkit_models.train.command:train",
    "predict": "attnkit_models.train.command:predict",
    "convert": "attnkit_models.checkpoints.convert:convert",
    "bench": "attnkit_models.bench.command:bench",
}

PRIMITIVE_ENTRY_POINTS = "attnkit.primitives"

_registered: dict[str, type[Options]] = {}


def load(target: str) -> Any:
    """Imports `"module:name"` and returns the named object."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "attnkit_models":
            raise ConfigError(
                f"{target} lives in the package attnkit_models, which is not installed; run: pip install attnkit"
            ) from error
        raise


def register_primitive(name: str, options: type[Options]) -> None:
    """Makes a primitive of your own known by name in this process.

    A package does the same for all who install it with an entry point in the group `attnkit.primitives`.

    Args:
        name: the name, as used in `{"kind": name}`; becomes the class's `kind` where it has none.
        options: the options class, a frozen dataclass that derives from `attnkit.primitives.PrimitiveOptions`.

    Raises:
        ConfigError: if the name is taken, differs from the class's `kind`, or `options` is no such class.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a primitive's name is a string such as 'my_window', but got {shown(name)}")
    if not _buildable(options):
        raise ConfigError(
            f"register_primitive({name!r}, ...) needs a class derived from attnkit.primitives.PrimitiveOptions, "
            f"but got {shown(options)}"
        )
    if options.kind and options.kind != name:
        raise ConfigError(f"{options.__name__}.kind is {options.kind!r} but it is being registered as {name!r}")
    taken: Any = _own(name) or _registered.get(name) or ", ".join(point.value for point in _plugins().get(name, ()))
    if taken and taken is not options:
        raise ConfigError(f"primitive {name!r} is already registered by {taken}; choose another name")
    options.kind = name
    _registered[name] = options


def unregister_primitive(name: str) -> None:
    """Forgets a primitive that `register_primitive` made known."""
    if not isinstance(name, str) or name not in _registered:
        known = listing(_registered)
        raise ConfigError(f"no primitive {shown(name)} was registered in this process (registered: {known})")
    del _registered[name]


def _own(name: str) -> str | None:
    """What attnkit itself means by a name."""
    return PRIMITIVES.get(name) or STRUCTURES.get(name) or RECIPES.get(name)


def _buildable(options: Any) -> bool:
    return isinstance(options, type) and issubclass(options, Options) and hasattr(options, "build")


def _plugins() -> dict[str, list[EntryPoint]]:
    """Entry points by name; several under one name are an error only for who asks for that name."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=PRIMITIVE_ENTRY_POINTS):
        if _own(point.name):
            warnings.warn(
                f"entry point {point.name!r} ({point.value}) is left out: attnkit has that name", stacklevel=3
            )
        elif all(one.value != point.value for one in found.get(point.name, ())):
            found.setdefault(point.name, []).append(point)
    return found


def _plugin_class(name: str, points: list[EntryPoint]) -> type[Options]:
    named = " and ".join(point.value for point in points)
    if len(points) > 1:
        raise ConfigError(f"primitive {name!r} is registered by several packages: {named}; uninstall all but one")
    try:
        options = points[0].load()
    except Exception as error:
        raise ConfigError(f"entry point {name!r} ({named}) does not load: {error}") from error
    if not _buildable(options) or options.kind not in ("", name):
        raise ConfigError(f"entry point {name!r} ({named}) must name an options class of kind {name!r}")
    options.kind = name
    return options


def primitive_class(name: str) -> type[Options]:
    """Returns the options class of a primitive by name.

    Raises:
        ConfigError: if no primitive has that name, naming the nearest one.
    """
    if isinstance(name, str):
        if name in PRIMITIVES:
            return load(PRIMITIVES[name])
        if name in _registered:
            return _registered[name]
        plugins = _plugins()
        if name in plugins:
            return _plugin_class(name, plugins[name])
    names = list_primitives()
    raise ConfigError(f"unknown primitive {shown(name)}{did_you_mean(name, names)} (primitives: {', '.join(names)})")


def recipe(name: str) -> Callable[[], Options]:
    """Returns the function that makes a recipe's configuration.

    Raises:
        ConfigError: if no recipe has that name, naming the nearest one.
    """
    if not isinstance(name, str) or name not in RECIPES:
        if isinstance(name, str) and name in list_primitives():
            raise ConfigError(
                f"{name!r} is a primitive and not a model; `attnkit show {name}` tells of it, and "
                f"attnkit.HeadMix puts it into a layer"
            )
        raise ConfigError(
            f"unknown model {shown(name)}{did_you_mean(name, RECIPES)} "
            f"(see attnkit.list_models() for all {len(RECIPES)})"
        )
    return load(RECIPES[name])


def list_models(pattern: str = "*") -> list[str]:
    """Names of all recipes, for `attnkit.build`.

    Args:
        pattern: shell-style, such as `"biformer*"`, `"*_micro"`.

    Returns:
        The names that match, sorted; an empty list where none does.

    Raises:
        ConfigError: if the pattern is no string.
    """
    return _matching(RECIPES, pattern)


def list_primitives(pattern: str = "*") -> list[str]:
    """Names of all primitives, for `{"kind": name}`: attnkit's own, registered ones, and those of installed packages.

    Args:
        pattern: shell-style, such as `"*region"`.

    Returns:
        The names that match, sorted; an empty list where none does.

    Raises:
        ConfigError: if the pattern is no string.
    """
    return _matching({**PRIMITIVES, **_registered, **_plugins()}, pattern)


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    if not isinstance(pattern, str):
        raise ConfigError(f"pattern must be a string such as 'biformer*', but got {shown(pattern)}")
    return sorted(fnmatch.filter(names, pattern))


def _resolve_kind(kind: str, base: type[Options], path: str) -> type[Options]:
    where = f"{path}: " if path else ""
    if not isinstance(kind, str):
        raise ConfigError(f"{where}'kind' is a name such as 'dense', but got {shown(kind)}")
    if kind in STRUCTURES:
        cls = load(STRUCTURES[kind])
    else:
        try:
            cls = primitive_class(kind)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
    if not issubclass(cls, base):
        raise ConfigError(f"{where}kind {kind!r} does not fit here; {base.__name__} is expected")
    return cls


resolve_kinds_with(_resolve_kind)
