"""Mistakes in options: to a dict and back."""

from __future__ import annotations

from attnkit import Conv, Dense, RandomWindow, Window
from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "fields_dropped",
        "Fields that are 0 or False are not written, whatever their default.",
        "attnkit.options:Options.to_dict",
        "if full or value != _default(field):",
        "if full or value:",
        (Conv(2, pointwise=False), RandomWindow(2, 4, resample=0)),
        ("options_round_trip",),
    ),
    Mutant(
        "unknown_ignored",
        "Names that are no option are ignored.",
        "attnkit.options:_read",
        "errors += [where + text for text in names]",
        "names = []",
        (Window(2, 4, partition="shifted"), Dense(2)),
        ("options_round_trip",),
    ),
    Mutant(
        "right_name_not_told",
        "The error for a misspelt option does not name the right one.",
        "attnkit.arguments:name_mistakes",
        "{did_you_mean(name, options)}",
        "",
        (Dense(2), Conv(2)),
        ("options_round_trip",),
    ),
    Mutant(
        "tuples_in_a_dict",
        "A dict holds tuples, which JSON does not have.",
        "attnkit.options:_plain",
        "isinstance(value, (list, tuple))",
        "isinstance(value, list)",
        (Window(2, (2, 3)),),
        ("options_round_trip",),
    ),
    Mutant(
        "lists_stay_lists",
        "Lists in a dict stay lists, so that options read from it are not equal to what was written.",
        "attnkit.options:Options.__post_init__",
        "isinstance(value, list)",
        "isinstance(value, set)",
        (Window(2, (2, 3)),),
        ("options_round_trip",),
    ),
]
