"""Testing: what attnkit is tested with, for anyone's own layouts, backends and primitives."""

from __future__ import annotations

from attnkit.errors import AttnkitError
from attnkit.primitives import PrimitiveOptions
from attnkit.testing.layouts import KINDS, random_layout
from attnkit.testing.options import random_options
from attnkit.testing.oracle import dense_attention, expected
from attnkit.testing.tensors import outputs_and_gradients, random_qkv, random_tensor, randomize_parameters
from attnkit.testing.tolerance import assert_within_budget, error_budget, naive_attention

__all__ = [
    "KINDS",
    "assert_within_budget",
    "check_primitive",
    "dense_attention",
    "error_budget",
    "expected",
    "naive_attention",
    "outputs_and_gradients",
    "random_layout",
    "random_options",
    "random_qkv",
    "random_tensor",
    "randomize_parameters",
]


def check_primitive(options: PrimitiveOptions) -> None:
    """Will check the laws of attention on anyone's own primitive; not part of this version.

    Args:
        options: the primitive's options.

    Raises:
        AttnkitError: always, for now.
    """
    raise AttnkitError(
        f"check_primitive({options!r}) is not part of this version yet; compare with attnkit.testing.dense_attention"
    )
