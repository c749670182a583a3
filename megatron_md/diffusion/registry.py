"""Named things that third parties can add to: mask schedules, objectives, sampling strategies."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from megatron_md.errors import UserError

T = TypeVar("T")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word most like `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """A mapping from names to things, filled by decorators when the modules that hold them are imported."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a thing as `name`.

        Raises:
            UserError: the name belongs to another thing already.
        """

        def add(thing: T) -> T:
            known = self._things.get(name)
            if known is not None and _origin(known) != _origin(thing):
                raise UserError(f"{self.kind} {name!r} is registered already, by {_origin(known)}")
            self._things[name] = thing
            return thing

        return add

    def get(self, name: str) -> T:
        """The thing called `name`.

        Raises:
            UserError: there is none; the message suggests the nearest name.
        """
        if name not in self._things:
            known = ", ".join(sorted(self._things))
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self._things)} (known: {known})")
        return self._things[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._things)


def _origin(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"
