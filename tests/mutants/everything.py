"""All mutants, by area."""

from __future__ import annotations

from tests.mutants.planted import (
    algebra,
    chosen,
    combined,
    gather,
    kernels,
    layouts,
    learned,
    mixes,
    options,
    orders,
    randomness,
    relative,
    softmax_heads,
    stencils,
)

AREAS = {
    "Grid and orders": orders.MUTANTS,
    "Layouts": layouts.MUTANTS,
    "Algebra, lowering and counting": algebra.MUTANTS,
    "Relative tables": relative.MUTANTS,
    "Softmax and backends": kernels.MUTANTS,
    "The gather backend": gather.MUTANTS,
    "Stencils": stencils.MUTANTS,
    "Primitives with fixed patterns": softmax_heads.MUTANTS,
    "Primitives that choose": chosen.MUTANTS,
    "Primitives that combine tokens": combined.MUTANTS,
    "Learned queries and convolutions": learned.MUTANTS,
    "Randomness": randomness.MUTANTS,
    "Mixes": mixes.MUTANTS,
    "Options": options.MUTANTS,
}
MUTANTS = [mutant for area in AREAS.values() for mutant in area]
