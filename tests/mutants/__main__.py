"""Tries the laws on mutants, prints what each sees, and writes the rows of the table in the documentation."""

from __future__ import annotations

import argparse
import sys
import time
import warnings

import torch

from attnkit.testing import LAWS
from tests.mutants.everything import MUTANTS
from tests.mutants.table import PAGE, laws_that_catch, page, written
from tests.mutants.trial import CRASH, NOTHING, WRONG, verdict

SIGNS = {WRONG: "x", CRASH: "!", NOTHING: "."}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants to try, whose rows are written anew; all where none is given")
    names = parser.parse_args().names
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no such mutants: {', '.join(sorted(unknown))}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started, seen = time.monotonic(), {}
    width = max(len(mutant.name) for mutant in MUTANTS)
    print("x: a wrong result, !: only crashes or refusals, .: nothing\n")
    print(" " * width, *(f"{law.number:2}" for law in LAWS.values()))
    for mutant in MUTANTS:
        if not names or mutant.name in names:
            seen[mutant.name] = {law: verdict(mutant, law) for law in LAWS}
            print(f"{mutant.name:{width}}", *(f" {SIGNS[one]}" for one in seen[mutant.name].values()), flush=True)
    alive = [name for name, laws in seen.items() if WRONG not in laws.values()]
    print(f"\n{len(seen) - len(alive)} of {len(seen)} caught in {time.monotonic() - started:.0f} s")
    if alive:
        print(f"not caught: {', '.join(alive)}")
    rows = {**written(), **{name: laws_that_catch(laws) for name, laws in seen.items()}}
    missing = [mutant.name for mutant in MUTANTS if mutant.name not in rows]
    if missing:
        print(f"nothing is written, for these were never tried: {', '.join(missing)}")
    else:
        PAGE.write_text(page(rows), encoding="utf-8")
        print(f"wrote {PAGE}")
    return 1 if alive or missing else 0


if __name__ == "__main__":
    sys.exit(main())
