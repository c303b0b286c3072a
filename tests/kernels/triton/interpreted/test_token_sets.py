"""Token sets by Triton's interpreter: the kernels' arithmetic and addresses, without a GPU."""

from __future__ import annotations

import pytest
import torch

from attnkit import attend
from attnkit.kernels.ops.token_sets import TOKEN_SETS, SetTables
from attnkit.kernels.triton.token_sets import configs, launches, listing, unions
from attnkit.kernels.triton.token_sets.configs import Config
from attnkit.kernels.triton.token_sets.op import PAIR
from attnkit.testing import random_qkv, random_tensor
from tests.crossing import met
from tests.kernels.triton import token_set_cases as cases
from tests.kernels.triton.token_set_cases import CASES, check


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(configs, "configuration", lambda *_: Config(16, 16, 1, 1))


@pytest.mark.parametrize("name", CASES)
def test_as_the_oracle(name, request):
    case = CASES[name]
    if not case.tiles:
        request.getfixturevalue("small_tiles")
    check(case, "cpu")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("table", cases.TABLES)
@pytest.mark.parametrize("name", cases.ASKED)
def test_as_the_other_kernels_of_the_operator(name, table):
    cases.check_operator(name, table, PAIR, "cpu")


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_words_of_every_size(monkeypatch, rows):
    monkeypatch.setattr(configs, "configuration", lambda *_: Config(rows, 16, 1, 1))
    check(cases.Case(lambda: cases.lists(1, 2, rows=70, queries_all=1, keys_all=1)), "cpu")


def visited(steps):
    """How many columns each tile visits, of the queries' lists and of the keys'."""
    found = {}
    for step in steps:
        step.run()
        if getattr(step, "kernel", None) is unions.token_set_unions:
            found[step.constants["TURNED"]] = step.arguments["counts"].flatten().tolist()
    return found


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("prefix", [0, 2])
def test_tiles_take_queries_of_a_group_together(prefix):
    """Four groups of 8 queries, each with five keys of its own: two of them fill a tile of 16."""
    layout = cases.far_sharing(True)
    k = torch.randn(1, 1, prefix + cases.KEYS, 16)
    q, order = torch.randn(1, 1, prefix + 32, 16), layout.query_groups.argsort(stable=True).int()
    index = torch.where(layout.index < 0, -1, layout.index + prefix)
    found = {}
    for name, one in (("image", None), ("groups", order)):
        steps = launches.forward_of(q, k, k, SetTables(index, None, None, prefix, prefix, 1.0, one)).steps
        found[name] = visited(steps)[False][bool(prefix) :]
    assert found == {"image": [20 + prefix] * 2, "groups": [10 + prefix] * 2}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("prefix", [0, 2])
def test_tiles_take_keys_together_that_as_many_queries_see(prefix):
    """Of 64 keys every fourth is seen by all 40 queries, and the others by one or nobody."""
    seen = torch.zeros(40, 64, dtype=torch.bool)
    seen[:, ::4] = True
    seen[torch.arange(1, 40), torch.arange(1, 40)] = True
    q, k, mask = torch.randn(1, 1, prefix + 40, 16), torch.randn(1, 1, prefix + 64, 16), seen[None, None]
    tables = SetTables(torch.nn.functional.pad(mask, (prefix, 0)), None, None, prefix, prefix, 1.0)
    first = launches.forward_of(q, k, k, tables)
    visited(first.steps)
    given = (torch.randn_like(first.out), None, first.out, first.total, first.peak, q, k, k, tables)
    counts = visited(launches.backward_of(*given, [True] * 3 + [False]).steps)[True][bool(prefix) :]
    # 30 of the first 40 keys are seen by one query each.
    assert counts == [prefix + 40, prefix + 16, prefix + 14, prefix]


@pytest.mark.usefixtures("small_tiles")
def test_marks_of_one_item_and_head_at_a_time(monkeypatch):
    monkeypatch.setattr(listing, "MARKS", 3 * cases.QUERIES * cases.KEYS)
    check(CASES["lists per item and head"], "cpu")
    check(CASES["lists, keys hidden per item"], "cpu")
    check(CASES["groups per item and head"], "cpu")


# Products with what is masked afterwards, and maxima of it, of which NumPy warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("name", "poison", "with_bias"), met(cases.POISONED, [torch.nan, torch.inf], [False, True]))
def test_what_nobody_sees_matters_to_nobody(name, poison, with_bias):
    cases.check_poisoned(cases.POISONED[name](), poison, with_bias, "cpu")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", [-1e9, 1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max])
def test_a_large_bias_hides_no_gradient(size):
    cases.check_large_bias(size, "cpu")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_in_half_precision_have_the_room_of_weights(with_bias):
    """Before they are multiplied with keys, the logits' gradients are as large as weights make them, not their sums."""
    tokens = 64
    q, k, v, bias = (random_tensor(1, 1, tokens, width, seed=width) for width in (16, 17, 18, tokens))
    given = [(0.1 * q).half(), (0.1 * k[..., :16]).half(), v[..., :16].half(), (0.1 * bias).half()]
    grad = 8000 * random_tensor(1, 1, tokens, 16, seed=9)
    found = []
    for dtype, backend in ((torch.float16, "triton"), (torch.float64, "reference")):
        leaves = [one.detach().to(dtype).requires_grad_() for one in given[: 4 if with_bias else 3]]
        layout = cases.TokenMask(torch.ones(tokens, tokens, dtype=torch.bool))
        out = attend(*leaves[:3], layout, bias=leaves[3] if with_bias else None, backend=backend)
        found.append(torch.autograd.grad(out, leaves, grad.to(dtype)))
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.01 * float(other.abs().max()))


@pytest.mark.usefixtures("small_tiles")
def test_an_entry_behind_the_last_key_is_nobodys():
    """Nothing on a GPU looks at lists before they are used; such an entry must not become the next query's."""
    keys = 5
    index = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]])
    spoiled = index.clone()
    spoiled[3, 1], spoiled[4, 1] = keys + 2, 40 * keys
    index[3, 1], index[4, 1] = -1, -1
    q, k, v = random_qkv((5, keys), batch=1, heads=1, head_dim=16, dtype=torch.float32)
    found = [PAIR.op(q, k, v, one[None, None], None, None, 0, 0, 0.25, None) for one in (index, spoiled)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("small_tiles")
def test_a_bias_of_minus_infinity_hides_keys_and_queries():
    layout = cases.lists(1, 1)
    given = list(random_qkv((cases.QUERIES, cases.KEYS), batch=1, heads=1, head_dim=16, dtype=torch.float32))
    bias = random_tensor(1, 1, cases.QUERIES, cases.KEYS, seed=3, dtype=torch.float32)
    bias = bias.masked_fill(cases.some(cases.QUERIES, cases.KEYS, share=0.3), -torch.inf)
    bias[:, :, 7] = -torch.inf
    found = cases.answers(layout, [*given, bias], None, "triton")
    layout = cases.TokenMask(layout.to_mask() & bias.isfinite())
    right = cases.answers(layout, [*given, bias.where(bias.isfinite(), 0.0)], None, "reference")
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_the_memory_order_of_one_projection():
    layout = cases.lists(1, 1, rows=cases.KEYS)
    columns = random_tensor(2, cases.KEYS, 2 * 3 * 16, seed=4, dtype=torch.float32).requires_grad_()
    grads = []
    for backend in ("triton", "reference"):
        q, k, v = columns.unflatten(-1, (3, 2, 16)).movedim(2, 0).transpose(2, 3)
        out = attend(q, k, v, layout, backend=backend)
        assert backend == "reference" or out.transpose(1, 2).is_contiguous()
        grads += torch.autograd.grad(out.square().sum(), columns)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 7)])
def test_no_items_and_no_queries(sizes):
    items = 0 if sizes[0] else 1
    q, k, v = (one[:items].requires_grad_() for one in random_qkv(sizes, dtype=torch.float32))
    layout = cases.TokenSets(torch.zeros(sizes[0], 2, dtype=torch.int64), sizes[1])
    attend(q, k, v, layout, backend="triton").sum().backward()
    assert k.grad is not None and torch.equal(k.grad, torch.zeros_like(k))


def test_the_operators_of_the_cpu_stay_their_own():
    """That Triton interprets does not change what other backends compute: float64 here."""
    assert PAIR.op is not TOKEN_SETS.op
    layout = cases.lists(1, 1)
    given = random_qkv((cases.QUERIES, cases.KEYS), dtype=torch.float64)
    found, right = (attend(*given, layout, backend=one) for one in ("chunked", "reference"))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
