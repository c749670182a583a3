"""Damaged and hostile files for tests: strategies that change sound ones, and what may come of reading them."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_md.errors import UserError

COMMON = settings(
    deadline=None, derandomize=True, database=None, print_blob=False, suppress_health_check=list(HealthCheck)
)
settings.register_profile("quick", COMMON, max_examples=15)
settings.register_profile("long", COMMON, max_examples=600)

# What a key must not hold, whatever it is: `RAW` puts a text into the JSON as it is.
RAW = "\ue000"
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e300, "", "x", "7", "../x", "/dev/zero",
    "a\0b", "\ud800", "y" * 5000, [], [[]], [1, "x"], {}, {"": None}, {"x": [1]},
    *(RAW + text for text in ("NaN", "-Infinity", "1e999", "9" * 5000, "[" * 5000 + "]" * 5000, "[" * 200 + "]" * 200)),
]  # fmt: skip

YAML_PIECES = [
    "!!int x", "!!timestamp x", "!!float 1:30", "!!bool 7", "!!binary =", "!!set {a}", "!!python/name:os.system",
    "9" * 5000, '"\\ud800"', "[" * 5000, "- " * 100, "{a: " * 80, "&a [*a]", "&a {<<: *a}", "*a", "<<: 1", ".nan",
    "1e999",
    "0x10",
    "99999999999999999999", "-1", "null", "~", "''", "[]", "{}", "[1, {}]", "{1: 2}", "{[a]: b}", "{null: 1}", "? x",
    "%YAML 9",
    "&a [1,1,1,1,1,1,1,1]\n"
    "b: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d]",
]  # fmt: skip


@st.composite
def changed_bytes(draw: st.DrawFn, sound: bytes, most: int = 4) -> bytes:
    """A file with bytes changed, added, left out, repeated, or its end cut off."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, len(data)))
        stop = min(len(data), at + draw(st.sampled_from([1, 1, 2, 4, 8, 40])))
        kind = draw(st.sampled_from(["flip", "flip", "set", "add", "drop", "repeat", "cut"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at:stop] = bytes([draw(st.sampled_from([0, 0xFF, 0x80, 0x30, 0x22]))]) * (stop - at)
        elif kind == "add":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "drop":
            del data[at:stop]
        elif kind == "repeat":
            data[at:at] = data[at:stop]
        elif kind == "cut" and draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


@st.composite
def changed_value(draw: st.DrawFn, sound: Any) -> Any:
    """A JSON value in which some values are replaced, left out, or joined by others."""
    value = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 2))):
        *path, key = draw(st.sampled_from(_places(value)[1:] or [(None,)]))
        if key is None:
            return deepcopy(draw(st.sampled_from(HOSTILE)))
        holder = value
        for step in path:
            holder = holder[step]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"]))
        if kind == "replace":
            holder[key] = deepcopy(draw(st.sampled_from(HOSTILE)))
        elif kind == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(["surprise", "", "step"]))] = deepcopy(draw(st.sampled_from(HOSTILE)))
        else:
            holder.append(deepcopy(draw(st.sampled_from(HOSTILE))))
    return value


def as_text(value: Any) -> bytes:
    """JSON, or nearly: with NaN, with texts of `RAW` as they are, with half surrogate pairs spelt out."""
    text = json.dumps(value)
    mark = json.dumps(RAW)[1:-1]
    for raw in (item[1:] for item in HOSTILE if isinstance(item, str) and item.startswith(RAW)):
        text = text.replace(f'"{mark}{raw}"', raw)
    return text.encode()


def changed_json(sound: Any) -> st.SearchStrategy[bytes]:
    """The bytes of a JSON file, changed in its values or anywhere."""
    return st.one_of(
        changed_value(sound).map(as_text), changed_value(sound).map(as_text), changed_bytes(json.dumps(sound).encode())
    )


@st.composite
def changed_yaml(draw: st.DrawFn, sound: str) -> bytes:
    """The bytes of a YAML file with a value replaced, a line added, or bytes changed."""
    lines = sound.splitlines()
    kind = draw(st.sampled_from(["value", "value", "line", "bytes"]))
    if kind == "bytes":
        return draw(changed_bytes(sound.encode()))
    at = draw(st.integers(0, len(lines) - 1))
    piece = draw(st.sampled_from(YAML_PIECES))
    if kind == "value":
        lines[at] = f"{lines[at].partition(':')[0]}: {piece}"
    else:
        lines.insert(at, piece)
    return "\n".join(lines).encode()


def refused(read: Callable[[], Any]) -> str | None:
    """The message of a deliberate refusal, None where reading went well; anything else is a failure."""
    try:
        read()
    except Exception as error:
        assert isinstance(error, UserError), "".join(traceback.format_exception(error))
        message = str(error)
        assert message and len(message) < 4000, message
        return message
    return None


def fuzz(files: st.SearchStrategy[Any], check: Callable[[Any], None], profile: str) -> None:
    """Try a check on as many files as the profile has."""
    settings(settings.get_profile(profile))(given(files)(check))()


Case = tuple[st.SearchStrategy[bytes], Path, Callable[[], Any]]
profiles = pytest.mark.parametrize("profile", ["quick", pytest.param("long", marks=pytest.mark.slow)])


def tried(case: Case, profile: str) -> None:
    """Write every file under its name and read it: a deliberate refusal, or data that hold what they should."""
    files, path, read = case

    def check(data: bytes) -> None:
        path.write_bytes(data)
        refused(read)

    fuzz(files, check, profile)
