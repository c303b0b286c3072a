"""Mutants: small mistakes planted into attnkit's own source while a test runs, for the laws to catch."""

from __future__ import annotations
import __future__

import importlib
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from attnkit.kernels import dispatch
from attnkit.layouts import cache
from attnkit.primitives import PrimitiveOptions


@dataclass(frozen=True)
class Backend:
    """A backend over some kinds of layouts, as `check_backend` takes them."""

    name: str
    kinds: tuple[str, ...]


def gather(*kinds: str) -> Backend:
    return Backend("gather", kinds)


def chunked(*kinds: str) -> Backend:
    return Backend("chunked", kinds)


def sdpa(*kinds: str) -> Backend:
    return Backend("sdpa", kinds)


def reference(*kinds: str) -> Backend:
    return Backend("reference", kinds)


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: its name.
        mistake: what is wrong, in a sentence.
        where: the function it sits in, `"module:function"` or `"module:Class.method"`.
        text: what stands in the function's source, exactly once.
        instead: what stands there by mistake.
        on: what the laws are tried on: names or options of primitives, or backends.
        caught_by: the laws that find wrong results, the one that the tests try first.
        examples: number of cases that the tests try.
    """

    name: str
    mistake: str
    where: str
    text: str
    instead: str
    on: tuple[str | PrimitiveOptions | Backend, ...]
    caught_by: tuple[str, ...]
    examples: int = 30


class NoLongerApplies(Exception):
    """The source that a mutant changes is not there any more: it needs to be written anew."""


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Plants a mutant wherever its function is bound, and takes it out again."""
    module, owner, old = _found(mutant)
    new = _changed(mutant, module, owner, old)
    places = list(_places(old))
    _forget()
    for holder, name in places:
        setattr(holder, name, new)
    try:
        yield
    finally:
        for holder, name in places:
            setattr(holder, name, old)
        _forget()


def source(mutant: Mutant) -> str:
    """The source of the function that a mutant changes."""
    return textwrap.dedent(inspect.getsource(_plain(_found(mutant)[2])))


def _found(mutant: Mutant) -> tuple[Any, Any, Any]:
    """The module, the class or None, and what is bound there under the function's name."""
    name, _, path = mutant.where.partition(":")
    module = importlib.import_module(name)
    *classes, last = path.split(".")
    owner = None
    for one in classes:
        owner = vars(owner or module).get(one)
    found = vars(owner or module).get(last)
    if found is None:
        raise NoLongerApplies(f"{mutant.name}: there is no {mutant.where}")
    return module, owner, found


def _plain(bound: Any) -> Any:
    """The function in a property, a class method or a static method."""
    return bound.fget if isinstance(bound, property) else getattr(bound, "__func__", bound)


def _changed(mutant: Mutant, module: Any, owner: Any, old: Any) -> Any:
    before = source(mutant)
    if before.count(mutant.text) != 1 or mutant.text == mutant.instead:
        raise NoLongerApplies(
            f"{mutant.name}: {mutant.where} should hold {mutant.text!r} once, but holds it {before.count(mutant.text)} "
            f"times"
        )
    name = mutant.where.rpartition(":")[2].rpartition(".")[2]
    # `super()` looks for the class in a variable of this name around the method.
    text = "def plant(__class__):\n" + textwrap.indent(before.replace(mutant.text, mutant.instead), "    ")
    text += f"\n    return {name}\n"
    file = f"<mutant {mutant.name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    code = compile(text, file, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    made: dict[str, Any] = {}
    exec(code, vars(module), made)
    new = made["plant"](owner)
    for attribute in ("__qualname__", "__module__"):
        setattr(_plain(new), attribute, getattr(_plain(old), attribute))
    return new


def _places(old: Any) -> Iterator[tuple[Any, str]]:
    """Modules and classes of attnkit that hold a function, and the names under which they do."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "attnkit":
            continue
        classes = [one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == name]
        for holder in (module, *classes):
            for attribute, value in list(vars(holder).items()):
                if value is old:
                    yield holder, attribute


def _forget() -> None:
    """Lets nothing that was computed before or under a mutant outlive it."""
    cache.forget()
    dispatch.forget()
