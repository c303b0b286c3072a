"""Memory is counted in bytes, the same on every machine, so that what the headline table promises of it is tested."""

from __future__ import annotations

import torch

from attnkit.testing import peak_memory
from attnkit_models.bench.case import OURS, Setting
from attnkit_models.bench.headline import AUTHORS, HEADLINE
from attnkit_models.bench.runner import make


@torch.no_grad()
def test_sparsifiners_layer_holds_a_tenth_of_what_its_authors_hold():
    (case,) = (one for one in HEADLINE if one.name == "predicted_keys/3136")
    (target,) = (one for one in case.targets if one.measure == "memory forward" and one.against == AUTHORS)
    contenders = make(case, Setting()).contenders
    ours, theirs = (peak_memory(contenders[name].forward) for name in (OURS, AUTHORS))
    assert target.at_least * ours <= theirs
