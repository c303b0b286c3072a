"""Launches: what a kernel is called with, and where."""

from __future__ import annotations

import pytest
import torch

from attnkit.kernels.triton.launch import Launch, within_reach


class Kernel:
    """Records its calls as a function under `triton.jit` takes them."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], dict[str, object]]] = []

    def __getitem__(self, grid):
        return lambda **given: self.calls.append((grid, given))


def launch(kernel, grid=(3, 2), device="cpu"):
    x = torch.empty(4, device=device)
    return Launch(kernel, grid, {"x": x, "size": 4, "bias": None}, {"ROWS": 16}, warps=2, stages=3)


def test_a_kernel_gets_arguments_constants_and_options():
    kernel = Kernel()
    one = launch(kernel)
    one.run()
    ((grid, given),) = kernel.calls
    assert grid == (3, 2)
    assert given.pop("x") is one.arguments["x"]
    fixed = {"num_warps": 2, "num_stages": 3, "enable_fp_fusion": True}
    assert given == {"size": 4, "bias": None, "ROWS": 16, **fixed}


def test_no_programs_are_not_started():
    kernel = Kernel()
    launch(kernel, grid=(3, 0)).run()
    assert kernel.calls == []


def test_it_is_made_without_data():
    assert launch(Kernel(), device="meta").given["x"].is_meta


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_kernel_starts_where_its_tensors_lie():
    devices: list[int] = []

    class Looking(Kernel):
        def __getitem__(self, grid):
            return lambda **given: devices.append(torch.cuda.current_device())

    launch(Looking(), device="cuda:1").run()
    assert devices == [1] and torch.cuda.current_device() == 0


def test_what_lies_too_far_apart_is_put_in_order():
    far = torch.empty_strided((1, 1, 4, 16), (2**32, 2**32, 1, 2**28), device="meta")
    assert within_reach(far).stride() == (64, 64, 16, 1)
    for near in (far[..., :8], torch.empty(2**20, 2, 2**12, 8, device="meta"), far[..., :1]):
        assert within_reach(near) is near
    bias = torch.empty_strided((1, 1, 1, 16, 16), (2**32, 2**32, 2**32, 2**28, 1), device="meta")
    assert within_reach(bias) is bias and within_reach(bias, 2).is_contiguous()
