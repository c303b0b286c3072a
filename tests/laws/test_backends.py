"""Every law for every backend over every kind of layout that it accepts."""

from __future__ import annotations

import pytest
import torch

from attnkit.grid import Grid
from attnkit.registry import BACKENDS
from attnkit.testing import KINDS, LAWS, AttentionCase, check_backend, check_case

KINDS_OF = {"reference": KINDS, "sdpa": KINDS, "gather": ("stencil", "blocks", "token_sets")}
CASES = [
    (backend, kind, law.name)
    for backend, kinds in KINDS_OF.items()
    for kind in kinds
    for law in LAWS.values()
    if law.attention is not None
]


@pytest.mark.parametrize(("backend", "kind", "law"), CASES)
def test_law(backend, kind, law, examples):
    checked = check_backend(backend, kinds=[kind], laws=[law], max_examples=examples)
    assert checked.tried[law] >= examples


def test_no_backend_is_forgotten():
    """FlexAttention compiles for seconds per shape, so it is held to the laws on fixed cases."""
    assert {name for name, target in BACKENDS.items() if target} == {*KINDS_OF, "flex"}


@pytest.mark.slow
@pytest.mark.parametrize("law", ["convex_hull", "seeds_only"])
def test_flex(law):
    with torch.no_grad():
        check_case(law, AttentionCase("blocks", Grid(3, 4, prefix=1), "flex", 2, 2, 16, 16, seed=5, dtype="float32"))
