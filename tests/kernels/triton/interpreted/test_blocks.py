"""Blocks by Triton's interpreter: the kernels' arithmetic and addresses, without a GPU."""

from __future__ import annotations

import pytest
import torch

from attnkit import Grid, attend
from attnkit.kernels import recording
from attnkit.kernels.ops.blocks import BLOCKS, BlockTables
from attnkit.kernels.triton.blocks import configs
from attnkit.kernels.triton.blocks.configs import Config
from attnkit.kernels.triton.blocks.launches import backward_of, forward_of
from attnkit.kernels.triton.blocks.op import PAIR
from attnkit.layouts import Blocks
from attnkit.testing import random_qkv, random_tensor
from tests.crossing import met
from tests.kernels.triton import block_cases
from tests.kernels.triton.block_cases import CASES, check


@pytest.fixture(autouse=True)
def tiles_of_their_own(monkeypatch):
    """Small regions too are computed by the kernels of blocks."""
    monkeypatch.setattr("attnkit.kernels.triton.backend.shares_tiles", lambda call: False)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(configs, "configuration", lambda *_: Config(16, 16, 1, 1))


@pytest.fixture
def few_channels(monkeypatch):
    monkeypatch.setattr(configs, "depth", lambda *_: 16)


@pytest.mark.parametrize("name", CASES)
def test_as_the_oracle(name, request):
    case = CASES[name]
    if not case.tiles:
        request.getfixturevalue("small_tiles")
    check(case, "cpu")


@pytest.mark.usefixtures("small_tiles", "few_channels")
@pytest.mark.parametrize("name", block_cases.STEPPED)
def test_as_the_oracle_a_few_channels_at_a_time(name):
    check(CASES[name], "cpu")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", block_cases.OPERATORS)
def test_as_the_other_kernels_of_the_operator(name):
    """Every argument of the operator in every form, against the kernels of the CPU in float64."""
    block_cases.check_operator(block_cases.OPERATORS[name], PAIR, "cpu")


@pytest.mark.usefixtures("small_tiles")
def test_autocast():
    block_cases.check_autocast(PAIR, "cpu")


def test_chosen_by_name_only():
    layout = Blocks.windows(Grid(4, 4), 2)
    with recording() as choices:
        attend(*random_qkv((16, 16), batch=1, heads=1, dtype=torch.float32), layout)
    assert choices[0].backend != "triton"
    assert "Triton interprets its kernels" in choices[0].reasons["triton"][0]


# Products with what is masked afterwards, and maxima of it, of which NumPy warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("name", "poison", "with_bias"), met(block_cases.POISONED, [torch.nan, torch.inf], [False, True])
)
def test_what_nobody_sees_matters_to_nobody(name, poison, with_bias):
    block_cases.check_poisoned(block_cases.POISONED[name](), poison, with_bias, "cpu")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.usefixtures("small_tiles", "few_channels")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", block_cases.POISONED)
def test_what_nobody_sees_matters_to_nobody_a_few_channels_at_a_time(name, with_bias):
    block_cases.check_poisoned(block_cases.POISONED[name](), torch.nan, with_bias, "cpu")


# Weights of empty slots, which are masked afterwards, of which NumPy warns.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("name", "hidden", "dtype"), met(block_cases.HIDDEN, block_cases.HIDING, [torch.float32, torch.bfloat16])
)
def test_what_a_large_bias_hides(name, hidden, dtype):
    block_cases.check_hidden(block_cases.HIDDEN[name](), hidden, dtype, "cpu")


@pytest.mark.usefixtures("small_tiles")
def test_the_memory_order_of_one_projection():
    layout = Blocks.windows(Grid(4, 8, prefix=1), 4)
    columns = random_tensor(2, 33, 2 * 3 * 16, seed=4, dtype=torch.float32).requires_grad_()
    grads = []
    for backend in ("triton", "reference"):
        q, k, v = columns.unflatten(-1, (3, 2, 16)).movedim(2, 0).transpose(2, 3)
        out = attend(q, k, v, layout, backend=backend)
        grads += torch.autograd.grad(out.square().sum(), columns)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    q, k, v = columns[:, 1:].detach().unflatten(-1, (3, 2, 16)).movedim(2, 0).transpose(2, 3)
    assert attend(q, k, v, Blocks.windows(Grid(4, 8), 4), backend="triton").transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("layout", "dtype", "width", "names"),
    [
        (Blocks.windows(Grid(7, 7), 7), torch.bfloat16, 32, ["window_gradient"]),
        (Blocks.windows(Grid(7, 7, prefix=1), 7), torch.float16, 32, ["window_gradient", "prefix_gradient"]),
        (Blocks.windows(Grid(9, 9), 9), torch.bfloat16, 32, ["query_gradient", "key_gradient"]),
        (Blocks.windows(Grid(7, 7), 7), torch.bfloat16, 33, ["query_gradient", "key_gradient"]),
        (Blocks.windows(Grid(4, 4), 4), torch.float32, 16, ["window_gradient"]),
        (Blocks.windows(Grid(5, 5), 5), torch.float32, 16, ["query_gradient", "key_gradient"]),
        (block_cases.regions(Grid(8, 8), 4, 1, 1), torch.bfloat16, 64, ["query_gradient", "key_gradient", "key_parts"]),
    ],
)
def test_which_kernels_make_the_gradients(layout, dtype, width, names):
    q, k, v = random_qkv((layout.num_queries, layout.num_keys), batch=1, heads=1, head_dim=width, dtype=dtype)
    order = layout.order
    tables = BlockTables(
        *(order.token, order.slot, order.token, order.slot, layout.index, None, None, layout.prefix),
        *([order.padded] * 2, 0.1),
    )
    found = forward_of(q, k, v, tables)
    back = backward_of(found.out, None, found.out, found.total, found.peak, q, k, v, tables, [True, True, True, False])
    assert [one.kernel.__name__ for one in back.launches] == [f"blocks_{name}" for name in names]


def test_no_items():
    q, k, v = (one[:0].requires_grad_() for one in random_qkv((16, 16), dtype=torch.float32))
    attend(q, k, v, Blocks.windows(Grid(4, 4), 2), backend="triton").sum().backward()
    assert k.grad is not None and k.grad.shape == k.shape


def test_the_operators_of_the_cpu_stay_their_own():
    """That Triton interprets does not change what other backends compute: float64 here."""
    assert PAIR.op is not BLOCKS.op
    layout = Blocks.windows(Grid(4, 4), 2)
    given = random_qkv((16, 16), dtype=torch.float64)
    found, right = (attend(*given, layout, backend=one) for one in ("chunked", "reference"))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
