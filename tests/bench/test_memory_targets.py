"""Memory is counted in bytes, the same on every machine, so that what the headline table promises of it is tested."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnkit.testing import TensorMemory, peak_memory
from attnkit_models.bench.case import OURS, Setting
from attnkit_models.bench.headline import GATHER, HEADLINE
from attnkit_models.bench.runner import make
from attnkit_models.bench.warm import training_step

CASES = {case.name: case for case in HEADLINE}
PROMISED = [(case.name, target) for case in HEADLINE for target in case.targets if target.measure.startswith("memory")]
# What few machines hold: tensors are counted and not made, and the largest of them is taken for all.
TOO_LARGE = {("regions/256x256", GATHER)}


@functools.cache
def peak(case: str, contender: str, measure: str) -> int:
    """Bytes of a pass, counted as the benchmark does."""
    one = make(CASES[case], Setting()).contenders[contender]
    grad = measure == "memory training"
    run = training_step(one) if grad else one.forward
    with torch.set_grad_enabled(grad):
        if (case, contender) not in TOO_LARGE:
            return peak_memory(run)
        with FakeTensorMode(allow_non_fake_inputs=True), TensorMemory() as counted:
            run()
        return counted.largest


@pytest.mark.parametrize(("case", "target"), PROMISED, ids=lambda one: getattr(one, "measure", one))
def test_memory_is_as_promised(case, target):
    theirs = peak(target.case or case, target.against, target.measure)
    assert theirs >= target.at_least * peak(case, OURS, target.measure)


def test_the_largest_tensor_is_counted_without_making_it():
    run = training_step(make(CASES["regions/56x56"], Setting()).contenders[GATHER])
    with FakeTensorMode(allow_non_fake_inputs=True), TensorMemory() as counted:
        run()
    held = peak("regions/56x56", GATHER, "memory training")
    assert held / 2 < counted.largest < held
