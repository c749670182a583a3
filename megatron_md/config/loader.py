"""One YAML file and dotted overrides become frozen dataclasses, strictly; and back to YAML.

Nothing here knows the keys of a run: `megatron_md.config` does. Imports neither torch nor Megatron.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml
from pydantic import ValidationError

from megatron_md.config.schema import MOST, Path_, describe_type, keys_of, section_of
from megatron_md.errors import UserError
from megatron_md.json_file import DEEPEST, LONGEST_NUMBER, adapter, read_regular
from megatron_md.messages import redacted

T = TypeVar("T")


class ConfigError(UserError):
    """A bad config.

    Attributes:
        lines: one clear line for each thing that is wrong.
    """

    def __init__(self, lines: str | Sequence[str]) -> None:
        self.lines = [lines] if isinstance(lines, str) else list(lines)
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.lines,)


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of its core schema (`3e-3` is a number, `1:30` and `no` are text) and no duplicate keys.

    Depth and nodes are counted while the text is read, an alias as all that it stands for, before anything is built.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._nodes_of: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As PyYAML's, within `DEEPEST` and `_MOST_NODES`."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before, self._depth, self._nodes = self._nodes, self._depth + 1, self._nodes + 1
        if self._depth > DEEPEST:
            raise _refusal(event.start_mark, f"nested deeper than {DEEPEST}")
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent) and node is not None:
            if node not in self._nodes_of:
                raise _refusal(event.start_mark, f"*{event.anchor} holds itself")
            self._nodes += self._nodes_of[node]
        elif node is not None:
            self._nodes_of[node] = self._nodes - before
        if self._nodes > _MOST_NODES:
            raise _refusal(event.start_mark, f"more than {_MOST_NODES} values, with what the aliases stand for")
        self._depth -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """As PyYAML's, but the text must be one of its type, and one that UTF-8 can write."""
        text = super().construct_scalar(node)
        assert isinstance(text, str)
        pattern = _SCALARS.get(node.tag)
        if pattern is not None and (pattern.match(text) is None or len(text) > LONGEST_NUMBER):
            raise _refusal(node.start_mark, f"{_describe(text)} is no {node.tag.rpartition(':')[2]} that is read here")
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            raise _refusal(node.start_mark, f"{_describe(text)} holds half a surrogate pair")
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's, but a key that appears twice is an error."""
        seen: set[str] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise _refusal(key_node.start_mark, f"key {key_node.value[:80]!r} appears twice")
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_MOST_NODES, _LONGEST = 20_000, 1 << 20
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_SCALARS: dict[str, re.Pattern[str]] = {}
for _tag, _pattern, _first in (
    ("bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", re.compile(r"^<<$"), "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
    _SCALARS[f"tag:yaml.org,2002:{_tag}"] = _pattern
# Dates, sets, binary data and the like are none of a config's types.
_TAGS = [None, *(f"tag:yaml.org,2002:{tag}" for tag in ("null", "bool", "int", "float", "str", "seq", "map"))]
_Loader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _TAGS}


def _refusal(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or the loader above would take for something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Args:
        text: YAML.
        source: what error messages call it.

    Raises:
        ConfigError: it is no YAML, a key appears twice, or it is larger or deeper than any config.
    """
    if len(text) > _LONGEST:
        raise ConfigError(f"{source}: longer than {_LONGEST} characters, which no config is")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{source}{where}: {problem[:200]}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, no YAML, or something else than a mapping with textual keys.
    """
    if not Path(path).exists():
        raise ConfigError(f"{path}: no such file")
    data = read_regular(Path(path), "give the YAML file itself", error=ConfigError)
    try:
        value = parse_yaml(data.decode(), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys, not {_describe(value)}")
    return value


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> set[Path_]:
    """Set `section.key=value` overrides, in order, in a nested mapping; only its top level is changed in place.

    Returns:
        The paths of the keys that were set.

    Raises:
        ConfigError: an override without `=` or key, with a value that is no YAML, or below a key that is no section.
    """
    changed: set[Path_] = set()
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = tuple(name.strip().split("."))
        if not equals or not all(keys):
            raise ConfigError(f"override {override!r}: must look like section.key=value")
        section = mapping
        for depth, key in enumerate(keys[:-1]):
            below = section.get(key) or {}
            if not isinstance(below, dict):
                raise ConfigError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is no section")
            # A copy, since the caller (or a YAML alias) may hold the same mapping elsewhere.
            section[key] = {**below}
            section = section[key]
        section[keys[-1]] = parse_yaml(text, f"override {override!r}")
        changed.add(keys)
    return changed


def validate(schema: type[T], mapping: Mapping[str, Any], source: str, overridden: set[Path_] | None = None) -> T:
    """Build a tree of dataclasses from a nested mapping.

    Types are strict (a text never becomes a number), whole numbers serve as floats, an empty section is all defaults.

    Args:
        schema: the root dataclass.
        mapping: nested keys and values, as from YAML.
        source: file name for messages.
        overridden: paths that came from the command line instead.

    Raises:
        ConfigError: every unknown key (with the nearest known one), wrong type or value out of bounds, one line each.
    """
    content = _without_empty_sections(schema, mapping)
    try:
        text = json.dumps(content)
    except TypeError as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        # Strictness as in JSON: dataclasses come from mappings, floats also from whole numbers, nothing else converts.
        config: T = adapter(cast(Hashable, schema)).validate_json(text, strict=True)
        return config
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=True)
    lines: dict[Path_, str] = {}
    known = dict(keys_of(schema))
    for item in found:
        if _is_another_alternative(item, found):
            continue
        path = _known_part(tuple(str(part) for part in item["loc"]), known, str(item["type"]))
        origin = "command line" if _is_overridden(path, overridden or set()) else source
        lines.setdefault(path, f"{origin}: {_explain_error(path, item, known)}")
    raise ConfigError(list(lines.values()))


def _is_another_alternative(item: Any, found: Sequence[Any]) -> bool:
    """Of a key that may be text or a list, whether this is the complaint about text, and a list was given."""
    key = item["loc"][:-1]
    deeper = any(other["loc"][: len(key)] == key and len(other["loc"]) > len(key) + 1 for other in found)
    return item["type"] == "string_type" and isinstance(item.get("input"), list) and deeper


def to_yaml(config: Any) -> str:
    """A dataclass (or its dictionary) as YAML that loads to the same one, but for the secrets, which are left out."""
    content = config if isinstance(config, dict) else dataclasses.asdict(config)
    return str(yaml.dump(redacted(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _without_empty_sections(schema: Any, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Without the sections of which only the heading is left (`data:` with every key commented out)."""
    hints = get_type_hints(schema, include_extras=True)
    result = {}
    for key, value in mapping.items():
        hint = hints.get(str(key))
        section = section_of(hint) if hint is not None else None
        if section is not None and value is None and "null" not in describe_type(hint):
            continue
        result[str(key)] = _without_empty_sections(section, value) if section and isinstance(value, dict) else value
    return result


def _known_part(loc: Path_, known: Mapping[Path_, Any], kind: str) -> Path_:
    """The part of pydantic's location that names keys; what follows are names of types that it tried."""
    depth = 0
    while depth < len(loc) and loc[: depth + 1] in known:
        depth += 1
    if kind == "unexpected_keyword_argument" and section_of(known.get(loc[:depth])) and len(loc) > depth:
        # An optional section puts its dataclass's name in between.
        return (*loc[:depth], loc[-1])
    if depth == 0 or (kind in ("missing", "unexpected_keyword_argument") and depth < len(loc)):
        return (*loc[:depth], loc[-1])
    rest = [part for part in loc[depth:] if part.isdigit() or (*loc[:depth], part) in known]
    return (*loc[:depth], *rest)


def _is_overridden(path: Path_, overridden: set[Path_]) -> bool:
    return any(path[: len(keys)] == keys or keys[: len(path)] == path for keys in overridden)


def _explain_error(path: Path_, item: Mapping[str, Any], known: Mapping[Path_, Any]) -> str:
    name, kind, value = ".".join(path), str(item["type"]), item.get("input")
    if kind == "unexpected_keyword_argument":
        return f"unknown key {name}{suggest(path, known)}"
    if kind in ("missing", "missing_argument"):
        return f"{name} is missing"
    hint = known.get(path)
    if kind == "less_than_equal" and item["ctx"]["le"] >= MOST:
        return f"{name} must be at most {item['ctx']['le']:g}, got {_describe(value)}"
    if hint is not None and kind != "value_error":
        text = f"{name} must be {describe_type(hint)}, got {_describe(value)}"
        return f"{text}; put it in quotes" if kind == "string_type" and isinstance(value, (int, float)) else text
    message = str(item["msg"]).replace("Input should be", "must be")
    return f"{name} {message}, got {_describe(value)}"


def suggest(path: Path_, known: Mapping[Path_, Any]) -> str:
    """`; did you mean ...?` with the nearest known key: in the same section first, then anywhere by its last name."""
    siblings = {".".join(p): p for p in known if p[:-1] == path[:-1]}
    by_name = difflib.get_close_matches(path[-1], [p[-1] for p in siblings.values()], n=1, cutoff=0.6)
    if by_name:
        return f"; did you mean {'.'.join((*path[:-1], by_name[0]))}?"
    elsewhere = difflib.get_close_matches(path[-1], {p[-1]: None for p in known}, n=2, cutoff=0.65)
    if elsewhere:
        places = [".".join(p) for p in known if p[-1] in elsewhere]
        return f"; did you mean {' or '.join(places[:3])}?"
    return f" (known here: {', '.join(p[-1] for p in siblings.values())})" if siblings else ""


def _describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return "a mapping"
    text = json.dumps(value) if isinstance(value, (str, bool, int, float, list)) else repr(value)
    text = redacted(text)  # before it is cut
    return text if len(text) <= 80 else f"{text[:77]}..."
