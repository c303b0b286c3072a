"""Roofline: limits by hand, on numbers that are easy, and beside measurements."""

from __future__ import annotations

import math

import pytest

from attnkit_models.bench.gpu import GPU
from attnkit_models.bench.headline import HEADLINE
from attnkit_models.bench.roofline import DEVICES, Device, device_of, limits, roof, roof_of, routed, table

# A product, a byte and an exponential a second each.
ONE = Device("one", 1.0, 1.0, 1.0)
CALL = {"batch": 2, "heads": 3, "tokens": 5, "keys": 7.0, "width": 11}
PAIRS = 2 * 3 * 5 * 7


def test_forward_by_hand():
    found = roof(ONE, "forward", **CALL)
    assert found.memory == 1e3 * 4 * 2 * (2 * 3 * 5 * 11)
    assert found.products == 1e3 * 4 * PAIRS * 11
    assert found.exponentials == 1e3 * PAIRS
    assert (found.least, found.bound) == (found.products, "tensor cores")
    assert roof(ONE, "forward", **CALL, itemsize=4).memory == 2 * found.memory


def test_training_by_hand():
    forward, both = (roof(ONE, what, **CALL) for what in ("forward", "training"))
    assert both.products / forward.products == 7 / 2
    assert both.exponentials / forward.exponentials == 2
    assert both.memory / forward.memory == 12 / 4


@pytest.mark.parametrize(
    ("device", "bound"),
    [
        (Device("slow memory", 1e9, 1e-9, 1e9), "memory"),
        (Device("slow products", 1e-9, 1e9, 1e9), "tensor cores"),
        (Device("slow exponentials", 1e9, 1e9, 1e-9), "exponentials"),
    ],
)
def test_the_slowest_part_binds(device, bound):
    found = roof(device, "forward", **CALL)
    assert found.bound == bound
    assert found.least == max(found)


def test_memory_and_tensor_cores_meet_where_arithmetic_says():
    """In 16 bits, half as many products a byte as a query sees keys: 4 N K d of them over 8 N d bytes."""
    device = device_of("NVIDIA H100 80GB HBM3")
    assert device is not None
    keys = 2 * device.products / device.bytes
    found = roof(device, "forward", batch=1, heads=1, tokens=4096, keys=keys, width=32)
    assert math.isclose(found.memory, found.products)


def test_heads_of_32_channels_wait_for_exponentials():
    """128 products an exponential, where a Hopper GPU has 256 of the one for each of the other."""
    device = device_of("NVIDIA H200")
    assert device is not None
    assert math.isclose(device.products / device.exponentials, 256)
    found = roof(device, "forward", batch=1, heads=1, tokens=4096, keys=1024, width=32)
    assert found.bound == "exponentials"
    assert math.isclose(found.exponentials / found.products, 2)


def test_names_of_devices():
    assert device_of("NVIDIA H200").name == "H200 SXM"
    assert device_of("NVIDIA A100-SXM4-80GB").name == "A100 SXM 80 GB"
    # Others of the same generation have other clocks and memories.
    others = ("GH200 480GB", "GB200", "H100 PCIe", "H100 NVL", "H200 NVL", "A100-PCIE-40GB", "GeForce RTX 4090")
    assert [device_of(one) for one in (*(f"NVIDIA {other}" for other in others), "H200", "")] == [None] * 9


def test_limits_of_a_case():
    case = next(case for case in HEADLINE if case.name == "regions/128x128")
    found = roof_of(ONE, case, "forward", batch=8)
    # Four regions of 16 x 16 tokens.
    assert found.exponentials == 1e3 * 8 * 4 * 128**2 * 1024
    windows = next(case for case in HEADLINE if case.problem == "windows")
    side, heads, window = (windows.sizes[name] for name in ("side", "heads", "window"))
    assert roof_of(ONE, windows, "forward", batch=1).exponentials == 1e3 * heads * side**2 * window


def test_every_kind_of_blocks_has_its_keys():
    for case in routed(GPU):
        seen = roof_of(ONE, case, "forward", batch=1).exponentials / 1e3
        tokens, sizes = case.sizes["side"] ** 2, case.sizes
        keys = seen / (sizes["heads"] * tokens)
        if case.problem == "regions":
            assert keys == pytest.approx(tokens * sizes["topk"] / sizes["regions"] ** 2)
        else:
            assert keys == sizes["window"] ** (2 if case.problem == "shifted" else 1)
    assert {case.problem for case in routed(GPU)} == {"regions", "windows", "shifted"}


def results(gpu: str | None, dtype: str = "bfloat16") -> dict:
    record = {
        "name": "regions/128x128",
        "facts": {"batch": 8, "tokens": 128**2, "heads": 4},
        "contenders": {"attnkit": {"passed": True, "forward": {"min": 0.5}, "training": {"min": 2.0}}},
    }
    machine = {"dtype": dtype} if gpu is None else {"dtype": dtype, "gpu": gpu}
    return {"machine": machine, "cases": [record]}


def test_a_table_has_the_measured_point_and_its_share():
    lines = table(results("NVIDIA H200")).splitlines()
    assert len(lines) == 4
    case = next(case for case in HEADLINE if case.name == "regions/128x128")
    device = device_of("NVIDIA H200")
    assert device is not None
    forward = roof_of(device, case, "forward", batch=8)
    assert f"| {100 * forward.least / 0.5:.3g} % |" in lines[2]
    assert "| 0.5 ms |" in lines[2]
    assert "forward and backward" in lines[3]


@pytest.mark.parametrize("one", [results(None), results("Tesla T4"), results("NVIDIA H200", "float32")])
def test_no_table_where_the_device_has_no_numbers(one):
    assert table(one) == ""


def test_a_case_that_failed_has_no_row():
    one = results("NVIDIA H200")
    one["cases"][0]["facts"] = {}
    assert table(one) == ""


def test_every_device_has_limits_for_every_case():
    for device in DEVICES:
        assert len(limits(device).splitlines()) == 2 + 2 * len(routed(GPU))
