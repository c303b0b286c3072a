"""Memory as attnkit.testing counts it."""

from __future__ import annotations

import torch

from attnkit.testing import TensorMemory, peak_memory

MEGABYTE = 2**20


def filled(count: int = 1) -> torch.Tensor:
    return torch.zeros(count * MEGABYTE, dtype=torch.uint8)


def test_the_peak_is_what_lives_at_one_time():
    def two_then_one():
        first = filled(2)
        second = filled(3)
        del first, second
        return filled(4)

    assert peak_memory(two_then_one) == 5 * MEGABYTE
    assert peak_memory(lambda: filled(7)) == 7 * MEGABYTE


def test_what_lived_before_does_not_count():
    held = [filled(6)]

    def replace():
        held.clear()
        return filled(2)

    assert peak_memory(replace) <= 2 * MEGABYTE


def test_it_is_the_same_every_time():
    q = torch.randn(1, 2, 300, 16, requires_grad=True)

    def step():
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        q.grad = None

    assert peak_memory(step) == peak_memory(step) > 2 * q.nbytes


def test_the_inside_of_operators_counts():
    """A median is found in a copy that the operator does not return."""
    x = torch.randn(512, 512)
    with TensorMemory() as returned:
        x.median()
    assert returned.peak < 100
    assert x.nbytes <= peak_memory(x.median) < 1.1 * x.nbytes


def test_a_backward_pass_counts_what_was_kept_for_it():
    x = torch.randn(256, 1024, requires_grad=True)

    def forward():
        return x.exp().exp().exp().sum()

    def both():
        forward().backward()
        x.grad = None

    with torch.no_grad():
        alone = peak_memory(forward)
    assert alone < 2.1 * x.nbytes
    assert peak_memory(both) > 2.9 * x.nbytes
