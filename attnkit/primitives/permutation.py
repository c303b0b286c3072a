"""Random permutations as a function of numbers: no generator, no state, the same on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Words of 31 bits: their products stay below 2 ** 63, so nothing overflows.
_WORD = 0x7FFFFFFF


def random_permutation(tokens: int, words: tuple[int | Tensor, ...], device: torch.device | str | None) -> Tensor:
    """A uniformly random permutation of 0..tokens-1, determined by `words` alone.

    Every token gets a hash of the words and its own number, and the tokens are sorted by it. Being plain integer
    arithmetic, this is bit-equal on CPU and GPU, can be compiled and exported, repeats itself when a checkpointed
    region is run again, and never touches PyTorch's random state.

    Args:
        tokens: number of tokens, 1..2 ** 31.
        words: integers in 0..2 ** 62 - 1 or int64 scalar tensors, such as seed, layer, group, sizes and draw.
        device: where to make it.

    Returns:
        int64 (tokens,).
    """
    # Two keys, because one of 31 bits would only tell 2 ** 31 permutations apart. What is known as an integer is mixed
    # as an integer: each round repeats its input four times, and a compiler that fuses them all writes out every copy.
    first: int | Tensor = 0x1E3779B9
    second: int | Tensor = 0x7F4A7C15
    for word in words:
        lower, upper = word & _WORD, (word >> 31) & _WORD
        first = _mixed((first ^ lower) + upper)
        second = _mixed((second ^ upper) + lower)
    number = torch.arange(tokens, device=device)
    # Every step is a bijection of the token's number, so no two tokens tie.
    return torch.argsort(_mixed(_mixed(number ^ first) + second))


def _mixed(x: Any) -> Any:
    """A bijection of 31-bit numbers in which every input bit moves every output bit.

    Takes an integer or a tensor of them, of which the lowest 31 bits count. The shifts and factors are those of the
    `lowbias32` hash of C. Wellons' hash prospector.
    """
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
