"""Testing: the laws of attention, and what they are made of, for anyone's own primitives, layouts and backends."""

from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.checking import Checked, check_backend, check_case, check_primitive
from attnkit.testing.hard_inputs import HARD_INPUTS, HardInput
from attnkit.testing.laws import LAWS, Breach, Law, LawBroken
from attnkit.testing.layouts import KINDS, random_layout
from attnkit.testing.memory import TensorMemory, peak_memory
from attnkit.testing.options import random_options
from attnkit.testing.oracle import dense_attention, expected
from attnkit.testing.tensors import outputs_and_gradients, random_qkv, random_tensor, randomize_parameters
from attnkit.testing.tolerance import assert_within_budget, error_budget, naive_attention

__all__ = [
    "HARD_INPUTS",
    "KINDS",
    "LAWS",
    "AttentionCase",
    "Breach",
    "Checked",
    "HardInput",
    "Law",
    "LawBroken",
    "PrimitiveCase",
    "TensorMemory",
    "assert_within_budget",
    "check_backend",
    "check_case",
    "check_primitive",
    "dense_attention",
    "error_budget",
    "expected",
    "naive_attention",
    "outputs_and_gradients",
    "peak_memory",
    "random_layout",
    "random_options",
    "random_qkv",
    "random_tensor",
    "randomize_parameters",
]
