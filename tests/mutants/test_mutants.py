"""The laws bite: every mistake planted into attnkit is caught by a wrong result."""

from __future__ import annotations

import dataclasses
import traceback

import pytest

import attnkit.kernels.softmax
from attnkit import Conv, Dense
from attnkit.analysis import sight
from attnkit.layouts import Dense as DenseLayout
from attnkit.layouts.blocks import Blocks
from attnkit.testing import LAWS
from tests.mutants.everything import MUTANTS
from tests.mutants.mutant import Backend, Mutant, NoLongerApplies, planted
from tests.mutants.trial import NOTHING, SEEDS, WRONG, seen, verdict

# Every check that some mutant fails.
CHECKS = list(dict.fromkeys((subject, law) for mutant in MUTANTS for subject in mutant.on for law in mutant.caught_by))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_is_caught(mutant):
    for law in mutant.caught_by:
        assert verdict(mutant, law) == WRONG


@pytest.mark.parametrize(("subject", "law"), CHECKS, ids=str)
def test_without_a_mutant_nothing_is_caught(subject, law):
    assert seen(subject, law, 4, SEEDS[0]) == NOTHING


def test_all_can_be_planted_in_the_code_as_it_is():
    """Told in a moment, where `test_it_is_caught` takes minutes."""
    gone = []
    for mutant in MUTANTS:
        try:
            with planted(mutant):
                pass
        except NoLongerApplies as error:
            gone.append(str(error))
    assert not gone


def test_mutants_are_written_in_full():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 150
    assert len({(mutant.where, mutant.text, mutant.instead) for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.mistake[0].isupper() and mutant.mistake.endswith(".") and "|" not in mutant.mistake
        assert mutant.on and mutant.caught_by and set(mutant.caught_by) <= set(LAWS)


def test_every_primitive_has_one():
    from attnkit.registry import PRIMITIVES

    own = {mutant.where.partition(":")[0].rpartition(".")[2] for mutant in MUTANTS}
    assert set(PRIMITIVES) <= own


def test_every_law_is_named_by_one():
    assert {law for mutant in MUTANTS for law in mutant.caught_by} == set(LAWS)


def example(**changes):
    plain = {
        "name": "example",
        "mistake": "Nothing is wrong.",
        "where": "attnkit.kernels.softmax:masked_softmax",
        "text": "raised = shifted.exp()",
        "instead": "raised = torch.exp(shifted)",
        "on": (Dense(2), Backend("reference", ("dense",))),
        "caught_by": ("equals_dense",),
        "examples": 3,
    }
    return Mutant(**{**plain, **changes})


def test_a_change_that_is_no_mistake_is_not_caught():
    assert verdict(example(), "equals_dense") == NOTHING
    assert verdict(example(), "translation") == NOTHING


def test_a_crash_or_a_refusal_is_not_a_wrong_result():
    assert verdict(example(instead="raised = shifted.expp()"), "equals_dense") == "crash"
    refusing = {
        "where": "attnkit.layouts.dense:Dense.__post_init__",
        "text": "not is_count(self.q",
        "instead": "is_count(self.q",
    }
    assert verdict(example(**refusing), "equals_dense") == "crash"


def test_it_is_planted_wherever_it_is_bound_and_taken_out_again():
    module, old = attnkit.kernels.softmax, attnkit.kernels.softmax.masked_softmax
    with planted(example()):
        assert module.masked_softmax is not old
        assert sight.masked_softmax is module.masked_softmax
        assert module.masked_softmax.__module__ == old.__module__
        assert module.masked_softmax.__globals__ is old.__globals__
    assert module.masked_softmax is sight.masked_softmax is old
    with pytest.raises(ZeroDivisionError), planted(example(instead="raised = 1 / 0")):
        module.masked_softmax(attnkit.testing.random_tensor(2, 2, seed=0), None)
    assert module.masked_softmax is old


def test_methods_properties_and_super():
    seventy = example(where="attnkit.layouts.dense:Dense.num_queries", text="self.queries", instead="70")
    with planted(seventy):
        assert DenseLayout(3).num_queries == 70
    assert DenseLayout(3).num_queries == 3
    lenient = example(where="attnkit.primitives.conv:Conv.problems", text=" + odd(kernel=self.kernel)", instead="")
    with planted(lenient):
        assert Conv(2, kernel=4).kernel == 4
        with pytest.raises(attnkit.errors.ConfigError, match="stride=0"):
            Conv(2, kernel=4, stride=0)
    with pytest.raises(attnkit.errors.ConfigError):
        Conv(2, kernel=4)
    wide = example(where="attnkit.layouts.blocks:Blocks.windows", text='grid, window, "window"', instead='grid, 9, "w"')
    with planted(wide):
        assert Blocks.windows(attnkit.Grid(4, 4), 2).num_blocks == 1
    assert Blocks.windows(attnkit.Grid(4, 4), 2).num_blocks == 4


@pytest.mark.parametrize("change", [{"text": "gone"}, {"text": "logits"}, {"where": "attnkit.kernels.softmax:gone"}])
def test_a_mutant_whose_source_has_changed_says_so(change):
    with pytest.raises(NoLongerApplies, match="example"), planted(dataclasses.replace(example(), **change)):
        pass


def test_traces_show_the_mistake():
    with planted(example(instead="raised = shifted.expp()")), pytest.raises(AttributeError) as caught:
        attnkit.attend(*attnkit.testing.random_qkv((2, 2)), DenseLayout(2), backend="reference")
    text = "".join(traceback.format_exception(caught.value))
    assert "<mutant example>" in text and "raised = shifted.expp()" in text
