"""Named things that third parties can add to: mask schedules, objectives, sampling strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from megatron_md.errors import UserError
from megatron_md.messages import nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to things, filled by decorators when the modules that hold them are imported.

    Attributes:
        kind: what messages call a thing.
        built_in: names of the package's own things, if they are to be known before those are imported.
    """

    def __init__(self, kind: str, built_in: Sequence[str] = ()) -> None:
        self.kind, self.built_in = kind, tuple(built_in)
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

    def check(self, name: str) -> None:
        """Refuse a name that nothing has.

        Raises:
            UserError: the message suggests the nearest name.
        """
        known = self.names()
        if name not in known:
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, known)} (known: {', '.join(known)})")

    def get(self, name: str) -> T:
        """The thing called `name`, whose module has been imported.

        Raises:
            UserError: there is none, as `check`.
        """
        self.check(name)
        return self._things[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self.built_in, *self._things})


def _origin(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"
