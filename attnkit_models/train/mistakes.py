"""Mistakes are collected where they are independent of each other, and told together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnkit.errors import AttnkitError, ConfigError


class SeveralErrors(ConfigError):
    """More than one mistake.

    Attributes:
        mistakes: a sentence for each.
    """

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("; ".join(mistakes))
        self.mistakes = tuple(mistakes)


class Mistakes:
    """Collects errors, to raise them as one."""

    def __init__(self) -> None:
        self.found: list[AttnkitError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keeps what attnkit raises inside instead of letting it pass."""
        try:
            yield
        except AttnkitError as error:
            self.found.append(error)

    def told(self) -> None:
        """Raises what was found: one error as it was, several as one.

        Raises:
            AttnkitError: if anything was found.
        """
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            each = [getattr(error, "mistakes", (str(error),)) for error in self.found]
            raise SeveralErrors([mistake for mistakes in each for mistake in mistakes])
