"""Convolutions over tokens, where PyTorch's own need care."""

from __future__ import annotations

import pytest
import torch

from attnkit import Conv, HeadMix
from attnkit.primitives.convolving import narrow
from attnkit_models.backbones import ConvNorm


def leave_nan_in_free_memory():
    """Lets what PyTorch's own code forgets to write be NaN."""
    sizes = [size for power in range(3, 13) for size in (2**power, 3 * 2**power)]
    held = [torch.full((size,), torch.nan, dtype=dtype) for size in sizes for dtype in (torch.bfloat16, torch.float32)]
    del held


@pytest.mark.parametrize("width", [1, 2, 3])
def test_bfloat16_gradients_on_maps_narrower_than_the_stride_are_written_whole(width):
    layers = [
        (HeadMix(6, [Conv(2, kernel=3, stride=3)]), torch.randn(2, 5, width, 6)),
        (ConvNorm(8, 3, 2).build(6), torch.randn(2, 5, width, 6).permute(0, 3, 1, 2)),
        (ConvNorm(8, 5, 4).build(6), torch.randn(2, 5, width, 6).permute(0, 3, 1, 2)),
    ]
    for layer, x in layers:
        exact = layer(x)
        exact.sum().backward()
        gradients = {name: one.grad.clone() for name, one in layer.named_parameters()}
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        leave_nan_in_free_memory()
        out.float().sum().backward()
        for name, one in layer.named_parameters():
            torch.testing.assert_close(one.grad, gradients[name], rtol=0.1, atol=0.5)


def test_only_narrow_maps_under_gradients_are_copied():
    for width, stride, copied in ((1, 2, True), (2, 2, False), (1, 1, False), (3, 4, True)):
        image = torch.randn(2, 5, width, 4).permute(0, 3, 1, 2)
        found = narrow(image, stride)
        assert (found is not image) == copied and torch.equal(found, image)
        with torch.no_grad():
            assert narrow(image, stride) is image
