"""Folders as Hugging Face's `save_pretrained` writes them: config.json, tokenizer files, safetensors with an index."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_md.data.optional import optional_package
from megatron_md.errors import UserError
from megatron_md.files import sync, write_synced
from megatron_md.json_file import LARGE, read_json

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
LONGEST_NAME = 255  # of any file system
SINGLE_NAME = "model.safetensors"
SHARD_BYTES = 1_000_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What travels beside the weights, besides the code that `auto_map` names (*.py): read as data, never run.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "generation_config.json", "chat_template.jinja",
)  # fmt: skip

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class FolderError(UserError):
    """A folder is not what it should be; the message names the file."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, its shape, and its data type by torch's name."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class HuggingFaceFolder:
    """The weights of a folder; a context manager that keeps its files open.

    Attributes:
        path: the folder.
        config: content of its `config.json`.
        tensors: every tensor by its name.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder.

        Raises:
            FolderError: it lacks a file, lists tensors that are not there, or holds no safetensors.
        """
        safetensors = optional_package("safetensors", str(path), "convert")
        self.path = Path(path)
        if not self.path.is_dir():
            raise FolderError(f"{path}: no such folder")
        self.config = read_json(self.path / "config.json", "give a folder of a Hugging Face model", error=FolderError)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for name in self._weight_files():
            try:
                file = self._stack.enter_context(safetensors.safe_open(self.path / name, framework="pt"))
            except (OSError, safetensors.SafetensorError) as error:
                raise FolderError(f"{self.path / name}: not a whole safetensors file ({error})") from error
            self._files[name] = file
            for tensor in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(tensor)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise FolderError(f"{self.path / name}: {tensor} is {part.get_dtype()}; convert it to bf16 first")
                if tensor in self.tensors:
                    raise FolderError(f"{self.path / name}: {tensor} lies in {self.tensors[tensor].file} as well")
                self.tensors[tensor] = StoredTensor(name, tuple(part.get_shape()), dtype)
        self._check_index()

    def _weight_files(self) -> list[str]:
        if (self.path / INDEX_NAME).exists():
            names = sorted(set(self._index().values()))
        else:
            names = [SINGLE_NAME] if (self.path / SINGLE_NAME).is_file() else []
        pickled = sorted(file.name for pattern in PICKLES for file in self.path.glob(pattern))
        if not names and pickled:
            raise FolderError(
                f"{self.path / pickled[0]}: weights in a pickle can run code when they are read; "
                "save the model as safetensors first"
            )
        if not names:
            raise FolderError(f"{self.path}: holds neither {SINGLE_NAME} nor {INDEX_NAME}")
        for name in names:
            if Path(name).name != name or len(name) > LONGEST_NAME:
                raise FolderError(f"{self.path / INDEX_NAME}: {reprlib.repr(name)} is not a file of the folder")
            if not os.path.isfile(self.path / name):  # which takes any name
                raise FolderError(f"{self.path / name}: missing, though {INDEX_NAME} lists it; download it again")
        return names

    def _index(self) -> dict[str, str]:
        path = self.path / INDEX_NAME
        places = read_json(path, "download it again", most_bytes=LARGE, error=FolderError).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise FolderError(f"{self.path / INDEX_NAME}: has no weight_map of file names")
        return places

    def _check_index(self) -> None:
        if not (self.path / INDEX_NAME).exists():
            return
        for tensor, name in self._index().items():
            if tensor not in self.tensors or self.tensors[tensor].file != name:
                raise FolderError(f"{self.path / INDEX_NAME}: lists {tensor} in {name}, where it is not")

    def read(self, name: str) -> torch.Tensor:
        """A tensor; its pages are read when they are used."""
        tensor: torch.Tensor = self._files[self.tensors[name].file].get_tensor(name)
        return tensor

    def shards(self) -> dict[str, list[str]]:
        """The tensors of each weight file."""
        shards: dict[str, list[str]] = {name: [] for name in self._files}
        for tensor, stored in self.tensors.items():
            shards[stored.file].append(tensor)
        return shards

    def companions(self) -> list[Path]:
        """Tokenizer, generation and code files that travel with the weights."""
        known = [self.path / name for name in COMPANIONS if (self.path / name).is_file()]
        return [*known, *sorted(self.path.glob("*.py"))]

    def __enter__(self) -> HuggingFaceFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()


def plan_shards(sizes: Mapping[str, int], limit: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Cut tensors (bytes by name, in order) into files of at most `limit` bytes each, or one larger tensor."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def write_folder(
    directory: Path,
    *,
    config: bytes,
    shards: Mapping[str, list[str]],
    read: Callable[[str], torch.Tensor],
    companions: Mapping[str, bytes],
) -> None:
    """Write the files of a model into an empty directory, one weight file in memory at a time.

    Args:
        directory: exists and is empty.
        config: content of `config.json`.
        shards: the tensors of each weight file.
        read: gives a tensor by its name.
        companions: content of the other files, by name.

    Raises:
        FolderError: a weight file cannot be written.
    """
    safetensors = optional_package("safetensors", str(directory), "convert")
    save_file = optional_package("safetensors.torch", str(directory), "convert").save_file
    total = 0
    places: dict[str, str] = {}
    for name, tensors in shards.items():
        content = {tensor: read(tensor) for tensor in tensors}
        total += sum(tensor.numel() * tensor.element_size() for tensor in content.values())
        try:
            save_file(content, directory / name, metadata={"format": "pt"})
            sync(directory / name)
        except (OSError, safetensors.SafetensorError) as error:
            raise FolderError(f"{directory / name}: cannot be written ({error})") from error
        places |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_synced(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    write_synced(directory / "config.json", config)
    for name, data in companions.items():
        write_synced(directory / name, data)
