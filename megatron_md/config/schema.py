"""What keys are declared with, and what a tree of them says: names, types, bounds, defaults and explanations."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo

Path_ = tuple[str, ...]
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def Doc(text: str) -> Any:
    """Attach the explanation of a key."""
    return Field(description=text)


# Beyond any run, and within what products of a few of them can be computed with.
MOST = 10**15
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# What a list is made for every one of.
Listed = Annotated[int, Field(gt=0, le=10_000)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def keys_of(schema: Any, prefix: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """(path, type) of every key of a tree of dataclasses, sections included, in order of declaration."""
    for name, hint in get_type_hints(schema, include_extras=True).items():
        if name == "__pydantic_config__":
            continue
        yield (*prefix, name), hint
        section = section_of(hint)
        if section is not None:
            yield from keys_of(section, (*prefix, name))


def section_of(hint: Any) -> type | None:
    """The dataclass that a key holds (or may hold, also in a list), if any."""
    if get_origin(hint) in (Annotated, list):
        return section_of(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return next((found for found in map(section_of, get_args(hint)) if found), None)
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def explain(schema: Any, prefix: Path_ = ()) -> str:
    """Every key with its type, default and meaning: a section's own keys first, then the sections in it."""
    own: list[str] = []
    below: list[str] = []
    hints = get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        hint, path = hints[field.name], (*prefix, field.name)
        section, default = section_of(hint), _default(field)
        if section is not None and default != "null":
            below += ["", f"{'.'.join(path)}: {_description(hint)}", explain(section, path)]
            continue
        shown = f" = {default}" if default else " (required)"
        own += [f"  {'.'.join(path)}: {describe_type(hint)}{shown}", f"      {_description(hint)}"]
        if section is not None:
            own.append(explain(section, path))
    return "\n".join([*own, *below])


def describe_type(hint: Any) -> str:
    """A type in a user's words: `whole number > 0 or null`, `none | full`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [text for item in arguments[1:] for text in _bounds(item)]
        return " ".join([describe_type(arguments[0]), *dict.fromkeys(bounds)])
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(describe_type(argument) for argument in arguments)}]"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    names = {int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "null"}
    return names.get(hint, str(hint))


def _bounds(item: Any) -> Iterator[str]:
    if isinstance(item, FieldInfo):
        for part in item.metadata:
            yield from _bounds(part)
    for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        bound = getattr(item, name, None)
        if bound is not None and not (name == "le" and bound >= MOST):
            yield f"{sign} {bound:g}"


def _description(hint: Any) -> str:
    found = (item.description for item in getattr(hint, "__metadata__", ()) if isinstance(item, FieldInfo))
    return next((text for text in found if text), "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return json.dumps(field.default) if not isinstance(field.default, str) else field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return "" if dataclasses.is_dataclass(value) else json.dumps(value)
    return ""
