"""The table of mutants in the documentation: which laws catch which mistake, as seen in a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from attnkit.testing import LAWS
from tests.mutants.everything import AREAS, MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.trial import OTHERS_EXAMPLES, OTHERS_SEEDS, SEEDS, WRONG

PAGE = Path(__file__).parents[2] / "docs" / "tables" / "mutants.md"

# A line of the table.
ROW = r"^\| `(\w+)` \| (.+) \| `(.+)` \| (.+) \|$"


def page(caught: Mapping[str, Sequence[int]]) -> str:
    """The whole page, from the numbers of the laws that catch each mutant, by name."""
    total = sum(bool(caught[mutant.name]) for mutant in MUTANTS)
    least, most = (pick(mutant.examples for mutant in MUTANTS) for pick in (min, max))
    lines = [
        "# Planted mistakes",
        "",
        "Do the [laws](../laws.md) notice when something is wrong? A mutant is one small mistake, such as a window one",
        "token too wide, planted into attnkit's own source while the laws are tried on what it concerns. A law catches",
        "it only by a wrong result: a crash or a refusal does not count.",
        "",
        f"**{total} of {len(MUTANTS)} mistakes are caught.** How many of them each law catches:",
        "",
        "| | Law | Mistakes |",
        "|---|---|---|",
        *(
            f"| {law.number} | `{law.name}` | {sum(law.number in caught[mutant.name] for mutant in MUTANTS)} |"
            for law in LAWS.values()
        ),
        "",
        f"Each mutant names a law. That one is tried with seeds {listed(SEEDS)} and as many cases as the mistake needs",
        f"to be met, {least} to {most} a seed, and it ends at the first that catches the mistake. All other laws are",
        f"tried with seed {listed(OTHERS_SEEDS)} and {OTHERS_EXAMPLES} cases: where one is missing below, it may still",
        "catch the mistake with more. Laws are tried only on the primitives and backends where the mistake matters.",
        "",
        "Mistakes that cost no more precision than the laws allow are not among them, for example scores of learned",
        "queries in half precision. [Hard inputs](../numerics.md) and their tests are for those.",
        "",
        "```bash",
        "make mutants                           # tries all laws on all mutants and writes this page",
        f"make mutants ARGS={MUTANTS[0].name}    # one of them, and its row",
        "```",
    ]
    for title, area in AREAS.items():
        lines += ["", f"## {title}", "", "| Mutant | Mistake | Where | Laws that catch it |", "|---|---|---|---|"]
        lines += [row(mutant, caught[mutant.name]) for mutant in area]
    return "\n".join(lines) + "\n"


def row(mutant: Mutant, caught: Sequence[int]) -> str:
    """A mutant's line."""
    where = mutant.where.removeprefix("attnkit.")
    return f"| `{mutant.name}` | {mutant.mistake} | `{where}` | {', '.join(map(str, caught)) or 'none'} |"


def laws_that_catch(verdicts: Mapping[str, str]) -> list[int]:
    """Numbers of the laws that saw a wrong result."""
    return [LAWS[law].number for law, found in verdicts.items() if found == WRONG]


def written() -> dict[str, list[int]]:
    """What the page says of each mutant, by name."""
    rows = re.findall(ROW, PAGE.read_text(encoding="utf-8"), re.MULTILINE) if PAGE.exists() else []
    return {name: [int(one) for one in numbers.split(", ") if one != "none"] for name, _, _, numbers in rows}


def listed(numbers: tuple[int, ...]) -> str:
    """1, 2 and 3."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
