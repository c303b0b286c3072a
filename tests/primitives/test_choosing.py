"""Keys are chosen a few queries at a time: the choice of whole matrices, in less memory, and as one operator."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnkit import CompetingMaskPredictor, Grid, HeadMix, MaskPredictor, ThresholdMaskPredictor
from attnkit.kernels import recording
from attnkit.layouts import TokenMask, TokenSets
from attnkit.primitives import HeadInputs, choosing, highest
from attnkit.primitives.choosing import Guess, best_keys, best_lists, keys_above
from attnkit.testing import peak_memory, random_tensor


def random_guess(queries=40, keys=50, seed=0, masked=False, per_item=False, **fields):
    query, pooled = (
        random_tensor(2, 3, *shape, seed=seed + at, dtype=torch.float32)
        for at, shape in enumerate([(queries, 4), (4, 9)])
    )
    basis = random_tensor(2, 9, keys, seed=seed + 2, dtype=torch.float32).abs()
    kept = random_tensor(2, keys, seed=seed + 3) > -0.5 if masked else None
    return Guess(
        query, pooled, basis if per_item else basis[0], kept, 2.0, **{"coefficients": 4, "least_share": None, **fields}
    )


@pytest.fixture
def small_pieces(monkeypatch):
    for module, name, size in ((choosing, "SCORES", 1100), (highest, "SEARCHED", 60), (highest, "SCRATCH", 200)):
        monkeypatch.setattr(module, name, size)


FORMS = [{}, {"masked": True}, {"per_item": True, "masked": True}, {"least_share": 0.1}, {"coefficients": 20}]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("fields", FORMS, ids=str)
@pytest.mark.parametrize("budget", [0, 1, 7, 30, 50])
def test_the_best_of_whole_matrices(fields, budget):
    guess = random_guess(**fields)
    scores = guess.all_scores()
    kept = scores.sort(-1, descending=True).values[..., :budget]
    for seen in (
        best_keys(guess, budget).keys,
        torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best_lists(guess, budget).keys.long(), True),
    ):
        assert (seen.sum(-1) == budget).all()
        found = scores.masked_fill(~seen, -torch.inf).sort(-1, descending=True).values[..., :budget]
        # Sums of eight products in another order.
        torch.testing.assert_close(found, kept, rtol=1e-5, atol=1e-6)
    framed = best_keys(guess, budget, (2, 1)).keys
    assert torch.equal(framed[:, :, 2:, 1:], best_keys(guess, budget).keys)
    assert framed[:, :, :2].all() and framed[..., :1].all()
    assert (best_lists(guess, budget, 3).keys == best_lists(guess, budget).keys + 3).all()
    assert best_lists(guess, budget).keys.dtype == torch.int32


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_groups_are_the_largest_shares(fields, monkeypatch):
    """Off the CPU, where tiles take queries of a group together."""
    guess = random_guess(**fields)
    ways = (lambda: best_keys(guess, 7, (2, 1)), lambda: best_lists(guess, 7), lambda: keys_above(guess, 0.6, (2, 0)))
    plain = [one() for one in ways]
    assert [one.groups for one in plain] == [None] * 3
    monkeypatch.setattr(choosing, "_grouping", lambda query: True)
    right = (guess.query @ guess.pooled).argmax(-1).int()
    for way, before, prefix in zip(ways, plain, (2, 0, 2), strict=True):
        keys, groups = way()
        assert torch.equal(keys, before.keys)
        assert groups.dtype == torch.int32 and (groups[..., :prefix] == -1).all()
        assert torch.equal(groups[..., prefix:], right)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_scores_above_a_number(fields):
    guess = random_guess(**fields)
    scores = guess.all_scores()
    seen = keys_above(guess, 0.6, (1, 2)).keys
    assert seen[:, :, :1].all() and seen[..., :2].all()
    clear = (scores - 0.6).abs() > 1e-5
    assert torch.equal(seen[:, :, 1:, 2:] & clear, (scores > 0.6) & clear)


@pytest.mark.usefixtures("small_pieces")
def test_an_item_with_a_smaller_budget():
    guess = random_guess()
    seen = best_keys(guess, 10, (0, 0), torch.tensor([4, 99])).keys
    assert torch.equal(seen[:1], best_keys(guess, 4).keys[:1]) and torch.equal(seen[1:], best_keys(guess, 10).keys[1:])


# Single rows, some queries of a head, one head, two of three, one item, both.
@pytest.mark.parametrize("many", [40, 550, 2000, 4100, 7000, 1 << 25])
@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_the_same_choice_where_no_value_may_be_looked_at(fields, many, monkeypatch):
    """As on GPUs, where several items are taken together and only the device knows their budgets."""
    guess, most = random_guess(**fields), torch.tensor([3, 99])

    def chosen():
        best = [best_keys(guess, budget, (1, 2), own).keys for budget in (1, 9, 50) for own in (None, most)]
        return [*best, best_lists(guess, 9).keys.sort(-1).values, keys_above(guess, 0.6).keys]

    right = chosen()
    for module in (choosing, highest):
        monkeypatch.setattr(module, "may_look", lambda _: False)
    monkeypatch.setattr(choosing, "MANY", many)
    for one, other in zip(chosen(), right, strict=True):
        assert torch.equal(one, other)
    counts = best_keys(guess, 9, (0, 0), most).keys.sum(-1)
    assert (counts[0] == 3).all() and (counts[1] == 9).all()


class Watched(TorchDispatchMode):
    """Counts operators that compute something, and the bytes of the largest tensor but for those of given shapes."""

    def __init__(self, *results):
        super().__init__()
        self.results, self.called, self.largest = results, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.called += func.namespace == "aten" and not func.is_view
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes() not in self.results:
                self.largest = max(self.largest, one.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("items, tokens, most_called", [(8, 3136, 300), (64, 196, 30)])
def test_few_operators_and_little_memory_on_a_gpu(items, tokens, most_called, per_item):
    """Each operator is started at a cost; and of scores of all pairs, there would be 1.9 GB of the larger image."""
    heads, rank, budget = 6, 50, tokens // 10
    with FakeTensorMode(), torch.device("cuda"):
        query, pooled = torch.empty(items, heads, tokens, 16), torch.empty(items, heads, 16, rank)
        basis = torch.empty(*[items] * per_item, rank, tokens)
        kept, most = torch.empty(items, tokens, dtype=torch.bool), torch.empty(items, dtype=torch.int64)
        guess = Guess(query, pooled, basis, kept, 1.0, 8, None)
        pairs = items * heads * tokens**2
        for choose in (
            lambda: best_keys(guess, budget),
            lambda: best_keys(guess, budget, (0, 0), most),
            lambda: best_lists(guess, budget),
            lambda: keys_above(guess, 0.1),
        ):
            with Watched(pairs, 4 * items * heads * tokens * budget) as watched:
                choose()
            assert 10 < watched.called < most_called
            assert watched.largest <= 4 * choosing.MANY


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("budget", [1, 6, 75, 299])
def test_rows_of_any_kind(share, budget):
    """Many equal scores, zeros, -inf and NaN: as many as asked for, and none that topk would not take."""
    best = highest.Highest(budget)
    for piece in range(4):
        scores, size, there = (
            random_tensor(60, 300, seed=9 * piece + at, dtype=torch.float32).abs() for at in range(3)
        )
        scores = scores * size[:, :1] * (there < 2 * share)
        if piece == 1:
            scores = (5 * scores).round()
        if piece == 2:
            scores[:, ::3] = -torch.inf
        scores[4], scores[5], scores[6] = 0.0, -torch.inf, torch.nan
        found = best(scores).bool()
        assert (found.sum(-1) == budget).all()
        lowest, highest_left = (
            scores.masked_fill(~found, torch.inf).amin(-1),
            scores.masked_fill(found, -torch.inf).amax(-1),
        )
        finite = torch.arange(60) != 6
        assert (lowest >= highest_left)[finite].all()


def test_no_matrix_of_all_scores_is_held(monkeypatch):
    """Of the choice remains a bit more than the mask, or the list where that is smaller; float32 scores take four times
    the mask per head, and topk's numbers of keys eight times the list's length."""
    monkeypatch.setattr(choosing, "SCORES", 1 << 19)
    tokens, heads = 784, 12
    grid, x = Grid(28, 28), random_tensor(1, tokens, 96, seed=0, dtype=torch.float32)
    pairs = heads * tokens**2
    for keep, own in ((0.25, pairs), (0.05, 4 * heads * tokens * 40)):
        group = HeadMix(96, [MaskPredictor(heads, tokens, keep)]).groups[0]
        q, k, v = (random_tensor(1, heads, tokens, 8, seed=at, dtype=torch.float32) for at in range(3))

        def plan(group=group, q=q, k=k, v=v):
            return group.plan(HeadInputs(x, q, k, v, grid))

        # Three pieces of float32 scores at one time, at most.
        assert peak_memory(plan) < own + 3 * 4 * choosing.SCORES + 4 * 2**20


def test_the_smaller_of_mask_and_lists():
    grid, x = Grid(8, 8, prefix=1), random_tensor(1, 65, 8, seed=0, dtype=torch.float32)
    for keep, kind in ((0.23, TokenSets), (0.25, TokenMask)):
        mix = HeadMix(8, [MaskPredictor(2, 64, keep)])
        with recording() as choices:
            mix(x, grid)
        assert isinstance(choices[0].call.layout, kind)


@pytest.mark.parametrize("keep", [0.05, 0.3])
def test_autocast_does_not_change_the_choice(keep):
    group = HeadMix(16, [MaskPredictor(2, 64, keep)]).groups[0]
    inputs = HeadInputs(torch.zeros(1, 64, 16), *random_tensor(3, 1, 2, 64, 8, seed=0, dtype=torch.float32), Grid(8, 8))
    plain = group.plan(inputs).layout.to_mask()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(group.plan(inputs).layout.to_mask(), plain)


@pytest.mark.parametrize("fields", FORMS[:4], ids=str)
def test_the_operators_are_registered_rightly(fields):
    guess = random_guess(6, 5, **fields)
    torch.library.opcheck(choosing._choose_operator, (*guess, None, 2, torch.tensor([1, 2]), 1, 2))
    torch.library.opcheck(choosing._choose_operator, (*guess, 0.5, 0, None, 0, 0))
    torch.library.opcheck(choosing._list_operator, (*guess, 2, 1))


PREDICTORS = [
    MaskPredictor(2, 36, 0.1, prefix=1),
    ThresholdMaskPredictor(2, 36, score=0.05),
    CompetingMaskPredictor(2, 36, 0.3, prefix=1),
]


@pytest.mark.parametrize("options", PREDICTORS, ids=str)
def test_compiled_and_exported(options):
    group = HeadMix(16, [options]).groups[0].eval()

    class Choice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.group = group

        def forward(self, q):
            layout = group.plan(HeadInputs(q.transpose(1, 2).flatten(2), q, q, q, Grid(6, 6, prefix=1))).layout
            return layout.mask if isinstance(layout, TokenMask) else layout.index.sort(-1).values.int()

    torch._dynamo.reset()
    choice = Choice()
    q, more = (random_tensor(size, 2, 37, 8, seed=size, dtype=torch.float32) for size in (2, 3))
    compiled = torch.compile(choice, fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(choice, (q,), dynamic_shapes={"q": {0: torch.export.Dim("batch", min=2)}})
    assert not any("choose" in str(node.target) or "list_keys" in str(node.target) for node in exported.graph.nodes)
    for one in (q, more):
        assert torch.equal(compiled(one), choice(one)) and torch.equal(exported.module()(one), choice(one))
