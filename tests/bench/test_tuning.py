"""Tuning: which configurations are tried, which one wins, and what is told where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from attnkit.cli import main
from attnkit.errors import ConfigError
from attnkit.kernels.triton.blocks.configs import (
    DIRECTIONS,
    HEAD_DIMS,
    REGION_SIZES,
    Config,
    own,
    put,
    tile_of,
)
from attnkit.kernels.triton.devices import DEVICE_CLASSES, device_class
from attnkit_models.bench import scenes
from attnkit_models.bench.scenes import RAGGED, RAGGED_MAP, SCENES, SIDES, in_one_program
from attnkit_models.bench.tuning import (
    alike,
    climbed,
    images,
    kernels,
    multiplying,
    neighbours,
    timed,
    tune,
)


def test_every_line_of_the_table_is_a_kernel():
    found = kernels()
    assert len({one.name for one in found}) == len(DIRECTIONS) * len(REGION_SIZES) * len(HEAD_DIMS) * 6
    assert {tile: tile_of(side**2) for tile, side in SIDES.items()} == {tile: tile for tile in REGION_SIZES}
    assert [one.name for one in kernels("forward/64/32/*32*")] == [
        f"forward/64/32/{numbers}" for numbers in ("float32", "float32 and bias", "tf32", "tf32 and bias")
    ]
    assert len({one.spot for one in found}) == len(found)
    with pytest.raises(ConfigError, match="no kernel is named 'forwards'; names are like 'forward/16/16/bfloat16'"):
        kernels("forwards")


@pytest.mark.parametrize("device", DEVICE_CLASSES)
def test_neighbours_differ_in_one_number(device):
    for kernel in kernels():
        start = kernel.configured(device)
        found = neighbours(start, kernel.tile)
        assert found and start not in found and len(set(found)) == len(found)
        for one in found:
            assert sum(a != b for a, b in zip(one, start, strict=True)) == 1
            assert one.rows <= kernel.tile


def test_it_climbs_to_the_fastest():
    asked: list[Config] = []

    def times(some):
        asked.extend(some)
        # The nearer to the goal in every number, the faster.
        goal = (64, 128, 8, 3)
        return {one: 1.0 + sum(abs(a - b) / b for a, b in zip(one, goal, strict=True)) for one in some}

    assert climbed(Config(64, 32, 4, 2), 64, times) == Config(64, 128, 8, 3)
    # Neighbours that lost once are not timed again.
    assert asked.count(Config(32, 32, 4, 2)) == 1


def test_chance_decides_nothing():
    start = Config(64, 64, 4, 2)
    assert climbed(start, 64, lambda some: {one: 1.0 if one == start else 0.98 for one in some}) == start


def test_what_does_not_run_is_passed_over():
    start = Config(64, 64, 4, 2)
    assert climbed(start, 64, lambda some: {}) == start
    slow = {Config(64, 64, 8, 2): 2.0, Config(64, 32, 4, 2): 1.0}
    assert climbed(start, 64, lambda some: {one: slow[one] for one in some if one in slow}) == Config(64, 32, 4, 2)


def test_results_that_differ_are_not_alike():
    one = torch.linspace(-1.0, 1.0, 9)
    assert alike(one, one + 1e-3)
    assert not alike(one, one + 3e-3)
    assert not alike(one, one * torch.nan)


@pytest.mark.parametrize(
    "name",
    [
        "forward/16/16/bfloat16 and bias",
        "key_gradient/32/32/tf32",
        "query_gradient/64/16/bfloat16 and bias",
        "key_gradient/64/64/bfloat16 and bias",
    ],
)
def test_what_is_timed_runs_anywhere(name):
    kernel, before = kernels(name)[0], torch.backends.cuda.matmul.fp32_precision
    with multiplying(kernel):
        regions, ragged = (make(kernel, torch.device("cpu"), 1)() for make in SCENES)
    side, backward = SIDES[kernel.tile], kernel.direction != "forward"
    assert len(regions) == (3 if backward else 1)
    for one in regions:
        assert one.shape == (1, 8, (64 // side * side) ** 2, kernel.head_dim)
    biased = backward and kernel.bias and not in_one_program(kernel)
    assert len(ragged) == (3 + biased if backward else 1)
    for one in ragged[:3]:
        # A forward pass of blocks leaves out the prefix.
        assert one.shape == (1, 8, RAGGED_MAP**2 + backward, kernel.head_dim)
    for one in (*regions, *ragged[:3]):
        assert one.dtype == kernel.dtype and bool(one.isfinite().all())
    if biased:
        size = RAGGED[kernel.tile] ** 2
        assert ragged[3].shape == (1, 8, 1, size, 1 + size) and ragged[3].dtype == torch.float32
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_windows_leave_gaps_on_the_same_line_of_the_table():
    for tile, side in RAGGED.items():
        assert tile_of(side**2) == tile and side**2 < tile and RAGGED_MAP % side


def test_windows_run_the_kernel_that_is_tuned(monkeypatch):
    """Small windows of narrow heads have a kernel of their own for all gradients, unless they have an index."""
    layouts = []
    monkeypatch.setattr(scenes, "_run", lambda kernel, layout, *_: layouts.append(layout))
    for name in ("query_gradient/64/32/bfloat16", "key_gradient/64/64/bfloat16", "forward/64/32/bfloat16"):
        scenes.windows(kernels(name)[0], torch.device("cpu"), 1)
    small, wide, forward = layouts
    assert small.index is not None and wide.index is None and forward.index is None
    assert torch.equal(small.to_mask("cpu"), wide.to_mask("cpu"))


def test_a_configuration_is_as_good_as_in_all_its_runs():
    """One that fails, or that differs, in any run is out; the others have the mean of their times."""
    kernel, told = kernels("forward/64/32/bfloat16")[0], []
    first, fails, wrong, good = (Config(64, 64, warps, 2) for warps in (1, 2, 4, 8))

    def now():
        return own("sm_90", kernel.spot)

    def run():
        return [torch.ones(2, dtype=torch.bfloat16)]

    def ragged():
        if now() == fails:
            raise RuntimeError("out of resource\nand more")
        return [torch.full((2,), 2.0 if now() == wrong else 1.0, dtype=torch.bfloat16)]

    before = now()
    found = timed(kernel, torch.device("cpu"), "sm_90", [run, ragged], told.append, [first, fails, wrong, good])
    assert now() == before
    assert set(found) == {first, good} and all(0 < seconds < 1 for seconds in found.values())
    assert told == [
        f"    {tuple(fails)} does not run: out of resource",
        f"    {tuple(wrong)} is WRONG: it differs from {tuple(first)}",
    ]


def test_the_work_is_about_the_same():
    assert {images(one) * one.head_dim * one.dtype.itemsize for one in kernels()} == {2 * 64 * 64}


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--tune needs a GPU that PyTorch can use"):
        tune(None, list, tmp_path / "configs.json")
    assert list(tmp_path.iterdir()) == []
    assert main(["bench", "--tune"]) == 2
    told = capsys.readouterr().err
    assert "--tune needs a GPU" in told and told.count("\n") == 1


def test_its_kernels_are_listed(capsys):
    assert main(["bench", "--tune", "--list", "--only", "key_gradient/16/*/bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"key_gradient/16/{width}/bfloat16" for width in HEAD_DIMS]
    assert "gradients of k and v, heads of 16 in bfloat16: routed regions of 16 tokens, windows of 9" in lines[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["sweeps"],
            "--tune takes --only and --list only, such as `attnkit bench --tune --only 'forward/*'`, so sweeps",
        ),
        (["--only", "region"], "no kernel is named 'region'"),
    ],
)
def test_mistakes_are_one_sentence(capsys, words, says):
    assert main(["bench", "--tune", *words]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


@pytest.mark.cuda
def test_a_line_is_tuned_and_the_table_written(tmp_path):
    told: list[str] = []
    kernel, name = kernels("forward/64/64/bfloat16")[0], device_class(torch.device("cuda"))
    before = own(name, kernel.spot)
    try:
        tune(kernel.name, told.append, tmp_path / "configs.json")
    finally:
        put(name, kernel.spot, before)
    assert any(line.startswith("forward/64/64/bfloat16") for line in told)
    assert not any("WRONG" in line for line in told)
