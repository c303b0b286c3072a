"""What holds for every registered primitive, whatever its options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import Grid
from attnkit.kernels.dispatch import wrapping
from attnkit.registry import list_primitives, primitive_class
from attnkit.testing import expected, outputs_and_gradients, random_options, random_tensor
from attnkit.testing.strategies import grids, seeds

NAMES = list_primitives()
SOFTMAX = [name for name in NAMES if name != "conv"]


def drawn(name, grid, seed, **fixed):
    """Random options that fit the grid."""
    if name == "mask_predictor":
        fixed["prefix"] = grid.prefix if seed % 2 else 0
    return random_options(name, seed=seed, **fixed)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SOFTMAX)
@given(grid=grids(max_height=5, max_width=6), seed=seeds(), masked=st.booleans())
def test_every_call_equals_dense_attention_under_its_mask(name, training, random_mix, grid, seed, masked):
    mix = random_mix(drawn(name, grid, seed), seed=seed).train(training)
    generator = torch.Generator().manual_seed(seed)
    token_mask = torch.rand(2, grid.tokens, generator=generator) < 0.7 if masked else None
    calls = []

    def compare(call, compute):
        calls.append(call)
        found = compute()
        torch.testing.assert_close(found.out, expected(call)[0], rtol=1e-9, atol=1e-9)
        return found

    with wrapping(compare):
        mix(random_tensor(2, grid.tokens, mix.dim, seed=seed), grid, token_mask=token_mask)
    assert calls
    for call in calls:
        # Prefix tokens are global in every softmax primitive.
        mask = call.layout.to_mask()
        kept = mask.any(-2, keepdim=True) if masked else torch.ones_like(mask[..., :1, :])
        assert torch.equal(mask[..., : grid.prefix, :], kept.expand_as(mask)[..., : grid.prefix, :])
        if not masked:
            assert mask[..., : grid.prefix].all()


@pytest.mark.parametrize("name", SOFTMAX)
@given(grid=grids(max_height=4, max_width=5), seed=seeds())
def test_gradients_do_not_depend_on_the_backend(name, random_mix, grid, seed):
    from attnkit import use_backend

    mix = random_mix(drawn(name, grid, seed), seed=seed)
    x = random_tensor(2, grid.tokens, mix.dim, seed=seed, grad=True)
    inputs = [x, *mix.parameters()]
    found = []
    for backends in ("reference", "sdpa,reference", "gather,sdpa,reference"):
        with use_backend(backends):
            found.append(outputs_and_gradients(lambda x, *_: mix(x, grid), inputs, seed=seed))
    for other in found[1:]:
        for one, two in zip(found[0][0] + found[0][1], other[0] + other[1], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("poison", [7.0, torch.nan, torch.inf])
@pytest.mark.parametrize("name", NAMES)
@given(grid=grids(max_height=5, max_width=6), seed=seeds())
def test_masked_tokens_never_matter(name, poison, random_mix, grid, seed):
    mix = random_mix(drawn(name, grid, seed), seed=seed)
    kept = torch.rand(2, grid.tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    x = random_tensor(2, grid.tokens, mix.dim, seed=seed)
    spoiled = x.masked_fill(~kept[..., None], poison)
    clean, other = (mix(one, grid, token_mask=kept) for one in (x, spoiled))
    # With a stride there are fewer outputs than tokens; those on the grid do not come from one token's query.
    rows = (
        kept
        if clean.shape[1] == grid.tokens and mix.options[0].output_stride() == 1
        else torch.ones(clean.shape[:2]).bool()
    )
    rows[:, : grid.prefix] = kept[:, : grid.prefix]
    assert other[rows].isfinite().all()
    torch.testing.assert_close(other[rows], clean[rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@given(grid=grids(max_height=5, max_width=6), seed=seeds())
def test_a_mask_of_all_tokens_changes_nothing(name, random_mix, grid, seed):
    mix = random_mix(drawn(name, grid, seed), seed=seed)
    x = random_tensor(2, grid.tokens, mix.dim, seed=seed)
    everyone = torch.ones(2, grid.tokens, dtype=torch.bool)
    torch.testing.assert_close(mix(x, grid, token_mask=everyone), mix(x, grid), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@given(grid=grids(max_height=5, max_width=6), seed=seeds(), masked=st.booleans())
def test_items_of_a_batch_are_independent(name, random_mix, grid, seed, masked):
    mix = random_mix(drawn(name, grid, seed), seed=seed)
    x = random_tensor(3, grid.tokens, mix.dim, seed=seed)
    kept = torch.rand(3, grid.tokens, generator=torch.Generator().manual_seed(seed)) < 0.7 if masked else None
    together = mix(x, grid, token_mask=kept)
    for item in range(3):
        one = slice(item, item + 1)
        alone = mix(x[one], grid, token_mask=None if kept is None else kept[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@given(grid=grids(max_height=5, max_width=6), seed=seeds())
def test_same_seed_same_result_and_the_global_state_stays(name, random_mix, grid, seed):
    options = drawn(name, grid, seed)
    x = random_tensor(2, grid.tokens, 2 * options.heads, seed=seed)
    found = []
    for global_seed in (1, 2):
        mix = random_mix(options, seed=seed).train()
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        found.append([mix(x, grid) for _ in range(2)])
        assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
@given(grid=grids(max_height=5, max_width=6), seed=seeds())
def test_the_grid_of_the_output(name, random_mix, grid, seed):
    options = drawn(name, grid, seed)
    mix = random_mix(options, seed=seed)
    found = mix.run(random_tensor(2, grid.tokens, mix.dim, seed=seed), grid)
    assert found.grid == grid.strided(options.output_stride())
    assert found.x.shape == (2, found.grid.tokens, mix.dim)
    if not grid.prefix:
        image = random_tensor(2, *grid.sizes, mix.dim, seed=seed)
        assert mix(image).shape == (2, *found.grid.sizes, mix.dim)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right_numerically(name, random_mix):
    """Against finite differences, so that nothing here rests on a second implementation."""
    grid = Grid(2, 3, prefix=1)
    mix = random_mix(drawn(name, grid, 4, heads=2), seed=4)
    x = random_tensor(1, grid.tokens, mix.dim, seed=4, grad=True)
    assert torch.autograd.gradcheck(lambda x: mix(x, grid), (x,), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds(), grid=grids(max_height=5, max_width=6))
def test_every_parameter_gets_a_finite_gradient(name, random_mix, seed, grid):
    mix = random_mix(drawn(name, grid, seed), seed=seed).train()
    mix(random_tensor(2, grid.tokens, mix.dim, seed=seed), grid).square().sum().backward()
    for parameter_name, parameter in mix.named_parameters():
        if "predictor" not in parameter_name:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_what_its_documentation_needs(name):
    options = primitive_class(name)
    assert options.kind == name
    assert "arXiv" in options.paper
    assert options.formula
    assert options.cost
    assert options.__doc__
    assert "Args:" in options.__doc__
