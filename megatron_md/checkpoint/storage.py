"""Tensors of a distributed checkpoint one slice at a time, without a model and without distributed processes.

megatron-core's `torch_dist` format is PyTorch's distributed checkpoint (DCP) plus two small files. A slice is written
when its turn comes and read when it is asked for, so that a conversion holds one slice of the model in memory.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_md.files import write_synced


@dataclass(frozen=True)
class Slice:
    """A part of a tensor that is still to be made.

    Attributes:
        name: the tensor.
        shape: of the whole tensor.
        offset: where the part begins.
        size: of the part.
        dtype: of the tensor.
        make: gives the part.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


class _LazyPlanner(SavePlanner):
    """Plans slices by their shapes and makes each when it is written."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self.slices = {MetadataIndex(part.name, torch.Size(part.offset)): part for part in slices}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to set up: the slices are known."""

    def create_local_plan(self) -> SavePlan:
        """One item a slice."""
        return SavePlan(
            [
                WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.size)),
                        properties=TensorProperties(dtype=part.dtype),
                        size=torch.Size(part.shape),
                    ),
                )
                for index, part in self.slices.items()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plan of the only process, and the checkpoint's metadata."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Make a slice."""
        part = self.slices[write_item.index]
        tensor = part.make()
        assert tuple(tensor.shape) == part.size and tensor.dtype == part.dtype, (part, tensor.shape, tensor.dtype)
        return tensor.contiguous()


def explained(error: BaseException, directory: Path) -> BaseException:
    """The error; torch's way to say that a file could not be written whole, in words."""
    if isinstance(error, RuntimeError) and "unexpected pos" in str(error):
        free = shutil.disk_usage(directory).free
        return OSError(f"{directory}: a file could not be written whole; the disk has {free / 1e6:,.1f} MB left")
    return error


def write_tensors(directory: Path, slices: Sequence[Slice]) -> None:
    """Write a distributed checkpoint that megatron-core can load on any layout.

    Args:
        directory: exists and is empty.
        slices: parts that make up whole tensors without overlap.

    Raises:
        OSError: the disk is full. Whatever a slice's `make` raises comes through, Ctrl-C too.
    """
    # One file a slice: within a file, PyTorch's writer keeps what it has written.
    writer = FileSystemWriter(directory, single_file_per_rank=False, thread_count=1)
    try:
        dcp_save({}, storage_writer=writer, planner=_LazyPlanner(slices), no_dist=True)
    except CheckpointException as error:
        raise explained(next(iter(error.failures.values()))[0], directory) from None
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    common = {"common_backend": "torch", "common_backend_version": 1}
    buffer = io.BytesIO()
    torch.save({"content_metadata": {}}, buffer)
    write_synced(directory / "common.pt", buffer.getvalue())
    write_synced(directory / "metadata.json", json.dumps({**backend, **common}))


class _SlicePlanner(LoadPlanner):
    """Reads the items of one slice into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to set up."""

    def create_local_plan(self) -> LoadPlan:
        """Not asked for: the caller plans."""
        raise NotImplementedError

    create_global_plan = finish_plan = create_local_plan  # type: ignore[assignment]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Not asked for: slices are tensors."""
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the slice that an item fills."""
        part = self.target
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: the item was written in place."""


class Reader(Protocol):
    """Gives the tensors of a checkpoint slice by slice.

    Attributes:
        tensors: shape and data type of each tensor by its name.
    """

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """A slice of a tensor."""
        ...


class TensorReader:
    """The tensors of a distributed checkpoint, of whatever layout it was saved with.

    Attributes:
        tensors: shape and data type of each tensor by its name.
    """

    def __init__(self, directory: Path, *, instead: str = "", dtype: torch.dtype | None = None) -> None:
        """Open a checkpoint, whose `.metadata` must have been checked: PyTorch unpickles it.

        Args:
            directory: the checkpoint.
            instead: where there is a tensor whose name is this and then another's name, that one is read for the other.
            dtype: to read tensors in; their own if None.
        """
        self._reader = FileSystemReader(directory)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._source = {name: instead + name if instead + name in self._stored else name for name in self._stored}
        self.tensors = {
            name: (tuple(entry.size), dtype or entry.properties.dtype) for name, entry in self._stored.items()
        }

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """A slice of a tensor.

        Raises:
            KeyError: there is no tensor of this name.
        """
        source = self._source[name]
        target = torch.empty(tuple(size), dtype=self.tensors[name][1])
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        items = create_read_items_for_chunk_list(source, self._stored[source], [chunk])
        assert sum(item.lengths.numel() for item in items) == target.numel(), f"{name}: stored with gaps"
        self._reader.read_data(LoadPlan(items), _SlicePlanner(target)).wait()
        return target

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)
