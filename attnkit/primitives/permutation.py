"""Random permutations as a function of numbers: no generator, no state, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def random_permutation(tokens: int, words: tuple[int | Tensor, ...], device: torch.device | str | None) -> Tensor:
    """A uniformly random permutation of 0..tokens-1, determined by `words` alone.

    Every token gets a hash of the words and its own number, and the tokens are sorted by it. Being plain integer
    arithmetic, this is bit-equal on CPU and GPU, can be compiled and exported, repeats itself when a checkpointed
    region is run again, and never touches PyTorch's random state.

    Args:
        tokens: number of tokens, >= 1.
        words: integers or int64 scalar tensors, such as seed, layer, draw and sizes.
        device: where to make it.

    Returns:
        int64 (tokens,).
    """
    number = torch.arange(tokens, device=device)
    high, low = torch.full_like(number, 0x9E3779B9), torch.full_like(number, 0x7F4A7C15)
    for entry in (*words, number):
        word = entry if isinstance(entry, Tensor) else torch.tensor(entry, dtype=torch.int64, device=device)
        upper, lower = word >> 32, word & _LOW
        high = _mixed(_mixed(high ^ lower) + (upper & _LOW) + 0x165667B1)
        low = _mixed(_mixed(low ^ high) + lower)
    return torch.argsort(((high & 0x7FFFFFFF) << 32) | low, stable=True)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers in which every input bit moves every output bit (the `lowbias32` constants of
    C. Wellons' hash prospector); the products are split so that no intermediate exceeds 63 bits."""
    x = x & _LOW
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _times(x: Tensor, factor: int) -> Tensor:
    return ((((x * (factor >> 16)) & 0xFFFF) << 16) + x * (factor & 0xFFFF)) & _LOW
