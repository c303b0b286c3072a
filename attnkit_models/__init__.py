"""Models made of attnkit's primitives: recipes, one file a paper, on two backbones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attnkit.errors import AttnkitError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["export_official", "import_official", "import_official_layer"]

_LATER = "is not part of this version yet; attnkit.build(name) makes the model with fresh weights"


def import_official(name: str, state_dict: Mapping[str, Tensor], hparams: Mapping[str, Any] | None = None) -> nn.Module:
    """Loads the weights that a paper's authors published. Not part of this version yet.

    Raises:
        AttnkitError: always, in this version.
    """
    raise AttnkitError(f"import_official({name!r}, ...) {_LATER}")


def export_official(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Writes a model's weights under the authors' names. Not part of this version yet.

    Raises:
        AttnkitError: always, in this version.
    """
    raise AttnkitError(f"export_official({name!r}, ...) {_LATER}")


def import_official_layer(
    upstream_class: str, state_dict: Mapping[str, Tensor], hparams: Mapping[str, Any]
) -> nn.Module:
    """Loads one module of an authors' code. Not part of this version yet.

    Raises:
        AttnkitError: always, in this version.
    """
    raise AttnkitError(f"import_official_layer({upstream_class!r}, ...) {_LATER}")
