"""The pytest plugin: `pytest --attnkit-laws my_primitive` adds one test per law of attention.

Loaded in every pytest run where attnkit is installed, so it imports nothing before it is asked to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attnkit", "the laws of attention")
    group.addoption(
        "--attnkit-laws",
        action="append",
        default=[],
        metavar="PRIMITIVE",
        help="hold a primitive to the laws: a registered name, its options as JSON, or 'all'; may be given repeatedly",
    )
    group.addoption(
        "--attnkit-laws-examples",
        type=_count,
        default=50,
        metavar="N",
        help="cases per law and primitive, >= 1 (default: 50)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a number of cases, an integer >= 1, but got {text!r}")
    return int(text)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in config.getoption("attnkit_laws", default=[]) or []:
        items.extend(_items(session, name))


def _items(session: pytest.Session, asked: str) -> Iterator[pytest.Item]:
    from attnkit.errors import AttnkitError
    from attnkit.registry import list_primitives
    from attnkit.testing import LAWS, check_primitive

    try:
        target: Any = json.loads(asked) if asked.lstrip().startswith("{") else asked
        for one in list_primitives() if target == "all" else [target]:
            # Refused here once, and not by every law.
            check_primitive(one, laws=[], max_examples=1)
            label = one if isinstance(one, str) else one["kind"]
            for law in LAWS.values():
                if law.primitive is not None:
                    yield LawItem.from_parent(
                        session, name=f"attnkit_laws[{label}-{law.name}]", primitive=one, law=law.name
                    )
    except json.JSONDecodeError as error:
        raise pytest.UsageError(f"--attnkit-laws {asked}: begins like options as JSON, but is none: {error}") from None
    except AttnkitError as error:
        raise pytest.UsageError(f"--attnkit-laws {asked}: {error}") from None


class LawItem(pytest.Item):
    """One law tried on one primitive."""

    def __init__(self, *, primitive: Any, law: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.primitive, self.law = primitive, law

    def runtest(self) -> None:
        from attnkit.testing import check_primitive

        examples: Any = self.config.getoption("attnkit_laws_examples")
        check_primitive(self.primitive, laws=[self.law], max_examples=examples)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        from attnkit.testing import LawBroken

        if isinstance(excinfo.value, LawBroken):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        return "attnkit laws", None, self.name
