"""Where time goes: every operator is put to one part, in a backward pass to that of the operator before it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import attnkit
from attnkit_models.bench import missed, profiled, report, runner
from attnkit_models.bench.case import OURS, Setting, Target
from attnkit_models.bench.profiled import (
    AROUND,
    ATTEND,
    BETWEEN,
    COPIES,
    FUSED,
    GROUP,
    LINEAR,
    OTHER,
    PARTS,
    PRODUCTS,
    PROJECTIONS,
    REST,
    part_of,
)
from tests.bench.small import SMALL, make_small, small_case

CPU = torch.device("cpu")
ABOUT = {"kind": "headline", "machine": {"threads": 2, "device": "cpu"}}


@pytest.mark.parametrize(
    ("name", "stage", "part"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", ATTEND, FUSED),
        ("aten::bmm", ATTEND, PRODUCTS),
        ("aten::addmm", ATTEND, PRODUCTS),
        ("aten::mkldnn_convolution", ATTEND, PRODUCTS),
        ("aten::index_select", ATTEND, COPIES),
        ("aten::copy_", ATTEND, COPIES),
        ("aten::index_add_", ATTEND, COPIES),
        ("aten::fill_", ATTEND, COPIES),
        ("aten::exp", ATTEND, OTHER),
        ("aten::_softmax_backward_data", ATTEND, OTHER),
        ("aten::topk", GROUP, AROUND),
        ("aten::addmm", LINEAR, PROJECTIONS),
        ("aten::gelu", "", REST),
        ("aten::transpose", ATTEND, BETWEEN),
        ("aten::empty_strided", "", BETWEEN),
        ("aten::t", LINEAR, BETWEEN),
        ("attnkit::blocks", ATTEND, BETWEEN),
        ("autograd::engine::evaluate_function: MulBackward0", "", BETWEEN),
        (LINEAR, "", BETWEEN),
    ],
)
def test_operators_have_their_part(name, stage, part):
    assert part_of(name, stage) == part


@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_is_told_in_all_its_parts(grad):
    torch.manual_seed(0)
    mix = attnkit.HeadMix(32, [attnkit.TopKRegion(heads=2, regions=4, topk=2)])
    x = torch.randn(2, 16, 16, 32, requires_grad=grad)

    def run():
        with torch.set_grad_enabled(grad), attnkit.use_backend("gather"):
            out = mix(x)
            return torch.autograd.grad(out.sum(), [x, *mix.parameters()]) if grad else out

    run()
    found = profiled.profiled(run, CPU, rounds=2)
    shares = found["shares"]
    assert list(shares) == list(PARTS) and sum(shares.values()) == pytest.approx(1, abs=0.001)
    assert all(shares[part] > 0 for part in (FUSED, COPIES, AROUND, PROJECTIONS, BETWEEN))
    # Outside the mix there is a sum, in training only.
    assert (shares[REST] > 0) == grad
    assert 0 < found["milliseconds"] < 1e4


class Event:
    """As the profiler of a GPU gives it."""

    self_cpu_time_total = 3.0

    def __init__(self, name, spent, parent=None, *, start=5, device=DeviceType.CPU, number=-1):
        self.name, self.self_device_time_total, self.cpu_parent = name, spent, parent
        self.device_type, self.sequence_nr = device, number
        self.is_user_annotation = "::" not in name
        self.time_range = SimpleNamespace(start=start, end=10 if name == profiled.PASS else start)


def test_on_a_gpu_the_time_of_our_operators_is_fused_attention():
    whole = Event(profiled.PASS, 0.0, start=0)
    layer = Event(ATTEND, 0.0, whole)
    events = [whole, layer, Event("attnkit::blocks", 5.0, layer), Event("aten::copy_", 2.0, layer)]
    on_gpu, on_cpu = (profiled.shared_out(events, cuda=cuda) for cuda in (True, False))
    assert on_gpu[FUSED] == 5.0 and on_gpu[COPIES] == 2.0 and on_gpu[BETWEEN] == 0.0
    # On a CPU an operator's own time is what its Python takes.
    assert on_cpu[FUSED] == 0.0 and on_cpu[COPIES] == 3.0


def test_on_a_gpu_nothing_counts_twice_and_a_backward_pass_on_its_own_thread_counts():
    whole = Event(profiled.PASS, 0.0, start=0)
    layer = Event(ATTEND, 0.0, whole, start=1)
    made = Event("attnkit::blocks", 5.0, layer, start=2, number=7)
    node = Event("autograd::engine::evaluate_function: BlocksBackward", 0.0, start=6, number=7)
    backward = Event("aten::copy_", 4.0, node, start=7, number=7)
    device = [Event(name, 9.0, start=at, device=DeviceType.CUDA) for at, name in enumerate((profiled.PASS, ATTEND))]
    outside = Event("aten::copy_", 100.0, start=11)
    spent = profiled.shared_out([whole, layer, made, node, backward, *device, outside], cuda=True)
    assert spent[FUSED] == 5.0 and spent[COPIES] == 4.0 and sum(spent.values()) == 9.0


def test_a_backward_pass_belongs_to_what_made_it():
    """Nothing but a linear map has a gradient here, so that all products of both passes are its own."""
    layer, x = torch.nn.Linear(64, 64), torch.randn(256, 64)
    with (
        profiled._spans(),
        torch.profiler.profile(acc_events=True) as found,
        torch.profiler.record_function(profiled.PASS),
    ):
        layer(x).sum().backward()
    spent = profiled.shared_out(found.events())
    backward = [one for one in found.events() if one.name == "aten::mm"]
    assert backward and spent[PROJECTIONS] > sum(one.self_cpu_time_total for one in backward)
    assert spent[PRODUCTS] == spent[AROUND] == 0


def test_hooks_and_wrappers_are_gone_afterwards():
    layer, x = torch.nn.Linear(4, 4), torch.randn(1, 4)
    profiled.profiled(lambda: layer(x), CPU, rounds=1)
    with torch.profiler.profile(acc_events=True) as found:
        layer(x)
    assert LINEAR not in {one.name for one in found.events()}


def test_cases_with_targets_are_profiled():
    case = small_case("regions", "regions/128x128")
    assert "profile" not in runner.run_case(case, Setting())
    promising = type(case)(**{**vars(case), "targets": (Target("efficiency forward", "dense SDPA", 1e6),)})
    record = runner.run_case(promising, Setting())
    assert set(record["profile"]) == {"forward", "training"}
    lines = list(report.lines(promising, record))
    assert any(line.strip().startswith("attnkit's time, forward: ") for line in lines)
    table = missed.profile_table(record)
    assert "fused attention" in table and table.count("%") >= 4
    assert missed.profile_table({}) == "No profile was made."


def test_missed_targets_are_told_with_what_bounds_them():
    shares = {**dict.fromkeys(PARTS, 0.0), FUSED: 0.5, COPIES: 0.5}
    contender = {"passed": True, "errors": {}, "memory forward": 1, "memory training": 1}
    contender |= {what: {"min": 2.0, "median": 2.0, "rounds": 3} for what in ("forward", "training")}
    record = {
        "name": "regions/128x128",
        "load": 0.1,
        "density": 0.3,
        "contenders": {OURS: contender, "dense SDPA": contender, "BiFormer gather": contender},
        "profile": {what: {"milliseconds": 2.0, "shares": shares} for what in ("forward", "training")},
    }
    text = missed.reasons({**ABOUT, "cases": [record]})
    assert text.startswith("`regions/128x128`: What is not fused attention is moving")
    assert "sparse efficiency would be 0.60 (forward)" in text and "| 50 % | 50 % |" in text
    keys = {**record, "name": "predicted_keys/3136"}
    keys["contenders"] = {
        OURS: contender,
        "all but attention": {**contender, "forward": {"min": 1.0}},
        "authors' formulation": contender,
    }
    text = missed.reasons({**ABOUT, "cases": [keys]})
    assert "All but attention takes 1 of 2 ms forward." in text and "more than 2.00 times as fast as *authors'" in text
    assert missed.reasons({**ABOUT, "cases": []}) == "All targets were reached."


def test_a_mix_is_the_sum_of_its_groups_alone():
    made = make_small("mix")
    outs = [one.forward() for one in made.contenders.values()]
    assert [len(one) for one in outs] == [1, len(SMALL["mix"]["groups"])]
    torch.testing.assert_close(sum(outs[1]), outs[0][0])
    for one in made.contenders.values():
        assert max(one.check(one).values()) < 1e-9
        assert all(grad is not None for grad in one.step())


def test_groups_that_compute_something_else_are_red():
    one = make_small("mix").contenders["its groups alone"]
    with torch.no_grad():
        one.leaves[-1].add_(0.1)
    assert one.check(one)["output"] > 1e-3
