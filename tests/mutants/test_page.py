"""The table of mutants in the documentation is that of the mutants in the code."""

from __future__ import annotations

import re

from attnkit.testing import LAWS
from tests.mutants.everything import AREAS, MUTANTS
from tests.mutants.table import PAGE, ROW, page, written

STALE = "make mutants ARGS=NAME writes the row of a mutant anew"


def test_it_lists_the_mutants_as_they_are():
    text = PAGE.read_text(encoding="utf-8")
    rows = [row[:-1] for row in re.findall(ROW, text, re.MULTILINE)]
    assert rows == [(one.name, one.mistake, one.where.removeprefix("attnkit.")) for one in MUTANTS], STALE
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(AREAS), STALE
    assert text == page(written()), STALE


def test_every_mutant_is_caught_by_the_laws_that_it_names():
    caught = written()
    for mutant in MUTANTS:
        assert {LAWS[law].number for law in mutant.caught_by} <= set(caught[mutant.name]), mutant.name


def test_every_law_catches_one():
    assert {law for laws in written().values() for law in laws} == {law.number for law in LAWS.values()}
