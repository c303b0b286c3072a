"""Vision Big Bird (Zhang and Gong 2023, arXiv 2311.05988): conv, random-window and pooled-global heads side by side.

The paper's table of widths, depths and head splits is not public. The table here is ours, fitted to the totals it
reports at 224 x 224 pixels (T: 29 M parameters and 5.1 G multiply-adds; B: 85 M and 15.8 G); `small` and `micro` have
no counterpart in the paper. The accuracies it reports belong to its own configuration, not to these.

From the paper's abstract: the three groups of heads, and that no position encoding is needed. Ours: everything else,
such as equal thirds of heads, 49 tokens per random window, pooled cells of 8, 4, 2 and 1 tokens per side, a depthwise
3 x 3 convolution with a pointwise one behind it, a new permutation per layer and pass, and one fixed one in evaluation.

The `_lineage` models have the widths and depths of CSWin (arXiv 2107.00652), from which the paper's lineage descends.
They have fewer parameters and multiply-adds than the paper reports, so its table must be another one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from attnkit.annotations import mismatches
from attnkit.arguments import name_mistakes
from attnkit.errors import ConfigError
from attnkit.mixes import Mix
from attnkit.primitives import Conv, PooledGlobal, RandomWindow
from attnkit_models.backbones import ConvNorm, PyramidConfig, Stage

INTEGERS = tuple[int, ...]
SPLITS = tuple[tuple[int, int, int], ...]

# Heads of conv, random windows and pooled keys in every stage.
THIRDS = ((1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8))
QUARTERS = ((1, 2, 1), (2, 4, 2), (4, 8, 4), (8, 16, 8))


def bigbird(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    heads: tuple[tuple[int, int, int], ...],
    *,
    pools: tuple[int, ...] = (8, 4, 2, 1),
    windows: tuple[int, ...] = (49, 49, 49, 49),
    seed: int = 0,
    resample: int = 1,
    eval_draws: int = 1,
    stem: ConvNorm | None = None,
    drop_path: float = 0.0,
    img_size: int = 224,
    **unknown: object,
) -> PyramidConfig:
    """A pyramid of Big Bird mixes without any position encoding.

    Args:
        dims: width of every stage.
        depths: blocks of every stage.
        heads: heads of every stage for conv, random windows and pooled keys; a kind with 0 heads is left out.
        pools: tokens per side of a pooled cell, per stage.
        windows: tokens per random window, per stage.
        seed: seed of the random windows.
        resample: training passes between new random windows, 0 for never.
        eval_draws: random draws over which evaluation averages the logits.
        stem: the first convolution; 7 x 7 with stride 4 where not given.
        drop_path: drop rate of the last block.
        img_size: side of the images it is made for in pixels.
        unknown: nothing; names that are none of these are told apart from them in an error.

    Raises:
        ConfigError: for values of another type, lists of different length, and a stage without heads.
    """
    given: dict[str, tuple[Any, ...]] = {"dims": dims, "depths": depths, "heads": heads}
    given |= {"pools": pools, "windows": windows}
    given = {name: _tuple(value) for name, value in given.items()}
    _check(given, [str(name) for name in unknown])
    dims, depths, heads, pools, windows = given.values()
    stages = []
    for at, (dim, depth, split, pool, window) in enumerate(zip(dims, depths, heads, pools, windows, strict=True)):
        random = partial(RandomWindow, window=window, seed=seed, resample=resample)
        kinds = (Conv, random, partial(PooledGlobal, pool=pool))
        groups = tuple(kind(heads=count) for kind, count in zip(kinds, split, strict=True) if count)
        merge = ConvNorm(dim, 3, 2) if at else None
        stages.append(Stage(dim, depth, Mix(groups), merge=merge))
    return PyramidConfig(
        (stem or ConvNorm(dims[0], 7, 4),),
        tuple(stages),
        drop_path=drop_path,
        img_size=img_size,
        eval_draws=eval_draws,
    )


def _tuple(value: Any) -> Any:
    return tuple(_tuple(one) for one in value) if isinstance(value, (list, tuple)) else value


def _check(given: Mapping[str, tuple[Any, ...]], unknown: list[str]) -> None:
    """Raises one error about everything in `bigbird`'s arguments that cannot be meant."""
    options = list(inspect.signature(bigbird).parameters)[:-1]
    found = name_mistakes(unknown, options, {}, "bigbird")[0]
    wrong = {name: mismatches(value, SPLITS if name == "heads" else INTEGERS, name) for name, value in given.items()}
    found += [f"{where}{says}" for one in wrong.values() for where, says in one]
    if not wrong["dims"]:
        stages = len(given["dims"])
        found += [
            f"{name}={value}: needs one entry for each of the {stages} stages in dims"
            for name, value in given.items()
            if not wrong[name] and len(value) != stages
        ]
        found += [] if stages else ["dims=(): needs at least one stage"]
    if not wrong["heads"]:
        splits = enumerate(given["heads"])
        found += [f"heads[{at}]={split}: a stage needs at least one head" for at, split in splits if not any(split)]
    if found:
        raise ConfigError("; ".join(found))


def bigbird_vit_micro() -> PyramidConfig:
    """For small images and demos: two stages, 32 x 32 pixels."""
    stem = ConvNorm(48, 5, 4)
    return bigbird((48, 96), (2, 2), THIRDS[:2], pools=(2, 1), windows=(16, 16), stem=stem, img_size=32)


def bigbird_vit_tiny() -> PyramidConfig:
    """28.4 M parameters; the paper reports 29 M for its T."""
    return bigbird((72, 144, 288, 576), (2, 4, 18, 2), THIRDS, drop_path=0.2)


def bigbird_vit_small() -> PyramidConfig:
    """50.2 M parameters; between the paper's two."""
    return bigbird((96, 192, 384, 768), (2, 4, 18, 2), THIRDS, drop_path=0.3)


def bigbird_vit_base() -> PyramidConfig:
    """86.1 M parameters; the paper reports 85 M for its B."""
    return bigbird((120, 240, 480, 960), (2, 4, 21, 2), THIRDS, drop_path=0.5)


def bigbird_vit_tiny_lineage() -> PyramidConfig:
    """CSWin-T's table: 21.5 M parameters, 3.9 G multiply-adds."""
    return bigbird((64, 128, 256, 512), (1, 2, 21, 1), QUARTERS, drop_path=0.2)


def bigbird_vit_small_lineage() -> PyramidConfig:
    """CSWin-S's table: 33.4 M parameters, 6.1 G multiply-adds."""
    return bigbird((64, 128, 256, 512), (2, 4, 32, 2), QUARTERS, drop_path=0.3)


def bigbird_vit_base_lineage() -> PyramidConfig:
    """CSWin-B's table: 74.6 M parameters, 13.7 G multiply-adds."""
    return bigbird((96, 192, 384, 768), (2, 4, 32, 2), QUARTERS, drop_path=0.5)
