"""Multiply-adds of operators for which PyTorch has no formula, in its own table: `torch.utils.flop_counter`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.utils.flop_counter import register_flop_formula

_formula = cast("Callable[[list[Any]], Callable[[Any], Any]]", register_flop_formula)


@_formula([torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only])
def _bag(weight: tuple[int, ...], indices: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Rows of a table times a number each, added up: how the scores of Sparsifiner's keys are made."""
    return 2 * indices[0] * weight[1]
