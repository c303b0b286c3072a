"""Tables over the offsets inside a window, or over an image, brought to one of another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from attnkit_models.checkpoints.keys import Pair

# The last parts of the names of parameters that hold such tables: (rows, extent, extent).
TABLES = ("relative_bias", "gain")


def resized(table: Tensor, extents: Sequence[int]) -> Tensor:
    """Resizes tables bicubically, as `jax.image.resize` does: the kernel of Keys with a = -1/2, wider where it shrinks.

    Args:
        table: (rows, height, width).
        extents: the new height and width.

    Returns:
        (rows, *extents) in the table's dtype.
    """
    image = table.double()[None]
    return F.interpolate(image, tuple(extents), mode="bicubic", antialias=True, align_corners=False)[0].to(table.dtype)


def is_table(name: str, tensor: Tensor) -> bool:
    """Whether a parameter of ours is a table over a window."""
    return tensor.ndim == 3 and name.rpartition(".")[2] in TABLES


def fitted(pairs: Sequence[Pair], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors with the tables of other windows and images resized to ours; what does not fit stays.

    Args:
        pairs: the tensors under both names.
        ours: our names and tensors.
        theirs: the authors' names and tensors.
    """
    found = dict(theirs)
    for pair in pairs:
        wanted, given = ours[pair.ours], theirs.get(pair.theirs)
        resizable = pair.resize is not None or is_table(pair.ours, wanted)
        if given is None or not resizable or not given.is_floating_point() or given.is_meta:
            continue
        try:
            table = pair.transform.inward(given)
        except (RuntimeError, IndexError):
            continue
        if pair.resize is not None:
            image = pair.resize(table) if table.shape != wanted.shape and table.ndim == wanted.ndim else None
            if image is not None and image.shape == wanted.shape:
                found[pair.theirs] = pair.transform.outward(image)
            continue
        if table.ndim == 3 and table.numel() and len(table) == len(wanted) and table.shape != wanted.shape:
            found[pair.theirs] = pair.transform.outward(resized(table, wanted.shape[1:]))
    return found
