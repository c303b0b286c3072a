"""Mistakes in the mix of head groups."""

from __future__ import annotations

from attnkit import Dense, PooledGlobal, Window
from tests.mutants.mutant import Mutant

RUN = "attnkit.heads:HeadMix.run"
MUTANTS = [
    Mutant(
        "split_in_another_order",
        "The projection is read as k, q, v instead of q, k, v.",
        RUN,
        "(q, k, v)) in",
        "(k, q, v)) in",
        (Dense(2),),
        ("independence",),
    ),
    Mutant(
        "keys_for_values_in_one_group",
        "The second group takes its keys for its values.",
        RUN,
        "parts, strict=True)):\n",
        "parts, strict=True)):\n        k, v = (v, k) if index and k is not None and v is not None else (k, v)\n",
        (Dense(2),),
        ("independence",),
    ),
    Mutant(
        "groups_backwards",
        "The groups' channels are joined in reverse order.",
        RUN,
        "torch.cat(joining, dim=-1)",
        "torch.cat(joining[::-1], dim=-1)",
        (Dense(2),),
        ("independence",),
    ),
    Mutant(
        "heads_joined_in_turn",
        "The output's channels are dealt out to the heads in turn.",
        RUN,
        "output.out.transpose(1, 2).flatten(2)",
        "output.out.movedim(1, -1).flatten(2)",
        (Dense(2),),
        ("independence",),
    ),
    Mutant(
        "projection_bias_twice",
        "The bias of the output projection is added twice.",
        RUN,
        "self.proj(joined)",
        "self.proj(joined) + self.proj.bias",
        (Dense(2),),
        ("independence",),
    ),
    Mutant(
        "mask_not_passed_on",
        "The mix does not pass the token mask on to its groups.",
        RUN,
        "HeadInputs(x, q, k, v, grid, token_mask, draw, places",
        "HeadInputs(x, q, k, v, grid, None, draw, places",
        (Dense(2), PooledGlobal(2, 2)),
        ("independence",),
    ),
    Mutant(
        "columns_dealt_in_turn",
        "The columns of a projection are dealt out to the heads in turn.",
        "attnkit.heads:_heads",
        "view(batch, tokens, count, width // count).transpose(1, 2)",
        "view(batch, tokens, width // count, count).movedim(3, 1)",
        (Dense(2),),
        ("independence",),
    ),
    Mutant(
        "map_read_sideways",
        "A map's height and width are exchanged.",
        "attnkit.checks:tokens_of_map",
        "Grid(*shape[1:-1])",
        "Grid(*reversed(shape[1:-1]))",
        (Window(2, 2),),
        ("transformed",),
        12,
    ),
]
