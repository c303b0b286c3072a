"""What holds for every test: Hypothesis profiles, one thread, seeds, and no use of uninitialised memory."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

# Makes Dynamo look up torch's functions by name now, before the fixture below replaces three of them.
from torch._dynamo.trace_rules import get_torch_obj_rule_map

# Makes `with torch.device(...)` do the same.
from torch.utils._device import _device_constructors

from tests.dealing import dealt

hypothesis.settings.register_profile("dev", max_examples=20, deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", max_examples=40, deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(
    os.environ.get("ATTNKIT_HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev")
)

torch.set_num_threads(1)

# Compilers make so many objects that Python, by its own rule, spends a sixth of their time looking for cycles.
gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs a GPU where there is none, and puts slow tests first, so that no worker ends with one."""
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("cuda")]
        if left_out:
            items[:] = [item for item in items if not item.get_closest_marker("cuda")]
            config.hook.pytest_deselected(items=left_out)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        items[:] = dealt(items, workers)


def pytest_collection_finish() -> None:
    # What was imported stays: it need not be looked at again and again.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    # Or what is left at the end looks like a leak to Triton.
    gc.unfreeze()


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor with NaN, or with the largest value where its dtype has none."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            # Eight-bit floats cannot all be filled.
            return tensor.fill_(torch.nan) if tensor.element_size() > 1 else tensor
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        # Dynamo would trace the look at the caller; what it compiles runs once uncompiled in other tests.
        if torch.compiler.is_compiling():
            return allocate(*args, **kwargs)
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(tensor) if caller.partition(".")[0] in ("attnkit", "attnkit_models") else tensor

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Lets `torch.empty` and its kin return NaN to attnkit's code, so that reading before writing shows."""
    get_torch_obj_rule_map()
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield
