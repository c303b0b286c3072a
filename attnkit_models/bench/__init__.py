"""Benchmarks: attnkit beside dense attention, the papers' own formulations and other libraries, in one run."""
