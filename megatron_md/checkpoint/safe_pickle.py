"""Opening megatron-core's checkpoints without running what is written in them.

megatron-core 0.16.1 and torch read three kinds of pickles: `.metadata` with a bare `pickle.load`, objects inside
`*.distcp` with `torch.load(weights_only=False)`, and `common.pt` with torch's default. `guarded` makes all three safe:
`.metadata` is first run on a machine that builds nothing, and torch is held to `weights_only` for the rest.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_md.checkpoint.integrity import CheckpointError, is_plain_name

_DCP = "torch.distributed.checkpoint"
_METADATA = f"{_DCP}.metadata.Metadata"
_STORAGE_INFO = f"{_DCP}.filesystem._StorageInfo"
_INDEX = f"{_DCP}.metadata.MetadataIndex"

# Dataclasses of torch.distributed.checkpoint: made empty, then given their fields.
_RECORDS = {
    *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "StorageMeta", "TensorStorageMetadata", "TensorProperties")),
    *(f"{_DCP}.metadata.{name}" for name in ("BytesStorageMetadata", "ChunkStorageMetadata")),
    *(f"{_DCP}.planner.{name}" for name in ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData")),
    _STORAGE_INFO,
    _INDEX,
}
# Called with plain values: a shape, enumerations, a layout by its name, a path.
_FUNCTIONS = {
    "torch.Size",
    "torch.serialization._get_layout",
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
    f"{_DCP}.planner.WriteItemType",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
}
_ENUMERATIONS = (f"{_DCP}.metadata._MEM_FORMAT_ENCODING", f"{_DCP}.planner.WriteItemType")
# How Python 3.11.0 to 3.11.3 write a member of an enumeration: getattr(class, "NAME").
_GETATTR = "builtins.getattr"
_DTYPES = {
    *(f"torch.{name}" for name in ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")),
    *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")),
    *(f"torch.float8_{name}" for name in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")),
}


class _Global(str):
    """A name that the pickle imports."""


class _Instance(str):
    """An object of the class so called."""


class _Mapping(dict[Any, Any]):
    """A dictionary: textual keys with their values; of other keys only the key's identity."""


class _List(list[Any]):
    """A list; its content is of no interest."""


_MARK = object()
_VALUE = object()  # a number, truth value or None


class _Machine:
    """Runs the opcodes that `pickle.dump` uses for `.metadata` on stand-ins, so that nothing is imported or called."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def run(self, content: bytes) -> None:
        """Run a whole pickle; raises _Refused at anything unknown, IndexError at what no pickler writes."""
        for opcode, argument, position in pickletools.genops(content):
            name = opcode.name
            assert position is not None
            if (position == 0) != (name == "PROTO") or (name == "PROTO" and argument not in (4, 5)):
                raise _Refused("it is no pickle of protocol 4 or 5")
            if name == "STOP":
                if position + 1 != len(content):
                    raise _Refused("bytes follow its end")
                if [type(value) for value in self.stack] != [_Instance] or self.stack != [_METADATA]:
                    raise _Refused("it holds something else than the metadata of a checkpoint")
            elif name in ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"):
                self.stack.append(str(argument))
            elif name in _PLAIN:
                self.stack.append(_VALUE)
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[int(str(argument))])
            elif name in _HANDLERS:
                _HANDLERS[name](self)
            elif name not in ("PROTO", "FRAME"):
                raise _Refused(f"opcode {name} has no place there")

    def pop(self) -> Any:
        """The topmost value."""
        if self.stack[-1] is _MARK:
            raise _Refused("its stack is damaged")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """The values above the last mark, which goes as well."""
        items: list[Any] = []
        while self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        self.stack.pop()
        return items[::-1]

    def memoize(self) -> None:
        """Remember the topmost value."""
        value = self.pop()
        self.stack.append(value)
        self.memo.append(value)

    def push_tuple(self, items: list[Any]) -> None:
        """Push a tuple."""
        self.stack.append(tuple(items))

    def append(self, items: list[Any]) -> None:
        """Append to the list on top."""
        if type(self.stack[-1]) is not _List:
            raise _Refused("it appends to something else than a list")

    def set_items(self, items: list[Any]) -> None:
        """Set keys of the dictionary on top."""
        target = self.stack[-1]
        if type(target) is not _Mapping or len(items) % 2:
            raise _Refused("it sets keys of something else than a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str:
                target[key] = value
            elif key is not _VALUE and not (type(key) is _Instance and key == _INDEX):
                raise _Refused("it has a key that is neither a text nor an index")

    def find_global(self) -> None:
        """A name to import."""
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise _Refused("it imports something without a name")
        full = f"{module}.{name}"
        # Dots inside the name would reach attributes of what is imported.
        if "." in name or full not in _RECORDS | _FUNCTIONS | _DTYPES | {_GETATTR}:
            raise _Refused(f"it asks for {full}")
        self.stack.append(_Global(full))

    def new_object(self) -> None:
        """An empty record."""
        arguments, cls = self.pop(), self.pop()
        if type(cls) is not _Global or cls not in _RECORDS or arguments != ():
            raise _Refused(f"it makes an object of {_describe(cls)}")
        self.stack.append(_Instance(cls))

    def reduce(self) -> None:
        """Call a function."""
        arguments, function = self.pop(), self.pop()
        if type(function) is _Global and function == _GETATTR:
            self.stack.append(self.member(arguments))
            return
        if type(function) is not _Global or function not in _FUNCTIONS or type(arguments) is not tuple:
            raise _Refused(f"it calls {_describe(function)}")
        if not all(_is_flat(argument) for argument in arguments):
            raise _Refused(f"it calls {function} with something else than plain values")
        self.stack.append(_Instance(function))

    def member(self, arguments: Any) -> _Instance:
        """A member of an enumeration, by its name in capitals; no other attribute of anything."""
        match arguments:
            case (_Global() as cls, str() as name) if type(name) is str:
                if cls in _ENUMERATIONS and re.fullmatch(r"[A-Z][A-Z_]*", name):
                    return _Instance(cls)
        raise _Refused(f"it calls {_GETATTR} for something else than a member of an enumeration")

    def build(self) -> None:
        """Give a record its fields."""
        state, target = self.pop(), self.stack[-1]
        if type(target) is not _Instance or target not in _RECORDS:
            raise _Refused(f"it sets the state of {_describe(target)}")
        if target.endswith(".TensorProperties"):
            # Its __setstate__ takes a tuple apart; it calls nothing that the tuple holds.
            if type(state) is not tuple:
                raise _Refused("it sets the state of a tensor's properties to something else than a tuple")
        elif type(state) is not _Mapping or any(key.startswith("__") for key in state):
            raise _Refused(f"it sets more than fields of {_describe(target)}")
        if target == _STORAGE_INFO and not is_plain_name(state.get("relative_path")):
            raise _Refused(f"it takes data from {state.get('relative_path')!r}, outside the checkpoint")
        if target == _INDEX and not (type(state.get("fqn")) is str and _is_flat(state.get("offset", _VALUE))):
            raise _Refused("it has an index without a name")


class _Refused(Exception):  # noqa: N818 (never leaves this file)
    """Why a pickle is not run."""


_PLAIN = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_HANDLERS: dict[str, Callable[[_Machine], None]] = {
    "MARK": lambda machine: machine.stack.append(_MARK),
    "MEMOIZE": _Machine.memoize,
    "EMPTY_TUPLE": lambda machine: machine.push_tuple([]),
    "TUPLE1": lambda machine: machine.push_tuple([machine.pop()]),
    "TUPLE2": lambda machine: machine.push_tuple([machine.pop(), machine.pop()][::-1]),
    "TUPLE3": lambda machine: machine.push_tuple([machine.pop(), machine.pop(), machine.pop()][::-1]),
    "TUPLE": lambda machine: machine.push_tuple(machine.pop_to_mark()),
    "EMPTY_LIST": lambda machine: machine.stack.append(_List()),
    "APPEND": lambda machine: machine.append([machine.pop()]),
    "APPENDS": lambda machine: machine.append(machine.pop_to_mark()),
    "EMPTY_DICT": lambda machine: machine.stack.append(_Mapping()),
    "SETITEM": lambda machine: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine: machine.set_items(machine.pop_to_mark()),
    "STACK_GLOBAL": _Machine.find_global,
    "NEWOBJ": _Machine.new_object,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}


def _describe(value: Any) -> str:
    return str(value) if isinstance(value, (_Global, _Instance)) else "something that is no class"


def _is_flat(value: Any) -> bool:
    """A text, a number, a shape, or a tuple of numbers: what can be hashed without walking far."""
    if type(value) is tuple:
        return all(item is _VALUE for item in value)
    return value is _VALUE or type(value) is str or (type(value) is _Instance and value == "torch.Size")


def check(path: Path) -> None:
    """Refuse a `.metadata` file that is more than the data of a distributed checkpoint; nothing in it is run.

    Raises:
        CheckpointError: it asks for a class or function that has no place there, or is damaged; both are named.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        _Machine().run(content)
    except _Refused as error:
        raise CheckpointError(f"{path}: is refused: {error}") from None
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: is damaged, no pickle ({error})") from None


@contextmanager
def guarded(directory: Path) -> Iterator[None]:
    """Within this, megatron-core can load `directory` and nothing in it is run. Hashes are `integrity.verify`'s matter.

    `.metadata` is checked first; then torch takes tensors and plain data only, also where it is told otherwise: for
    `common.pt`, and for the objects in `*.distcp`, which torch's own planner loads with `weights_only=False`.

    Raises:
        CheckpointError: something other than data is in `.metadata`, or the formats are not torch's.
    """
    check(directory / ".metadata")
    _check_formats(directory / "metadata.json")
    saved = {name: os.environ.pop(name, None) for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", _FORCE_UNSAFE)}
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


_FORCE_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def _check_formats(path: Path) -> None:
    """megatron-core picks its reader by this file; other readers than torch's are not guarded."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        formats = content["sharded_backend"], content["common_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged or not there ({type(error).__name__})") from error
    if formats != ("torch_dist", "torch"):
        raise CheckpointError(f"{path}: formats {formats} are not ('torch_dist', 'torch')")
