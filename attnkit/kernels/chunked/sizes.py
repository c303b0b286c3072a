"""How much is worked on at a time: enough for all threads, and not more than the caches hold."""

from __future__ import annotations

import torch

# Bytes of one array that stay in a core's second-level cache while others come and go.
CACHE = 2**20


def fitting(bytes_each: int) -> int:
    """How many items of so many bytes fit, at least one."""
    return max(1, CACHE // max(1, bytes_each))


def cut(total: int, bytes_each: int) -> list[tuple[int, int]]:
    """First and last + 1 of pieces of `total` items, in which every thread has as many, but for the last piece."""
    threads = torch.get_num_threads()
    count = -(-total // (threads * fitting(bytes_each)))
    # In each piece a multiple of the threads.
    size = -(-total // max(1, count * threads)) * threads
    return [(start, min(start + size, total)) for start in range(0, total, size)] if total else []
