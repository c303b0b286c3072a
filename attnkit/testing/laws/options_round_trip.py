"""Law 10: options become a dict and come back; a misspelt key names the right one."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

from attnkit.errors import AttnkitError
from attnkit.testing.cases import PrimitiveCase
from attnkit.testing.laws.law import Law, require


def primitive(case: PrimitiveCase) -> None:
    """Plain, full, through JSON, pickled, copied, made of lists; then one letter of every field is left out."""
    options = case.options
    for plain in (options.to_dict(), options.to_dict(full=True), json.loads(json.dumps(options.to_dict()))):
        require(type(options).from_dict(plain) == options, f"from_dict({plain}) is not what to_dict() came from")
    for plain in (options.to_dict(), options.to_dict(full=True)):
        require(json.loads(json.dumps(plain)) == plain, f"to_dict() gives {plain}, which is not made of JSON types")
    lists: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in ((field.name, getattr(options, field.name)) for field in dataclasses.fields(options))
    }
    try:
        alike = type(options)(**lists) == options
    except AttnkitError:
        alike = False
    require(alike, f"{lists} do not make the options that tuples make")
    require(pickle.loads(pickle.dumps(options)) == options, "pickled options are not equal to what they were")
    require(copy.deepcopy(options) == options, "copied options are not equal to what they were")
    require(hash(copy.deepcopy(options)) == hash(options), "equal options have different hashes")
    full = options.to_dict(full=True)
    for field in dataclasses.fields(options):
        if len(field.name) < 3:
            continue
        misspelt = {**full, field.name[:-2] + field.name[-1]: full[field.name]}
        if misspelt.keys() == full.keys():
            continue
        del misspelt[field.name]
        try:
            type(options).from_dict(misspelt)
        except AttnkitError as error:
            named = repr(field.name) in str(error)
            require(named, f"the error for a misspelt {field.name!r} does not name it: {error}")
        else:
            require(False, f"a misspelt {field.name!r} is no error")


LAW = Law(
    10,
    "options_round_trip",
    "Options to dict to options is the identity; a misspelt key is an error that names the right one.",
    primitive,
)
