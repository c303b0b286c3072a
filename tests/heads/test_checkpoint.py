"""Activation checkpointing runs a region twice; the second time must see the same random windows."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnkit import AttnkitError, Grid, RandomWindow
from attnkit.testing import random_tensor

GRID = Grid(4, 6, prefix=1)


def gradients(mixes, run, passes=1):
    """Gradients of all parameters and the input after some passes through a stack of mixes."""
    x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32, grad=True)
    for _ in range(passes):
        rows = x
        for mix in mixes:
            rows = run(mix, rows)
        (rows * random_tensor(*rows.shape, seed=1, dtype=torch.float32)).sum().backward()
    found = [x.grad, *(parameter.grad for mix in mixes for parameter in mix.parameters() if parameter.grad is not None)]
    for mix in mixes:
        mix.zero_grad()
    return found


def plain(mix, rows):
    return mix(rows, GRID)


def close(found, right):
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_every_primitive(random_mix, sample, reentrant):
    if sample.output_stride() != 1:
        sample = dataclasses.replace(sample, stride=1)
    elif sample.output_scale() != 1:
        sample = dataclasses.replace(sample, scale=1)
    right = gradients([random_mix(sample).train()], plain)
    mix = random_mix(sample).train()
    close(gradients([mix], lambda mix, rows: checkpoint(mix, rows, GRID, use_reentrant=reentrant)), right)
    if sample.kind == "random_window":
        assert mix.draws.item() == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_stack_of_random_windows_over_several_steps(random_mix, reentrant):
    def stack():
        return [random_mix(RandomWindow(2, 5), layer=layer, seed=layer).train() for layer in range(3)]

    right = gradients(stack(), plain, passes=3)
    mixes = stack()
    found = gradients(mixes, lambda mix, rows: checkpoint(mix, rows, GRID, use_reentrant=reentrant), passes=3)
    close(found, right)
    assert [mix.draws.item() for mix in mixes] == [3, 3, 3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_region_around_several_layers(random_mix, reentrant):
    def stack():
        return [random_mix(RandomWindow(2, 5), layer=layer, seed=layer).train() for layer in range(2)]

    right = gradients(stack(), plain)
    mixes = stack()

    def together(rows):
        for mix in mixes:
            rows = mix(rows, GRID)
        return rows

    x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32, grad=True)
    out = checkpoint(together, x, use_reentrant=reentrant)
    (out * random_tensor(*out.shape, seed=1, dtype=torch.float32)).sum().backward()
    close([x.grad, *(parameter.grad for mix in mixes for parameter in mix.parameters())], right)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_draw_made_outside_serves_any_number_of_pending_passes(random_mix, reentrant):
    def step(mix, run):
        xs = [random_tensor(2, 25, 8, seed=seed, dtype=torch.float32, grad=True) for seed in range(3)]
        sum(run(mix, x).square().sum() for x in xs).backward()
        return [x.grad for x in xs]

    def outside(mix, rows):
        return checkpoint(lambda rows, draw: mix(rows, GRID, draw=draw), rows, mix.next_draw(), use_reentrant=reentrant)

    right = step(random_mix(RandomWindow(2, 5)).train(), plain)
    close(step(random_mix(RandomWindow(2, 5)).train(), outside), right)


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_pending_passes_without_draws_are_refused(random_mix, reentrant):
    mix = random_mix(RandomWindow(2, 5)).train()
    x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32, grad=True)
    total = sum(checkpoint(mix, x, GRID, use_reentrant=reentrant).square().sum() for _ in range(2))
    with pytest.raises(
        AttnkitError, match=r"while 2 of its training passes are pending; call draw = mix\.next_draw\(\)"
    ):
        total.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_ordinary_passes_before_and_between_change_nothing(random_mix, reentrant):
    """Only passes that checkpointing may run again are pending; others count their draw and are forgotten."""

    def step(mix, run):
        ordinary = random_tensor(2, 25, 8, seed=9, dtype=torch.float32)
        x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32, grad=True)
        mix(ordinary, GRID).sum().backward()
        mix(ordinary, GRID).sum().backward()
        out = run(mix, x)
        mix(ordinary, GRID)
        out.square().sum().backward()
        return [x.grad]

    right = step(random_mix(RandomWindow(2, 5)).train(), plain)
    close(
        step(
            random_mix(RandomWindow(2, 5)).train(),
            lambda mix, rows: checkpoint(mix, rows, GRID, use_reentrant=reentrant),
        ),
        right,
    )


def region(reentrant):
    return lambda mix, rows: checkpoint(mix, rows, GRID, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_are_not_pending(random_mix, guard, reentrant):
    """As a teacher or a new estimate of batch norms makes them."""

    def step(run):
        mix = random_mix(RandomWindow(2, 5)).train()
        with guard():
            for _ in range(3):
                mix(torch.zeros(1, 25, 8), GRID)
        assert mix._draws.pending == 0
        return gradients([mix], run, passes=2)

    close(step(region(reentrant)), step(plain))


def test_checkpointed_passes_without_gradients_are_not_pending(random_mix):
    mix = random_mix(RandomWindow(2, 5)).train()
    with torch.no_grad():
        for _ in range(3):
            checkpoint(mix, torch.zeros(1, 25, 8), GRID, use_reentrant=False)
    assert mix._draws.pending == 0


def test_a_pass_whose_graph_is_gone_is_not_pending(random_mix):
    """As where a loss that is not finite is left out."""

    def step(run):
        mix = random_mix(RandomWindow(2, 5)).train()
        for _ in range(2):
            run(mix, random_tensor(2, 25, 8, seed=3, dtype=torch.float32, grad=True))
        assert mix._draws.pending == 0
        return gradients([mix], run, passes=2)

    close(step(region(False)), step(plain))


def test_reentrant_passes_whose_graph_is_gone_are_refused_once(random_mix):
    """Nothing tells whether a reentrant checkpoint's graph is still there, so the next pass is no sure match."""
    mix = random_mix(RandomWindow(2, 5)).train()
    x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32, grad=True)
    for _ in range(3):
        checkpoint(mix, x, GRID, use_reentrant=True)
    with pytest.raises(AttnkitError, match="are pending"):
        checkpoint(mix, x, GRID, use_reentrant=True).sum().backward()
    other = random_mix(RandomWindow(2, 5)).train()
    other.draws += 4
    close(gradients([mix], region(True)), gradients([other], plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_retained_graph_sees_its_windows_each_time(random_mix, reentrant):
    def step(run):
        mix = random_mix(RandomWindow(2, 5)).train()
        found = []
        for _ in range(2):
            x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32, grad=True)
            out = run(mix, x).square().sum()
            out.backward(retain_graph=True)
            (out * 3).backward()
            found.append(x.grad)
        return found

    close(step(region(reentrant)), step(plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_retained_graph_is_never_taken_for_a_later_one(random_mix, reentrant):
    mix = random_mix(RandomWindow(2, 5)).train()
    x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32, grad=True)
    first = checkpoint(mix, x, GRID, use_reentrant=reentrant).sum()
    first.backward(retain_graph=True)
    second = checkpoint(mix, x, GRID, use_reentrant=reentrant).sum()
    with pytest.raises(AttnkitError, match="while 2 of its training passes are pending"):
        first.backward()
    del first, second


def test_half_a_graph_is_never_taken_for_a_later_one(random_mix):
    """What the first loss did not need can still be run again."""
    mix = random_mix(RandomWindow(2, 5)).train()
    x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32, grad=True)

    def two(rows):
        out = mix(rows, GRID)
        return out.square(), out.exp()

    one, other = checkpoint(two, x, use_reentrant=False)
    one.sum().backward(retain_graph=True)
    later = checkpoint(mix, x, GRID, use_reentrant=False)
    with pytest.raises(AttnkitError, match="while 2 of its training passes are pending"):
        other.sum().backward()
    del one, other, later


@pytest.mark.parametrize("how", [copy.deepcopy, lambda mix: pickle.loads(pickle.dumps(mix))], ids=["copied", "pickled"])
def test_a_copy_has_no_pending_passes(random_mix, how):
    mix = random_mix(RandomWindow(2, 5)).train()
    x = random_tensor(2, 25, 8, seed=0, dtype=torch.float32, grad=True)
    out = checkpoint(mix, x, GRID, use_reentrant=False)
    other = how(mix)
    assert (mix._draws.pending, other._draws.pending) == (1, 0)
    del out


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_compiled_region_with_a_draw_from_outside(random_mix, reentrant):
    torch.compiler.reset()

    def outside(mix, rows):
        return checkpoint(lambda rows, draw: mix(rows, GRID, draw=draw), rows, mix.next_draw(), use_reentrant=reentrant)

    right = gradients([random_mix(RandomWindow(2, 5)).train()], plain, passes=2)
    compiled = torch.compile(outside, fullgraph=True, backend="aot_eager")
    close(gradients([random_mix(RandomWindow(2, 5)).train()], compiled, passes=2), right)


@pytest.mark.parametrize("reentrant", [False, True])
def test_evaluation_has_nothing_to_remember(random_mix, reentrant):
    right = gradients([random_mix(RandomWindow(2, 5))], plain)
    mix = random_mix(RandomWindow(2, 5))
    close(gradients([mix], lambda mix, rows: checkpoint(mix, rows, GRID, use_reentrant=reentrant)), right)
    assert mix.next_draw() is None
    assert mix.draws.item() == 0
