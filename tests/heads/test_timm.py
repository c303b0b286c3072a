"""A mix of one dense group has the weights of a standard attention layer, as timm names them."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer

from attnkit import Dense, Grid, HeadMix
from attnkit.testing import random_tensor


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(4, 6), (1, 7)])
def test_weights_go_both_ways(bias, sizes):
    grid = Grid(*sizes, prefix=1)
    theirs = Attention(24, num_heads=3, qkv_bias=bias).eval()
    ours = HeadMix(24, [Dense(3)], qkv_bias=bias).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = random_tensor(2, grid.tokens, 24, seed=0, dtype=torch.float32)
    torch.testing.assert_close(ours(x, grid), theirs(x), rtol=1e-5, atol=1e-6)
    again = Attention(24, num_heads=3, qkv_bias=bias).eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), theirs(x))


def test_in_float64_to_the_last_digits_and_with_gradients():
    grid = Grid(3, 4)
    theirs = Attention(8, num_heads=2, qkv_bias=True).double()
    ours = HeadMix(8, [Dense(2)]).double()
    ours.load_state_dict(theirs.state_dict())
    x = random_tensor(2, 12, 8, seed=1)
    for module, call in ((theirs, theirs), (ours, lambda x: ours(x, grid))):
        call(x).square().sum().backward()
        assert module.qkv.weight.grad is not None
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(theirs.named_parameters())[name].grad, rtol=1e-11, atol=1e-11)


def test_inside_a_vision_transformer():
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()
    images = random_tensor(2, 3, 16, 16, seed=0, dtype=torch.float32)
    right = model(images)

    class OnTheirGrid(torch.nn.Module):
        def __init__(self, mix):
            super().__init__()
            self.mix = mix

        def forward(self, x, **_):
            return self.mix(x, Grid(4, 4, prefix=1))

    for block in model.blocks:
        mix = HeadMix(24, [Dense(3)])
        mix.load_state_dict(block.attn.state_dict())
        block.attn = OnTheirGrid(mix)
    torch.testing.assert_close(model(images), right, rtol=1e-5, atol=1e-5)
