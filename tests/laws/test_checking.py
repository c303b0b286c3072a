"""check_primitive itself: what it says when a law is broken, and what it takes and refuses."""

from __future__ import annotations

import dataclasses
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given

import attnkit
from attnkit import Dense, Grid, Window
from attnkit.errors import AttnkitError, BackendError, ConfigError, ShapeError
from attnkit.kernels import AttendResult, Backend, dispatch
from attnkit.kernels.dispatch import backend_named
from attnkit.layouts import Blocks, TokenMask
from attnkit.layouts import Dense as DenseLayout
from attnkit.primitives import Columns, HeadGroup, HeadOutput, Plan, PrimitiveOptions, SoftmaxHeads, SoftmaxOptions
from attnkit.registry import BACKENDS
from attnkit.testing import (
    LAWS,
    AttentionCase,
    Breach,
    LawBroken,
    PrimitiveCase,
    check_backend,
    check_case,
    check_primitive,
)
from attnkit.testing.strategies import BACKENDS_ASKED, plans


@dataclass(frozen=True)
class Wrong(SoftmaxOptions):
    """A primitive whose heads are given in `heads_class`."""

    kind: ClassVar[str] = "wrong"
    heads_class: ClassVar[type[SoftmaxHeads]]

    def build(self, context):
        return self.heads_class(self, context)


def wrong(run):
    """Options of a primitive with one method replaced: `plan` or `forward`."""
    heads = type("WrongHeads", (SoftmaxHeads,), {"plan": lambda self, inputs: Plan(DenseLayout(inputs.grid.tokens))})
    setattr(heads, run.__name__, run)
    cls = dataclass(frozen=True)(type("Wrong", (Wrong,), {"heads_class": heads, "__doc__": Wrong.__doc__}))
    return cls(heads=2)


def test_there_are_fourteen_laws():
    assert [law.number for law in LAWS.values()] == list(range(1, 15))
    assert [law.name for law in LAWS.values()] == list(LAWS)
    for law in LAWS.values():
        assert law.sentence.endswith(".") and (law.primitive or law.attention)


def test_the_page_about_the_laws_lists_them():
    page = (Path(__file__).parents[2] / "docs" / "laws.md").read_text()
    for law in LAWS.values():
        assert f"| {law.number} | `{law.name}` | {law.sentence} |" in page


def test_a_right_primitive_passes_and_prints_what_was_tried():
    checked = check_primitive(Window(2, 3), max_examples=5, laws=["equals_dense", 3])
    assert checked.tried == {"equals_dense": 5, "no_leak": 5}
    assert str(checked).splitlines() == [
        "Window(heads=2, window=3) keeps 2 laws",
        "  1  equals_dense            5 cases",
        "  3  no_leak                 5 cases",
    ]


def test_cases_of_primitives_also_ask_for_kernels_made_for_large_maps():
    """On small maps the automatic choice rarely takes them."""
    options, ran = attnkit.LearnedQuery(heads=2, kernel=3), {}
    for backend in BACKENDS_ASKED:
        with dispatch.recording() as choices:
            case = PrimitiveCase(options, Grid(4, 5), head_dim=8, dtype="float32", backend=backend)
            assert check_case("equals_dense", case) is None
        ran[backend] = {choice.backend for choice in choices}
    assert "chunked" not in ran[None] and ran["chunked,auto"] == {"chunked"}
    assert "backend='chunked,auto'" in repr(case)


def test_what_a_law_says_nothing_about_is_not_counted_as_tried():
    def plan(self, inputs):
        return Plan(Blocks.windows(inputs.grid, 2))

    options = wrong(plan)
    checked = check_primitive(options, laws=["full_budget", "translation"], max_examples=20)
    assert checked.tried["translation"] == 0 and checked.silent["translation"] == {"promises no period": 20}
    few, rest = checked.tried["full_budget"], checked.silent["full_budget"]
    assert 0 < few < 20 and rest == {"promises no full_budget": 20 - few}
    assert str(checked).splitlines() == [
        "Wrong(heads=2) keeps 1 law",
        f"  4  full_budget         {few:5} cases, nothing to say in {20 - few}: promises no full_budget",
        "  7  translation             - says nothing here: promises no period",
    ]
    assert check_case("translation", PrimitiveCase(options, Grid(2, 2))) == "promises no period"
    assert check_case("empty_rows", PrimitiveCase(options, Grid(2, 2))) is None
    convolution = check_primitive(attnkit.Conv(2), laws=[2, 3, 4, 6, 9, 13], max_examples=2)
    assert all(silent == {"makes no attention call": 2} for silent in convolution.silent.values())


@given(plan=plans("topk_region"))
def test_plans(plan):
    case, calls = plan
    assert len(calls) == 1 and calls[0].layout.kind == "blocks"
    assert calls[0].q.shape[:3] == (case.batch, case.options.heads, case.grid.tokens)


def test_names_dicts_and_options():
    for one in ("window", {"kind": "window", "heads": 1, "window": 2}, Window(1, 2)):
        assert check_primitive(one, laws=["counting"], max_examples=2).tried == {"counting": 2}


def test_the_message_names_the_law_and_its_line_shows_it_again():
    def forward(self, inputs):
        q, k, v = inputs.qkv
        out = attnkit.attend(q, k, v, DenseLayout(inputs.grid.tokens), scale=1.0)
        return HeadOutput(out, inputs.grid)

    with pytest.raises(LawBroken) as caught:
        check_primitive(wrong(forward), laws=["full_budget"])
    message, error = str(caught.value), caught.value
    assert message.startswith("Wrong(heads=2) breaks law 4, full_budget: With the full budget a primitive equals")
    assert "the output of the full budget is" in message and "instead of" in message
    assert error.law == "full_budget" and not error.crashed
    # The smallest case that can show it: two tokens, and a head width other than 1.
    assert isinstance(error.case, PrimitiveCase)
    assert error.case.grid.tokens == 2 and error.case.batch == 1 and error.case.head_dim == 2
    line = message.partition("try again: ")[2]
    names = {"attnkit": attnkit, "PrimitiveCase": PrimitiveCase, "Grid": Grid, "Wrong": type(error.case.options)}
    with pytest.raises(Breach, match="the output of the full budget"):
        eval(line, names)
    again = pickle.loads(pickle.dumps(LawBroken("text", "no_leak", None)))
    assert (str(again), again.law, again.case, again.crashed) == ("text", "no_leak", None, False)
    assert isinstance(error, AttnkitError) and isinstance(error, AssertionError)


def leaks_through_the_batch(self, inputs):
    out = SoftmaxHeads.forward(self, inputs).out
    return HeadOutput(out + out.mean(0, keepdim=True), inputs.grid)


def asks_chance(self, inputs):
    out = SoftmaxHeads.forward(self, inputs).out
    return HeadOutput(out * torch.rand(()), inputs.grid)


def draws_from_the_global_state(self, inputs):
    torch.rand(1)
    return SoftmaxHeads.forward(self, inputs)


def sees_masked_tokens(self, inputs):
    return SoftmaxHeads.forward(self, dataclasses.replace(inputs, token_mask=None))


def reads_the_values(self, inputs):
    size = 1 + int(inputs.v.sum() > 0)
    return Plan(Blocks.windows(inputs.grid, size))


def adds_something_of_its_own(self, inputs):
    out = SoftmaxHeads.forward(self, inputs).out
    return HeadOutput(out + inputs.v.mean(2, keepdim=True), inputs.grid)


def drops_the_gradient(self, inputs):
    out = SoftmaxHeads.forward(self, inputs)
    return HeadOutput(out.out.detach() + 0 * inputs.v, inputs.grid)


def flips_heads_below_float64(self, inputs):
    out = SoftmaxHeads.forward(self, inputs).out
    return HeadOutput(out if out.dtype == torch.float64 else out.flip(1), inputs.grid)


def forgets_prefix_tokens_as_keys(self, inputs):
    prefix, tokens = inputs.grid.prefix, inputs.grid.tokens
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    mask[prefix:, :prefix] = False
    return Plan(TokenMask(mask))


def forgets_prefix_tokens_as_queries(self, inputs):
    mask = torch.ones(inputs.grid.tokens, inputs.grid.tokens, dtype=torch.bool)
    mask[: inputs.grid.prefix, inputs.grid.prefix :] = False
    return Plan(TokenMask(mask))


def forgets_which_grid_it_was(self, inputs):
    """Rows of the image, kept for the next grid with as many tokens."""
    grid = inputs.grid
    kept = self.__dict__.setdefault("kept", {})
    if grid.tokens not in kept:
        row = grid.coords()[:, 0]
        mask = row[:, None] == row
        kept[grid.tokens] = torch.nn.functional.pad(mask, (grid.prefix, 0, grid.prefix, 0), value=True)
    return Plan(TokenMask(kept[grid.tokens]))


def forgets_what_it_chose_from(self, inputs):
    """A choice by the queries, made once for every grid."""
    kept = self.__dict__.setdefault("kept", {})
    size = 1 + int(inputs.q[:1].sum() > 0)
    return Plan(Blocks.windows(inputs.grid, kept.setdefault(inputs.grid, size)))


@pytest.mark.parametrize(
    ("method", "where", "laws"),
    [
        (flips_heads_below_float64, "forward", {"equals_dense"}),
        (leaks_through_the_batch, "forward", {"independence"}),
        (asks_chance, "forward", {"seeds_only"}),
        (draws_from_the_global_state, "forward", {"seeds_only"}),
        (sees_masked_tokens, "forward", {"empty_rows"}),
        (reads_the_values, "plan", {"no_leak"}),
        (adds_something_of_its_own, "forward", {"no_leak", "full_budget"}),
        (drops_the_gradient, "forward", {"full_budget"}),
        (forgets_prefix_tokens_as_keys, "plan", {"no_leak"}),
        (forgets_prefix_tokens_as_queries, "plan", {"no_leak"}),
        (forgets_which_grid_it_was, "plan", {"seeds_only"}),
        (forgets_what_it_chose_from, "plan", {"seeds_only"}),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_a_wrong_primitive_of_ones_own_cannot_pass(method, where, laws):
    def run(self, inputs):
        return method(self, inputs)

    run.__name__ = where
    options = wrong(run)
    for law in laws:
        with pytest.raises(LawBroken) as caught:
            check_primitive(options, laws=[law], max_examples=40)
        assert not caught.value.crashed
    with pytest.raises(LawBroken):
        check_primitive(options, max_examples=40)


def computes_attention_of_its_own(self, inputs):
    """Softmax over the queries, keys and values exchanged; and nothing that `attend` would see."""
    q, k, v = inputs.qkv
    kept = torch.ones(*q.shape[:1], 1, q.shape[2], 1, dtype=torch.bool)
    if inputs.token_mask is not None:
        kept = inputs.token_mask[:, None, :, None]
    logits = (q.where(kept, 0.0) @ v.where(kept, 0.0).mT * 5).masked_fill(~kept, -torch.inf)
    return HeadOutput(logits.softmax(-2).nan_to_num() @ k.where(kept, 0.0), inputs.grid)


def test_softmax_without_an_attention_call_needs_a_formula():
    def forward(self, inputs):
        return computes_attention_of_its_own(self, inputs)

    options = wrong(forward)
    told = r"WrongHeads is a softmax primitive, but .* call attnkit.attend, or give its formula as written_out\(\)"
    with pytest.raises(LawBroken, match=told) as caught:
        check_primitive(options, laws=["no_leak"], max_examples=10)
    assert not caught.value.crashed

    # A pattern alone tells nothing about the output.
    options.heads_class.definition = lambda self, inputs: torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(LawBroken, match="makes no attention call"):
        check_primitive(options, laws=["no_leak"], max_examples=10)

    def written_out(self, inputs, attention):
        q, k, v = inputs.qkv
        return attention(q, k, v, scale=self.scale, sees=torch.ones((), dtype=torch.bool))

    options.heads_class.written_out = written_out
    check_primitive(options, laws=["no_leak"], max_examples=10)
    with pytest.raises(LawBroken, match="by its formula, the output is"):
        check_primitive(options, laws=["equals_dense"], max_examples=10)


def test_a_forward_of_ones_own_needs_a_formula_to_be_held_to_dense_attention():
    def forward(self, inputs):
        return dataclasses.replace(SoftmaxHeads.forward(self, inputs), out=-SoftmaxHeads.forward(self, inputs).out)

    def plan(self, inputs):
        return Plan(DenseLayout(inputs.grid.tokens))

    law = "equals_dense"
    own, plain = wrong(forward), wrong(plan)
    checked = check_primitive(own, laws=[law], max_examples=20)
    assert checked.tried[law] == 0
    why = "its attention calls are right, but forward() is its own and gives no written_out()"
    assert checked.silent[law] == {why: 20} and f"says nothing here: {why}" in str(checked)
    assert check_primitive(plain, laws=[law], max_examples=20).tried[law] == 20

    def written_out(self, inputs, attention):
        return attention(*inputs.qkv, scale=self.scale, sees=torch.ones((), dtype=torch.bool))

    own.heads_class.written_out = written_out
    with pytest.raises(LawBroken, match="by its formula, the output is"):
        check_primitive(own, laws=[law], max_examples=20)


def test_heads_without_attention_and_formula_are_not_held_to_dense_attention():
    class Doubled(HeadGroup):
        def forward(self, inputs):
            return HeadOutput(2 * inputs.v, inputs.grid)

    @dataclass(frozen=True)
    class Double(PrimitiveOptions):
        kind: ClassVar[str] = "double"

        def columns(self, context):
            return Columns(v=self.heads * context.head_dim)

        def build(self, context):
            return Doubled()

    checked = check_primitive(Double(heads=2), laws=["equals_dense"], max_examples=10)
    assert checked.silent["equals_dense"] == {"makes no attention call and gives no written_out()": 10}
    assert checked.tried["equals_dense"] == 0


def test_crashes_are_told_from_wrong_results():
    def plan(self, inputs):
        raise KeyError("nothing here")

    with pytest.raises(LawBroken, match="KeyError: 'nothing here'") as caught:
        check_primitive(wrong(plan), laws=["equals_dense"])
    assert caught.value.crashed


def test_a_primitive_that_refuses_everything_has_not_passed():
    def plan(self, inputs):
        raise ShapeError("not on this grid")

    with pytest.raises(LawBroken, match=r"could not be tried on .* cases were refused, such as .*: not on this grid"):
        check_primitive(wrong(plan), laws=["equals_dense"])


def test_one_that_refuses_some_grids_passes_on_the_others():
    def plan(self, inputs):
        if inputs.grid.height % 2:
            raise ShapeError("only even heights")
        return Plan(DenseLayout(inputs.grid.tokens))

    checked = check_primitive(wrong(plan), laws=["equals_dense"], max_examples=30)
    assert checked.refused["equals_dense"] > 0 and "refused" in str(checked)


def test_a_plan_of_the_wrong_size_is_no_refusal():
    def plan(self, inputs):
        return Plan(DenseLayout(inputs.grid.image_tokens))

    with pytest.raises(LawBroken, match=r"seen: +PrimitiveError: .* plan\(\) returned a dense layout for") as caught:
        check_primitive(wrong(plan), laws=["no_leak"], max_examples=20)
    assert caught.value.case.grid.prefix and caught.value.crashed


@pytest.mark.parametrize(("refused", "told"), [(True, "with"), (False, "without")])
def test_grids_with_or_without_prefix_tokens_cannot_all_be_refused(refused, told):
    def plan(self, inputs):
        if bool(inputs.grid.prefix) == refused:
            raise ShapeError("not on this grid")
        return Plan(DenseLayout(inputs.grid.tokens))

    with pytest.raises(LawBroken, match=rf"{told} prefix tokens: all \d+ cases were refused"):
        check_primitive(wrong(plan), laws=["no_leak"], max_examples=40)


def test_the_random_state_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    check_primitive("random_window", max_examples=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": "windw"}, "unknown primitive 'windw'; did you mean 'window'"),
        ({"options": 3}, "needs a primitive's options or its name, but got 3"),
        ({"options": Dense}, "needs a primitive's options or its name"),
        ({"options": {"heads": 2}}, "needs the primitive's 'kind'"),
        ({"options": Dense(1), "laws": ["no_leek"]}, "unknown law 'no_leek'; did you mean 'no_leak'"),
        ({"options": Dense(1), "laws": [15]}, "unknown law 15"),
        ({"options": Dense(1), "max_examples": 0}, "max_examples is a number of cases, an integer >= 1, but got 0"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        check_primitive(**arguments)


def test_backends():
    assert check_backend("gather", kinds=["blocks"], laws=["equals_dense"], max_examples=3).tried["equals_dense"] == 3
    with pytest.raises(BackendError, match="did you mean 'gather'"):
        check_backend("gahter")
    with pytest.raises(Breach), pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnkit.kernels.gather.plain_attention", lambda *_: (torch.zeros(1, 1, 4, 1, 1), None))
        check_case("equals_dense", AttentionCase("token_sets", Grid(2, 2), "gather", seed=4))


class Plain(Backend):
    """Attention without bias, gain and lse, as a small kernel may have it."""

    def why_not(self, call):
        refused = {"bias": call.bias is not None, "gain": call.gain is not None, "lse": call.return_lse}
        return tuple(f"it takes no {name}" for name, asked in refused.items() if asked)

    def cost(self, call):
        return 1e18

    def run(self, call):
        result = backend_named("reference").run(call)
        return AttendResult(result.out, None)


@pytest.fixture
def own_backend(monkeypatch):
    """Makes `Plain`, with some methods replaced, known as the backend `"own"`."""

    def known(**methods):
        monkeypatch.setitem(dispatch._backends, "own", type("Own", (Plain,), {"name": "own", **methods})())
        monkeypatch.setitem(BACKENDS, "own", f"{__name__}:Plain")

    return known


def test_a_backend_that_takes_no_bias_can_keep_every_law(own_backend):
    own_backend()
    checked = check_backend("own", max_examples=5)
    assert set(checked.tried) == {name for name, law in LAWS.items() if law.attention is not None}
    # Still held to what does not need a bias.
    own_backend(run=lambda self, call: AttendResult(Plain.run(self, call).out + 3.0, None))
    with pytest.raises(LawBroken, match="an output lies outside the values that its query sees"):
        check_backend("own", laws=["convex_hull"], max_examples=20)


def test_a_backend_that_returns_no_lse_is_told_in_a_sentence(own_backend):
    own_backend(why_not=lambda self, call: ())
    q = torch.ones(1, 1, 2, 3)
    with pytest.raises(
        BackendError, match=r"^backend 'own' accepted a call with return_lse=True and returned no lse; "
    ):
        attnkit.attend(q, q, q, DenseLayout(2), backend="own", return_lse=True)
    own_backend(run=lambda self, call: call.v)
    with pytest.raises(BackendError, match=r"run must return an AttendResult, but it returned torch.float32 \(1, 1, "):
        attnkit.attend(q, q, q, DenseLayout(2), backend="own")


@pytest.mark.parametrize("returned", [None, "no bias", False, [], (3,)], ids=repr)
def test_the_contract_of_why_not(own_backend, returned):
    own_backend(why_not=lambda self, call: returned)
    q = torch.ones(1, 1, 2, 3)
    message = f"backend 'own': why_not must return a tuple of strings, .* but it returned {re.escape(repr(returned))}$"
    for asks in (
        lambda: attnkit.attend(q, q, q, DenseLayout(2), backend="own"),
        lambda: attnkit.attend(q, q, q, DenseLayout(2)),
        lambda: check_backend("own", laws=["equals_dense"], max_examples=2),
    ):
        with pytest.raises(BackendError, match=message):
            asks()


def test_kinds_of_layouts():
    for kinds in ("blocks", ["blocks"], iter(["blocks"])):
        assert check_backend("gather", kinds=kinds, laws="counting", max_examples=2).tried == {"counting": 2}
    for kinds, message in (
        ([], "check_backend needs at least one kind of layout, or None for all: dense, "),
        ("blcks", "unknown kind of layout 'blcks'; did you mean 'blocks'?"),
        (["blocks", 3], "unknown kind of layout 3 (kinds: "),
        (5, "kinds is a list of kinds of layouts, such as ['blocks'], but got 5"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_backend("sdpa", kinds=kinds)
