"""One mutant before one law: whether it is caught, and how."""

from __future__ import annotations

from attnkit.testing import LAWS, LawBroken, check_backend, check_primitive
from tests.mutants.mutant import Backend, Mutant, planted

WRONG, CRASH, NOTHING = "wrong", "crash", ""
# The cases of one seed may all miss a mistake that needs some luck to be seen.
SEEDS = (0, 1, 2)
# What is tried of a law that is not said to find the mutant.
OTHERS_SEEDS, OTHERS_EXAMPLES = SEEDS[:1], 25


def seen(subject: object, law: str, examples: int, seed: int) -> str:
    """What a law sees of what it is tried on: a wrong result, a crash, or nothing."""
    how = {"laws": [law], "max_examples": examples, "seed": seed, "shrink": False}
    try:
        if isinstance(subject, Backend):
            if LAWS[law].attention is not None:
                check_backend(subject.name, kinds=subject.kinds, **how)  # type: ignore[arg-type]
        elif LAWS[law].primitive is not None:
            check_primitive(subject, **how)  # type: ignore[arg-type]
    except LawBroken as broken:
        # Without a case everything was refused.
        return CRASH if broken.crashed or broken.case is None else WRONG
    except Exception:
        # Not even a case could be made.
        return CRASH
    return NOTHING


def verdict(mutant: Mutant, law: str) -> str:
    """What a law sees of a mutant: a wrong result if there is one on any of its subjects."""
    named = law in mutant.caught_by
    seeds, examples = (SEEDS, mutant.examples) if named else (OTHERS_SEEDS, OTHERS_EXAMPLES)
    found = NOTHING
    with planted(mutant):
        for seed in seeds:
            for subject in mutant.on:
                one = seen(subject, law, examples, seed)
                if one == WRONG:
                    return WRONG
                found = found or one
    return found
