"""Opening megatron-core's checkpoints without running what is written in them.

megatron-core 0.16.1 and torch read three kinds of pickles: `.metadata` with a bare `pickle.load`, objects inside
`*.distcp` with `torch.load(weights_only=False)`, and `common.pt` with torch's default. `guarded` makes all three safe:
`.metadata` is first read into stand-ins that do nothing, and torch is held to `weights_only` for the rest.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_md.errors import UserError

_LARGEST = 2**28  # bytes of a `.metadata`, which has a hundred or so for each piece of a tensor
_DEEPEST, _HIGHEST = 100, 10_000  # marks within marks and values above one; real ones have about 10 and 2,000

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
_ENUMERATIONS = {f"{_DCP}.metadata._MEM_FORMAT_ENCODING", f"{_DCP}.planner.WriteItemType"}
# Called with plain values: a shape, enumerations, a layout by its name, a path.
_FUNCTIONS = {
    *_ENUMERATIONS,
    *("torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath", "pathlib._local.PosixPath"),
}
# How Python 3.11.0 to 3.11.3 write a member of an enumeration: getattr(class, "NAME").
_GETATTR = "builtins.getattr"
_DTYPE = re.compile(r"torch\.(bool|u?int(8|16|32|64)|b?float16|float(32|64)|complex(64|128)|float8_[a-z0-9]+)")
_NAMES = _RECORDS | _FUNCTIONS | {_GETATTR}
_NUMBERS = (int, float, bool, type(None))
# Read as Python reads them; six more as `_Reader` says.
_PLAIN_OPCODES = (
    *("BINGET", "LONG_BINGET", "STACK_GLOBAL", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"),
    *("MARK", "EMPTY_LIST", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
)


class CheckpointError(UserError):
    """A checkpoint that must not be loaded: damaged, incomplete, unverifiable or malicious."""


class _Refused(Exception):  # noqa: N818 (never leaves this file)
    """Why a pickle is not run."""


class _Global(str):
    """A name that the pickle imports."""


class _Object:
    """What the pickle makes, by the name of its class or function, with the fields that it gets."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields: dict[str, Any] = {}


class _Dict(dict[Any, Any]):
    """A dictionary of texts or indices: to hash a key of another kind may take for ever."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not str and not _is_index(key):
            raise _Refused("it has a key that is neither a text nor an index")
        super().__setitem__(key, value)


class _Handlers(dict[int, Callable[[Any], None]]):
    """What to do at each opcode."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        name = next((opcode.name for opcode in pickletools.opcodes if opcode.code == chr(code)), str(code))
        raise _Refused(f"opcode {name} has no place there")


class _Reader(pickle._Unpickler):
    """Python's own reader, held to what `pickle.dump` writes; it imports, makes and calls nothing."""

    def __init__(self, content: bytes) -> None:
        file = io.BytesIO(content)
        self.read, self.left = file.read, lambda: len(content) - file.tell()
        self.memo: list[Any] = []
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []
        self.append = self.stack.append

    def load(self) -> Any:
        """What the pickle holds."""
        if self.read(2) not in (b"\x80\x04", b"\x80\x05"):
            raise pickle.UnpicklingError("no protocol 4 or 5")
        while (code := self.read(1)) != pickle.STOP:
            self.dispatch[code[0]](self)
            if len(self.stack) > _HIGHEST or len(self.metastack) > _DEEPEST:
                raise _Refused("it piles up values without using them")
        if self.left():
            raise _Refused("bytes follow its end")
        return self.stack.pop()

    def frame(self) -> None:
        """A part of the file, of which Python reads as much as it is told."""
        (size,) = struct.unpack("<Q", self.read(8))
        if size > self.left():
            raise _Refused("it has a frame that is longer than the file")

    def find_class(self, module: str, name: str) -> _Global:
        """A name to import."""
        full = f"{module}.{name}"
        # Dots inside the name would reach attributes of what is imported.
        if "." in name or not (full in _NAMES or _DTYPE.fullmatch(full)):
            raise _Refused(f"it asks for {full[:200]}")
        return _Global(full)

    def new_object(self) -> None:
        """An empty record."""
        arguments, cls = self.stack.pop(), self.stack.pop()
        if type(cls) is not _Global or cls not in _RECORDS or arguments != ():
            raise _Refused(f"it makes an object of {_describe(cls)}")
        self.stack.append(_Object(cls))

    def call(self) -> None:
        """What a function gives: a shape, a member of an enumeration, a layout, a path."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Global or type(arguments) is not tuple:
            raise _Refused(f"it calls {_describe(function)}")
        if function == _GETATTR:
            function = _enumeration(arguments)
        elif function not in _FUNCTIONS or not all(map(_is_flat, arguments)):
            raise _Refused(f"it calls {function}, or calls it with something else than plain values")
        self.stack.append(_Object(function))

    def build(self) -> None:
        """Give a record its fields."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not _Object or target.name not in _RECORDS:
            raise _Refused(f"it sets the state of {_describe(target)}")
        if target.name.endswith(".TensorProperties"):
            # Its __setstate__ takes a tuple apart; it calls nothing that the tuple holds.
            if type(state) is not tuple:
                raise _Refused("it sets the state of a tensor's properties to something else than a tuple")
        elif type(state) is not _Dict or any(type(key) is not str or key.startswith("__") for key in state):
            raise _Refused(f"it sets more than fields of {target.name}")
        else:
            target.fields.update(state)

    dispatch = _Handlers(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _PLAIN_OPCODES}
        | {pickle.FRAME[0]: frame, pickle.NEWOBJ[0]: new_object, pickle.REDUCE[0]: call, pickle.BUILD[0]: build}
        | {pickle.EMPTY_DICT[0]: lambda reader: reader.append(_Dict())}
        | {pickle.MEMOIZE[0]: lambda reader: reader.memo.append(reader.stack[-1])}
    )


def _enumeration(arguments: tuple[Any, ...]) -> _Global:
    """The class of a member, asked for by its name in capitals; no other attribute of anything."""
    match arguments:
        case (_Global() as cls, str() as name) if cls in _ENUMERATIONS and re.fullmatch(r"[A-Z][A-Z_]*", name):
            return cls
    raise _Refused(f"it calls {_GETATTR} for something else than a member of an enumeration")


def _describe(value: Any) -> str:
    return str(value) if type(value) is _Global else getattr(value, "name", "something that is no class")


def _is_flat(value: Any) -> bool:
    """A text, a number, a shape, or a tuple of numbers: what can be hashed without walking far."""
    if type(value) is tuple:
        return all(type(item) in _NUMBERS for item in value)
    return type(value) in (str, *_NUMBERS) or (type(value) is _Object and value.name == "torch.Size")


def _is_index(key: Any) -> bool:
    if type(key) is not _Object or key.name != _INDEX:
        return False
    return type(key.fields.get("fqn")) is str and _is_flat(key.fields.get("offset"))


def is_plain_name(name: object) -> bool:
    """Whether a name stays in its directory wherever it is used: a mere text, no path, no `..`, nothing empty."""
    return type(name) is str and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


@lru_cache(maxsize=1)  # a start asks twice: before the checkpoint is taken, and before it is loaded
def _data_files(content: bytes) -> frozenset[str]:
    metadata = _Reader(content).load()
    if type(metadata) is not _Object or metadata.name != _METADATA:
        raise _Refused("it holds something else than the metadata of a checkpoint")
    storage = metadata.fields.get("storage_data") or _Dict()
    if type(storage) is not _Dict or not all(map(_is_index, storage)):
        raise _Refused("it has no table of where its data lie")
    names: set[str] = set()
    for entry in storage.values():
        name = entry.fields.get("relative_path") if type(entry) is _Object and entry.name == _STORAGE_INFO else None
        if type(name) is not str or not is_plain_name(name):
            shown = repr(name) if type(name) is str else "something that is no text"
            raise _Refused(f"it takes data from {shown:.200}, outside the checkpoint")
        names.add(name)
    return frozenset(names)


def check(path: Path) -> frozenset[str]:
    """Refuse a `.metadata` file that is more than the data of a distributed checkpoint; nothing in it is run.

    Returns:
        Names of the files beside it that it takes data from.

    Raises:
        CheckpointError: it asks for a class or function that has no place there, takes data from elsewhere, or is
            damaged; what it is, is named.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        if len(content) > _LARGEST:
            raise _Refused(f"it has more than {_LARGEST} bytes")
        return _data_files(content)
    except _Refused as error:
        raise CheckpointError(f"{path}: is refused: {error}") from None
    except Exception as error:  # whatever Python's reader meets in a damaged file
        raise CheckpointError(f"{path}: is damaged, no pickle ({type(error).__name__}: {error})") from None


@contextmanager
def guarded(directory: Path) -> Iterator[None]:
    """Within this, megatron-core can load `directory` and nothing in it is run. Hashes are `integrity.verify`'s matter.

    `.metadata` is checked first; then torch takes tensors and plain data only, also where it is told otherwise: for
    `common.pt`, and for the objects in `*.distcp`, which torch's own planner loads with `weights_only=False`.

    Raises:
        CheckpointError: something other than data is in `.metadata`, data are taken from what is no file of the
            directory, or the formats are not torch's.
    """
    used = check(directory / ".metadata")
    for name in sorted(used - {entry.name for entry in os.scandir(directory) if entry.is_file(follow_symlinks=False)}):
        raise CheckpointError(f"{directory}: .metadata takes data from {name!r}, which is no file there")
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
    from megatron_md.core_compat import (
        storage_formats,
    )  # with megatron-core, which a look at a checkpoint does not need

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        formats = storage_formats(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged or not there ({type(error).__name__})") from error
    if formats != ("torch_dist", "torch"):
        raise CheckpointError(f"{path}: formats {formats} are not ('torch_dist', 'torch')")
