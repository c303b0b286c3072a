"""Seeds as functions of what they are for."""

from __future__ import annotations

import hashlib


def seed_of(*parts: str | int) -> int:
    """A seed in [0, 2**63) that any change of the parts changes; the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
