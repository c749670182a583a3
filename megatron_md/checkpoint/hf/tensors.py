"""Conversion between Hugging Face folders and our layout-free checkpoints: one tensor of one layer at a time, on a CPU.

Neither direction builds a model. What a family's tensors are is said in `families.py`; this file moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_md.checkpoint.hf.families import Family, Rule, dimensions
from megatron_md.checkpoint.hf.folder import FolderError, HuggingFaceFolder, StoredTensor
from megatron_md.checkpoint.storage import Reader, Slice
from megatron_md.config import ResolvedModel
from megatron_md.errors import UserError

# Buffers that some releases saved beside the weights; they follow from the config.
IGNORED_ENDINGS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Move:
    """A tensor of ours, or one layer of it, and the Hugging Face tensors that it consists of.

    Attributes:
        rule: the table's row.
        layer: which layer; None where the tensor has no layers.
        theirs: names of the parts.
        shapes: of the parts.
    """

    rule: Rule
    layer: int | None
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our tensor, without the axis of layers."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


def moves(family: Family, model: ResolvedModel) -> Iterator[Move]:
    """Everything that a model of this shape consists of, layer by layer."""
    widths = dimensions(model)
    for rule in family.rules:
        if not rule.applies(model):
            continue
        shapes = tuple(tuple(widths[name] for name in shape) for shape in rule.shapes)
        for layer in range(model.layers) if rule.is_layer else (None,):
            yield Move(rule, layer, tuple(name.format(layer=layer) for name in rule.theirs), shapes)


def merge(parts: Sequence[torch.Tensor], rule: Rule, groups: int) -> torch.Tensor:
    """Our tensor from a family's parts.

    Under `qkv` the rows of each query group lie together: its queries, then its key, then its value.
    """
    if rule.layout == "plain":
        return parts[0]
    if rule.layout == "gate_up":
        return torch.cat(list(parts))
    rest = parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)


def split(tensor: torch.Tensor, move: Move, groups: int) -> list[torch.Tensor]:
    """The family's parts of our tensor; the inverse of `merge`."""
    rows = [shape[0] for shape in move.shapes]
    if move.rule.layout == "qkv":
        grouped = tensor.reshape(groups, -1, *tensor.shape[1:])
        parts = torch.split(grouped, [row // groups for row in rows], dim=1)
        return [part.reshape(-1, *tensor.shape[1:]) for part in parts]
    return list(torch.split(tensor, rows))


def check_folder(folder: HuggingFaceFolder, family: Family, model: ResolvedModel) -> None:
    """Check that a folder holds exactly the tensors of its config, in the right shapes.

    Raises:
        FolderError: one is missing, one too many, or of another shape; names it.
    """
    wanted = {
        name: shape for move in moves(family, model) for name, shape in zip(move.theirs, move.shapes, strict=True)
    }
    missing = [name for name in wanted if name not in folder.tensors]
    extra = [name for name in folder.tensors if name not in wanted and not name.endswith(IGNORED_ENDINGS)]
    if missing or extra:
        lists = [f"{kind}: {_some(names)}" for kind, names in (("missing", missing), ("unknown", extra)) if names]
        raise FolderError(
            f"{folder.path}: not the tensors of a {family.name} model with this config ({'; '.join(lists)})"
        )
    for name, shape in wanted.items():
        if folder.tensors[name].shape != shape:
            raise FolderError(
                f"{folder.path / folder.tensors[name].file}: {name} has shape {list(folder.tensors[name].shape)}, "
                f"and config.json says {list(shape)}"
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def import_slices(
    folder: HuggingFaceFolder,
    family: Family,
    model: ResolvedModel,
    *,
    dtype: torch.dtype | None = None,
    extra_rows: int = 0,
) -> list[Slice]:
    """Slices of our checkpoint that read a folder's tensors when they are written.

    Args:
        folder: open and checked.
        family: its table.
        model: its shape.
        dtype: data type of all tensors; None keeps each tensor's own.
        extra_rows: rows to append to embedding and output layer, filled with the mean of the others (a mask token).

    Raises:
        FolderError: the layers of a tensor differ in data type and `dtype` does not say which it shall be.
    """
    groups = model.key_heads
    slices = []
    dtypes: dict[str, torch.dtype] = {}
    for move in moves(family, model):
        stored = [folder.tensors[name] for name in move.theirs]
        own = dtype or _common_dtype(folder, stored, move)
        if dtypes.setdefault(move.rule.ours, own) != own:
            raise FolderError(f"{folder.path}: the layers of {move.rule.theirs[0]} differ in data type; give --dtype")
        rows = extra_rows if "vocab" in move.rule.shapes[0] else 0
        shape = (move.shape[0] + rows, *move.shape[1:])
        make = _maker(folder, move, groups, own, rows)
        if move.layer is None:
            slices.append(Slice(move.rule.ours, shape, (0,) * len(shape), shape, own, make))
        else:
            offset = (move.layer, *(0,) * len(shape))
            slices.append(Slice(move.rule.ours, (model.layers, *shape), offset, (1, *shape), own, make))
    return slices


def _common_dtype(folder: HuggingFaceFolder, stored: Sequence[StoredTensor], move: Move) -> torch.dtype:
    names = {part.dtype for part in stored}
    if len(names) > 1:
        raise FolderError(f"{folder.path}: {', '.join(move.theirs)} differ in data type; give --dtype")
    dtype: torch.dtype = getattr(torch, names.pop())
    return dtype


def _maker(
    folder: HuggingFaceFolder, move: Move, groups: int, dtype: torch.dtype, rows: int
) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        tensor = merge([folder.read(name) for name in move.theirs], move.rule, groups).to(dtype)
        if rows:
            mean = tensor.float().mean(dim=0, keepdim=True).to(dtype)
            tensor = torch.cat([tensor, mean.expand(rows, -1)])
        return tensor if move.layer is None else tensor[None]

    return make


class Exporter:
    """The Hugging Face tensors of one of our checkpoints, made when they are asked for.

    Attributes:
        tensors: bytes of each tensor by its name, in the order of the model.
    """

    def __init__(
        self, reader: Reader, family: Family, model: ResolvedModel, *, dtype: torch.dtype | None = None
    ) -> None:
        """Plan an export.

        Raises:
            UserError: the checkpoint lacks a tensor of its config, or one has another shape.
        """
        self._reader, self._dtype = reader, dtype
        self._groups = model.key_heads
        self._places: dict[str, tuple[Move, int]] = {}
        self.tensors: dict[str, int] = {}
        for move in moves(family, model):
            stored = self._check(move, model)
            for number, (name, shape) in enumerate(zip(move.theirs, move.shapes, strict=True)):
                self._places[name] = (move, number)
                self.tensors[name] = (dtype or stored).itemsize * torch.Size(shape).numel()
        self._newest: tuple[Move, list[torch.Tensor]] | None = None

    def _check(self, move: Move, model: ResolvedModel) -> torch.dtype:
        if move.rule.ours not in self._reader.tensors:
            raise UserError(f"the checkpoint has no {move.rule.ours}, which its config says it has")
        shape, dtype = self._reader.tensors[move.rule.ours]
        own = shape if move.layer is None else shape[1:]
        # Rows beyond the vocabulary are the padding of a tensor-parallel layout.
        is_padded = "vocab" in move.rule.shapes[0] and own[0] >= move.shape[0] and own[1:] == move.shape[1:]
        if (own != move.shape and not is_padded) or (move.layer is not None and shape[0] != model.layers):
            raise UserError(f"the checkpoint's {move.rule.ours} has shape {list(shape)}, not that of its config")
        return dtype

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the folder."""
        move, number = self._places[name]
        if self._newest is None or self._newest[0] is not move:
            shape = move.shape
            if move.layer is None:
                tensor = self._reader.read(move.rule.ours, (0,) * len(shape), shape)
            else:
                tensor = self._reader.read(move.rule.ours, (move.layer, *(0,) * len(shape)), (1, *shape))[0]
            self._newest = (move, split(tensor, move, self._groups))
        part = self._newest[1][number]
        return part.to(self._dtype or part.dtype).contiguous()


def table(family: Family, model: ResolvedModel) -> list[tuple[str, str, str, str]]:
    """The family's table for a model: our tensor, its shape, the layout, and the parts with their shapes."""
    rows: list[tuple[str, str, str, str]] = []
    for move in moves(family, model):
        if move.layer not in (None, 0):
            continue
        layers = () if move.layer is None else (model.layers,)
        parts = ", ".join(f"{name} {list(shape)}" for name, shape in zip(move.rule.theirs, move.shapes, strict=True))
        rows.append((move.rule.ours, str([*layers, *move.shape]), move.rule.layout, parts))
    return rows


def special_tokens(config: Mapping[str, object]) -> dict[str, int]:
    """The special token ids that a `config.json` gives."""
    keys = ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id")
    return {key: value for key in keys if type(value := config.get(key)) is int and value >= 0}
