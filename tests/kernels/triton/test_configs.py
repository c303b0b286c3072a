"""The table of configurations: complete, chosen by region size, head dim, dtype and device."""

from __future__ import annotations

import itertools
import json
from typing import get_args

import pytest
import torch

from attnkit.errors import BackendError
from attnkit.kernels.triton.blocks.configs import (
    DIRECTIONS,
    HEAD_DIMS,
    NUMBERS,
    PATH,
    REGION_SIZES,
    Config,
    Stepping,
    configuration,
    depth,
    spot_of,
    tile_of,
)
from attnkit.kernels.triton.devices import DEVICE_CLASSES, device_class
from attnkit.kernels.triton.table import Table

BIASED = (False, True)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def test_every_call_finds_a_configuration():
    for device, direction, size, width, dtype in itertools.product(
        DEVICE_CLASSES, DIRECTIONS, (1, 4, 16, 17, 49, 64, 100, 144, 196, 256, 1000), (1, 16, 24, 32, 200, 256), DTYPES
    ):
        for bias, tf32 in itertools.product((False, True), repeat=2):
            found = configuration(direction, size, width, dtype, device, bias, tf32)
            assert isinstance(found, Config)
            # Tiles are powers of two that tensor cores take; more rows than a region has are padding.
            assert found.rows in (16, 32, 64, 128)
            assert found.columns in (16, 32, 64, 128)
            assert found.rows <= max(16, 2 * size)
            assert found.warps in (1, 2, 4, 8)
            assert 1 <= found.stages <= 4


def test_the_table_has_known_names_only():
    table = json.loads(PATH.read_text(encoding="utf-8"))
    assert set(table) <= {"default", *DEVICE_CLASSES}
    for name, directions in table.items():
        assert set(directions) <= set(DIRECTIONS)
        for bits in directions.values():
            assert set(bits) <= set(NUMBERS)
            for sizes in bits.values():
                assert set(sizes) <= set(map(str, REGION_SIZES))
                for widths in sizes.values():
                    assert set(widths) <= set(map(str, HEAD_DIMS))
        if name == "default":
            counted = [
                len(widths) for bits in directions.values() for sizes in bits.values() for widths in sizes.values()
            ]
            assert counted == [len(HEAD_DIMS)] * len(DIRECTIONS) * len(NUMBERS) * len(REGION_SIZES)


@pytest.mark.parametrize("device", DEVICE_CLASSES)
@pytest.mark.parametrize("kernel", get_args(Stepping))
def test_products_over_channels_are_made_in_steps_where_registers_would_run_out(kernel, device):
    exact = {(width, bias): depth(kernel, width, torch.float32, device, bias) for width in HEAD_DIMS for bias in BIASED}
    wide = {"query_gradient": 256, "bias_gradient": 64, "key_gradient": 512}[kernel]
    nvidia = device != "gfx942"
    assert exact == {(width, bias): 32 if nvidia and width >= wide else None for width, bias in exact}
    assert depth(kernel, 129, torch.float32, device) == exact[256, False]
    rounded = {key: depth(kernel, key[0], torch.float32, device, key[1], True) for key in exact}
    small = (kernel, device) == ("key_gradient", "sm_80")
    assert rounded == {key: 128 if small and key == (256, True) else None for key in exact}
    assert {depth(kernel, width, torch.bfloat16, device, bias) for width, bias in exact} == {None}


@pytest.mark.parametrize(
    ("size", "tile"),
    [(1, 16), (16, 16), (17, 32), (49, 64), (64, 64), (65, 128), (100, 128), (144, 64), (196, 128), (256, 128)],
)
def test_regions_are_cut_with_the_least_padding(size, tile):
    assert tile_of(size) == tile


def test_half_precisions_share_their_configurations():
    assert configuration("forward", 49, 32, torch.float16, "sm_90") == configuration(
        "forward", 49, 32, torch.bfloat16, "sm_90"
    )


def test_rounded_products_of_float32_have_lines_of_their_own():
    exact, rounded = (spot_of("forward", 49, 32, torch.float32, False, tf32)[1] for tf32 in (False, True))
    assert (exact, rounded) == ("32 bit", "tf32")
    assert spot_of("forward", 49, 32, torch.bfloat16, True, True)[1] == "16 bit and bias"


def test_what_has_no_tile_is_refused():
    with pytest.raises(BackendError, match="head dims 1 to 256, not 257"):
        configuration("forward", 49, 257, torch.float32, "sm_90")
    with pytest.raises(BackendError, match=r"16 and 32 bits, not torch\.float64"):
        configuration("forward", 49, 32, torch.float64, "sm_90")


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_devices_belong_to_a_class(monkeypatch, capability, name):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device_class(torch.device("cuda")) == name


def test_amd_has_one_class(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device_class(torch.device("cuda")) == "gfx942"


def test_the_file_is_as_it_would_be_written():
    assert Table.of(PATH).written() == PATH.read_text(encoding="utf-8")


def test_a_class_of_devices_may_have_lines_of_its_own():
    spot, before = (
        spot_of("forward", 49, 32, torch.bfloat16),
        configuration("forward", 49, 32, torch.bfloat16, "gfx942"),
    )
    other, table = Config(32, 128, 2, 3), Table.of(PATH)
    text = table.written()
    table.put("gfx942", spot, other)
    configuration.cache_clear()
    try:
        assert configuration("forward", 64, 17, torch.float16, "gfx942") == other
        assert configuration("forward", 64, 17, torch.float16, "sm_80") == before
        assert '"gfx942": {\n    "forward": {' in table.written()
    finally:
        table.put("gfx942", spot, None)
        configuration.cache_clear()
    assert configuration("forward", 49, 32, torch.bfloat16, "gfx942") == before
    assert table.written() == text
