"""Every law for every registered primitive, on any options of it."""

from __future__ import annotations

import pytest

from attnkit.registry import list_primitives
from attnkit.testing import LAWS, check_primitive

# Where a law has nothing to say of a primitive, whatever its options: a convolution makes no attention call, and not
# all primitives look the same from every place.
SILENT = {
    *(("conv", law) for law in ("backends_agree", "no_leak", "full_budget", "convex_hull", "algebra", "counting")),
    *(
        (primitive, "translation")
        for primitive in (
            "competing_mask_predictor",
            "linformer",
            "mask_predictor",
            "mask_reconstruction",
            "neighborhood",
            "padded_topk_region",
            "random_window",
            "soft_topk_region",
            "threshold_mask_predictor",
            "topk_region",
        )
    ),
}
PAIRS = [(name, law.name) for name in list_primitives() for law in LAWS.values() if law.primitive is not None]


@pytest.mark.parametrize(("primitive", "law"), PAIRS)
def test_law(primitive, law, examples):
    checked = check_primitive(primitive, laws=[law], max_examples=examples)
    tried, silent = checked.tried[law], sum(checked.silent[law].values())
    assert tried + silent >= examples
    assert (tried == 0) == ((primitive, law) in SILENT)
