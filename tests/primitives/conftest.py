"""What the tests of primitives share: mixes with random weights, and attention over lists of keys written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from attnkit import HeadMix
from attnkit.testing import outputs_and_gradients, random_tensor, randomize_parameters


@pytest.fixture(scope="session")
def random_mix():
    """random_mix(groups, head_dim=, seed=) -> HeadMix in float64 and evaluation mode."""

    def make(groups, *, head_dim=2, seed=0, **extra):
        groups = groups if isinstance(groups, list) else [groups]
        dim = extra.pop("dim", head_dim * sum(group.heads for group in groups))
        return randomize_parameters(HeadMix(dim, groups, head_dim=head_dim, **extra).double().eval(), seed=seed)

    return make


class ByHand:
    """A mix with one group, computed from its weights alone."""

    def __init__(self, mix, grid):
        self.mix, self.grid, self.heads = mix, grid, mix.options[0].heads
        self.places = list(itertools.product(*(range(size) for size in grid.sizes)))

    def projected(self, x):
        """The columns of the fused projection in thirds, each (B, heads, N, D)."""
        linear = self.mix.qkv
        thirds = nn.functional.linear(x, linear.weight, linear.bias).chunk(3, dim=-1)
        return [torch.stack(one.chunk(self.heads, dim=-1), dim=1) for one in thirds]

    def joined(self, out):
        """(B, heads, N, D) -> (B, N, C)."""
        together = torch.cat(list(out.unbind(1)), dim=-1)
        return together @ self.mix.proj.weight.T + self.mix.proj.bias

    def token(self, *place):
        """Number of the token at a place of the grid."""
        return self.grid.prefix + self.places.index(place)

    def lists(self, near):
        """Key tokens of every token: all for prefix tokens, else the prefix and what `near(place)` says."""
        prefix = list(range(self.grid.prefix))
        everything = list(range(self.grid.tokens))
        return [everything for _ in prefix] + [
            prefix + [self.token(*key) for key in near(place)] for place in self.places
        ]

    def attention(self, q, k, v, lists, scale=None, bias=None):
        """Softmax over each token's list: q (B, heads, Nq, D), k and v (B, heads, Nk, D), bias (heads, Nq, Nk)."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        rows = []
        for query, keys in enumerate(lists):
            logits = scale * (k[:, :, keys] @ q[:, :, query, :, None])[..., 0]
            if bias is not None:
                logits = logits + bias[:, query, keys]
            raised = logits.exp()
            rows.append((raised[..., None] * v[:, :, keys]).sum(2) / raised.sum(2)[..., None])
        return torch.stack(rows, dim=2)


@pytest.fixture(scope="session")
def by_hand():
    return ByHand


@pytest.fixture(scope="session")
def agree():
    """Checks a mix against a function of x that uses the mix's weights: forward and all gradients."""

    def check(mix, grid, expected, *, seed=0, batch=2, ignored=()):
        x = random_tensor(batch, grid.tokens, mix.dim, seed=seed, grad=True)
        names = ["x", *(name for name, _ in mix.named_parameters())]
        inputs = [x, *mix.parameters()]
        found = outputs_and_gradients(lambda x, *_: mix(x, grid), inputs, seed=seed)
        right = outputs_and_gradients(lambda x, *_: expected(x), inputs, seed=seed)
        torch.testing.assert_close(found[0], right[0], rtol=1e-9, atol=1e-9)
        for name, one, other in zip(names, found[1], right[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
            if not name.startswith(tuple(ignored)):
                assert one.isfinite().all()

    return check
