"""Mixes and blocks that cannot be, and inputs that do not fit: one sentence each."""

from __future__ import annotations

import re

import pytest
import torch

import attnkit
from attnkit import AttnkitError, Block, Conv, Dense, Grid, HeadMix, LearnedQuery, LearnedUpsample, Mix, RandomWindow
from attnkit.errors import ConfigError, ShapeError
from attnkit.kernels import recording

GROUP = [Dense(2)]

BUILD = {
    "no groups": (lambda: HeadMix(8, []), r"a mix needs at least one head group"),
    "no groups as data": (lambda: Mix(()), r"a mix needs at least one head group"),
    "heads that do not divide": (
        lambda: HeadMix(10, [Dense(2), Conv(1)]),
        r"dim=10 does not divide into 2 \+ 1 = 3 heads",
    ),
    "dim of nothing": (lambda: HeadMix(0, GROUP), r"HeadMix\(dim=\.\.\.\) is a number of channels, .* but got 0"),
    "negative dim": (lambda: HeadMix(-4, GROUP), r"but got -4"),
    "dim as text": (lambda: HeadMix("8", GROUP), r"but got '8'"),
    "dim as a fraction": (lambda: HeadMix(8.0, GROUP), r"but got 8\.0"),
    "head_dim of nothing": (lambda: HeadMix(8, GROUP, head_dim=0), r"HeadMix\(head_dim=\.\.\.\)"),
    "out_dim of nothing": (lambda: HeadMix(8, GROUP, out_dim=0), r"HeadMix\(out_dim=\.\.\.\)"),
    "one group outside a list": (
        lambda: HeadMix(8, Dense(2)),
        r"groups must be a list of options, such as \[Dense\(heads=4\)\]",
    ),
    "one dict outside a list": (lambda: HeadMix(8, {"kind": "dense"}), r"groups must be a list of options"),
    "a name": (lambda: HeadMix(8, "dense"), r"groups must be a list of options"),
    "a list of names": (lambda: HeadMix(8, ["dense"]), r"groups\[0\] must be primitive options, but got 'dense'"),
    "a list of numbers": (lambda: HeadMix(8, [3]), r"groups\[0\] must be primitive options, but got 3"),
    "a class": (lambda: HeadMix(8, [Dense]), r"groups.*Dense"),
    "a dict without kind": (
        lambda: HeadMix(8, [{"heads": 2}]),
        r"needs a 'kind', such as 'dense', but got \{'heads': 2\}",
    ),
    "a misspelt kind": (
        lambda: HeadMix(8, [{"kind": "windw", "heads": 2}]),
        r"groups\[0\]: unknown primitive 'windw'; did you mean 'window'",
    ),
    "a structure as a group": (
        lambda: HeadMix(8, [{"kind": "block", "mix": {}}]),
        r"groups\[0\]: kind 'block' does not fit here",
    ),
    "two mistakes": (
        lambda: HeadMix(8, [{"kind": "dense", "heds": 2}, {"kind": "conv", "heads": 0}]),
        r"groups\[0\]: unknown option 'heds' .* did you mean 'heads'.*; groups\[1\]\.heads=0: must be >= 1",
    ),
    "a stride and a scale": (
        lambda: HeadMix(8, [LearnedUpsample(1, 3), Dense(1)]),
        r"all groups need one stride, .*learned_upsample 1/2, dense 1",
    ),
    "two strides": (
        lambda: HeadMix(8, [LearnedQuery(1, 3, stride=2), Dense(1)]),
        r"all groups need one stride, .*learned_query 2, dense 1",
    ),
    "a mix without width": (lambda: Mix((Dense(2),)).build(), r"a mix on its own needs its width"),
    "a block without width": (
        lambda: attnkit.build({"kind": "block", "mix": {"groups": [{"kind": "dense", "heads": 2}]}}),
        r"a block on its own needs its width",
    ),
    "an MLP of nothing": (
        lambda: Block(4, GROUP, mlp_ratio=0.1),
        r"an MLP of width 4 with hidden width 0 has no units",
    ),
    "an MLP of infinite width": (lambda: Block(4, GROUP, mlp_ratio=float("inf")), r"mlp_ratio=inf"),
    "drop path of one": (lambda: Block(4, GROUP, drop_path=1.0), r"drop_path=1\.0: must be a probability in \[0, 1\)"),
    "unknown norm": (lambda: Block(4, GROUP, norm="prenorm"), r"norm.*'pre'"),
    "unknown activation": (lambda: Block(4, GROUP, activation="gel"), r"did you mean 'gelu'"),
    "misspelt style": (lambda: Block(4, GROUP, drop_pth=0.1), r"unknown option 'drop_pth' .*did you mean 'drop_path'"),
    "even convolution": (lambda: Block(4, GROUP, mlp_conv=2), r"mlp_conv=2: must be odd"),
    "post-norm with a stride": (lambda: Block(4, [Conv(1, stride=2)], norm="post"), r"needs norm='pre'"),
    "misspelt keyword": (
        lambda: HeadMix(8, GROUP, qkvbias=False),
        r"unknown option 'qkvbias' for HeadMix; did you mean 'qkv_bias'\? \(options: head_dim, out_dim, qkv_bias",
    ),
    "misspelt layer": (lambda: Block(8, GROUP, laier=1), r"unknown option 'laier' for Block; did you mean 'layer'"),
    "the mix's option for a block": (
        lambda: Block(8, GROUP, qkv_bias=False),
        r"unknown option 'qkv_bias' for Block.* options of the mix go into a Mix, such as Mix\(\[Dense",
    ),
    "two mixes": (lambda: Block(8, GROUP, mix=Mix((Conv(1),))), r"unknown option 'mix' for Block"),
    "width twice": (lambda: Mix((Dense(2),), dim=0), r"Mix\(dim=0\): must be >= 1"),
}


@pytest.mark.parametrize("mistake", BUILD)
def test_building(mistake):
    make, message = BUILD[mistake]
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def tokens(*shape, **kind):
    return torch.zeros(*(shape or (2, 13, 8)), **kind)


GRID = Grid(3, 4, prefix=1)

RUN = {
    "two axes": (lambda run: run(tokens(13, 8), GRID), r"takes tokens \(B, N, 8\), but got \(13, 8\)"),
    "another width": (lambda run: run(tokens(2, 13, 6), GRID), r"takes tokens \(B, N, 8\), but got \(2, 13, 6\)"),
    "a map with a grid": (
        lambda run: run(tokens(2, 3, 4, 8), GRID),
        r"a map takes no grid: \w+ got \(2, 3, 4, 8\) with Grid\(3, 4, prefix=1\); leave the grid out",
    ),
    "another number of tokens": (
        lambda run: run(tokens(2, 12, 8), GRID),
        r"x has 12 tokens but Grid\(3, 4, prefix=1\) holds 1 prefix \+ 3\*4 = 13",
    ),
    "tokens without a grid": (lambda run: run(tokens()), r"\(2, 13, 8\)"),
    "a grid that is none": (lambda run: run(tokens(2, 12, 8), (3, 4)), r"Grid\(14, 14\).* but got \(3, 4\)"),
    "an empty map": (lambda run: run(tokens(2, 0, 4, 8)), r"empty.*\(2, 0, 4, 8\)"),
    "an empty map without items": (lambda run: run(tokens(0, 3, 0, 8)), r"empty.*\(0, 3, 0, 8\)"),
    "a map of another width": (
        lambda run: run(tokens(2, 3, 4, 6)),
        r"of dim=8 takes a map \(B, H, W, 8\), but got \(2, 3, 4, 6\)$",
    ),
    "a map with its channels first": (
        lambda run: run(tokens(2, 8, 3, 4)),
        r"but got \(2, 8, 3, 4\); maps are channels last \(B, H, W, C\): use x\.permute\(0, 2, 3, 1\)$",
    ),
    "a video with its channels first": (
        lambda run: run(tokens(2, 8, 2, 3, 4)),
        r"but got \(2, 8, 2, 3, 4\); .*: use x\.permute\(0, 2, 3, 4, 1\)$",
    ),
    "integers": (
        lambda run: run(tokens(dtype=torch.int64), GRID),
        r"x is torch\.int64 but the weights are torch\.float32",
    ),
    "another dtype": (
        lambda run: run(tokens(dtype=torch.float64), GRID),
        r"x is torch\.float64 but the weights are torch\.float32",
    ),
    "another device": (lambda run: run(tokens(device="meta"), GRID), r"x is on meta but the weights are on cpu"),
    "no tensor": (lambda run: run([[1.0]], GRID), r"x must be a tensor, but got list"),
    "nothing as a map": (lambda run: run(None), r"x must be a tensor, but got NoneType"),
    "a list as a mask": (
        lambda run: run(tokens(), GRID, token_mask=[True] * 13),
        r"token_mask must be a tensor.* list",
    ),
    "a floating mask": (
        lambda run: run(tokens(), GRID, token_mask=torch.ones(2, 13)),
        r"token_mask must be bool \(B, N\) = \(2, 13\), but got torch\.float32",
    ),
    "a mask of another size": (
        lambda run: run(tokens(), GRID, token_mask=torch.ones(2, 12, dtype=torch.bool)),
        r"but got torch\.bool \(2, 12\)",
    ),
    "a mask of one item": (
        lambda run: run(tokens(), GRID, token_mask=torch.ones(1, 13, dtype=torch.bool)),
        r"but got torch\.bool \(1, 13\)",
    ),
    "a mask elsewhere": (
        lambda run: run(tokens(), GRID, token_mask=torch.ones(2, 13, dtype=torch.bool, device="meta")),
        r"token_mask .*meta",
    ),
}


@pytest.mark.parametrize("module", ["mix", "block"])
@pytest.mark.parametrize("mistake", RUN)
def test_running(module, mistake):
    made = HeadMix(8, [Dense(1), RandomWindow(1, 4)]) if module == "mix" else Block(8, [Dense(1), RandomWindow(1, 4)])
    call, message = RUN[mistake]
    with recording() as choices, pytest.raises(AttnkitError, match=message) as caught:
        call(made)
    assert "\n" not in str(caught.value)
    assert not re.search("HeadMix" if module == "block" else "Block", str(caught.value))
    assert not choices, "refused only after something was computed"
    draws = (made if module == "mix" else made.mix).draws
    assert draws.item() == 0, "a refused call counted as a draw"


def test_a_map_takes_no_mask():
    with pytest.raises(ShapeError, match="token_mask goes with tokens"):
        HeadMix(8, GROUP)(tokens(2, 3, 4, 8), token_mask=torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(ShapeError, match="token_mask goes with tokens"):
        Block(8, GROUP)(tokens(2, 3, 4, 8), token_mask=torch.ones(2, 12, dtype=torch.bool))
