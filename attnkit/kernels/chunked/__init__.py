"""The chunked backend: hand-written passes in plain torch, over pieces that fit the cache."""
