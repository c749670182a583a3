"""Adapters and the weights that they belong to, read as whole weights: W + alpha / rank * B A, computed in fp32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_md.checkpoint.base import recorded_base
from megatron_md.checkpoint.directory import AVERAGE, CONFIG_NAME, Weights, check_weights, find_checkpoint
from megatron_md.checkpoint.integrity import verify
from megatron_md.checkpoint.new_run import Advance, write_successor
from megatron_md.checkpoint.safe_pickle import guarded
from megatron_md.checkpoint.storage import Reader, Slice, TensorReader
from megatron_md.config import LoraConfig, ResolvedConfig, load_resolved
from megatron_md.config.lora import LINEARS, AdaptedLinear, part_sizes
from megatron_md.errors import UserError


class MergedReader:
    """Whole weights from a base and adapters on it.

    Attributes:
        tensors: shape and data type of each tensor by its name.
    """

    def __init__(
        self, base: Reader, adapters: Reader, config: ResolvedConfig, *, dtype: torch.dtype | None = None
    ) -> None:
        """Put them together.

        Args:
            base: the weights.
            adapters: checkpoint of a run with adapters.
            config: of that run.
            dtype: of the merged weights; None rounds to the base's.

        Raises:
            UserError: the checkpoint lacks an adapter of its config, or one has another shape.
        """
        assert config.lora is not None, "a checkpoint with adapters says which"
        self.tensors = base.tensors
        self._base, self._adapters, self._dtype = base, adapters, dtype
        self._keys: LoraConfig = config.lora
        self._sizes, self._groups = part_sizes(config.model), config.model.key_heads
        self._linears = {linear.weight: linear for linear in LINEARS if linear.adapted(config.lora.targets)}
        check_adapters(adapters.tensors, config)

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """A slice [1, rows, columns] of a stacked weight, or of anything else."""
        weight = self._base.read(name, offset, size)
        dtype = self._dtype or weight.dtype
        if name not in self._linears:
            return weight.to(dtype)
        assert size[0] == 1, "one layer at a time"
        change = self._change(self._linears[name], offset[0])
        _, row, column = offset
        part = change[row : row + size[1], column : column + size[2]]
        return (weight.float() + part).to(dtype)

    def _change(self, linear: AdaptedLinear, layer: int) -> torch.Tensor:
        """What is added to a layer's fused weight, fp32 [out, in]."""
        parts = []
        for part in linear.parts:
            inputs, outputs = self._sizes[part]
            if part not in linear.adapted(self._keys.targets):
                parts.append(torch.zeros(outputs, inputs))
                continue
            factor_a = self._adapters.read(linear.key("A", part), (layer, 0, 0), (1, self._keys.rank, inputs))[0]
            factor_b = self._adapters.read(linear.key("B", part), (layer, 0, 0), (1, outputs, self._keys.rank))[0]
            parts.append(factor_b.float() @ factor_a.float() * (self._keys.alpha / self._keys.rank))
        if linear.name == "qkv":  # query group by query group
            return torch.cat([part.unflatten(0, (self._groups, -1)) for part in parts], dim=1).flatten(0, 1)
        return torch.cat(parts)


def adapter_shapes(config: ResolvedConfig) -> Iterable[tuple[str, tuple[int, int, int]]]:
    """Name and shape of each tensor that a checkpoint of a run with adapters holds, layers stacked."""
    assert config.lora is not None, "the run has adapters"
    layers, rank, sizes = config.model.layers, config.lora.rank, part_sizes(config.model)
    for linear in LINEARS:
        for part in linear.adapted(config.lora.targets):
            inputs, outputs = sizes[part]
            yield linear.key("A", part), (layers, rank, inputs)
            yield linear.key("B", part), (layers, outputs, rank)


def check_adapters(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], config: ResolvedConfig) -> None:
    """Check that a checkpoint has the adapters of its config.

    Raises:
        UserError: it lacks one, or one has another shape.
    """
    for name, shape in adapter_shapes(config):
        if name not in tensors or tensors[name][0] != shape:
            raise UserError(f"the checkpoint has no {name} of shape {list(shape)}, which its config says it has")


def open_reader(
    checkpoint: Path, config: ResolvedConfig, *, dtype: torch.dtype | None = None, weights: Weights = "model"
) -> Reader:
    """The whole weights of a verified checkpoint, its adapters merged with their base if it holds adapters.

    Raises:
        UserError: the base is not where it was, has changed or is damaged.
    """
    own = TensorReader(checkpoint, instead=AVERAGE if weights == "ema" else "")
    base = recorded_base(checkpoint)
    if base is None:
        return own
    verify(base.path)
    with guarded(base.path):
        return MergedReader(TensorReader(base.path), own, config, dtype=dtype)


@dataclass(frozen=True)
class Merge:
    """A LoRA run that can be written as a run with whole weights.

    Attributes:
        checkpoint: with the adapters.
        config: of the run.
        slices: the merged weights.
    """

    checkpoint: Path
    config: ResolvedConfig
    slices: list[Slice]

    @property
    def parts(self) -> int:
        """How often `write` calls `advance`."""
        return len(self.slices)

    def table(self) -> list[tuple[str, str, str, str]]:
        """The weights that adapters change: our tensor, its shape, `adapted`, and the factors."""
        assert self.config.lora is not None, "checked when it was opened"
        shapes = {part.name: part.shape for part in self.slices}
        return [
            (
                linear.weight,
                str(list(shapes[linear.weight])),
                "adapted",
                ", ".join(f"B_{part} A_{part}" for part in parts),
            )
            for linear in LINEARS
            if (parts := linear.adapted(self.config.lora.targets))
        ]

    def write(self, target: Path, *, advance: Advance) -> None:
        """Write a run directory with one checkpoint, at step 0, that any layout can load.

        Raises:
            UserError: the target exists, or the disk is full.
        """
        write_successor(target, self.checkpoint, self.config, self.slices, advance)


@contextmanager
def open_merge(source: Path, *, dtype: torch.dtype | None = None, weights: Weights = "model") -> Iterator[Merge]:
    """Verify and open a LoRA run (its newest checkpoint) or a checkpoint of one, to be merged with its base.

    Raises:
        UserError: no complete checkpoint, or none with adapters.
    """
    checkpoint = find_checkpoint(source)
    verify(checkpoint)
    check_weights(checkpoint, weights)
    config = load_resolved(checkpoint / CONFIG_NAME)
    if config.lora is None:
        raise UserError(f"{source}: a run with whole weights already; --to megatron takes folders of Hugging Face")
    with guarded(checkpoint):
        reader = open_reader(checkpoint, config, dtype=dtype, weights=weights)
        yield Merge(checkpoint, config, list(_slices(reader, dtype)))


def _slices(reader: Reader, dtype: torch.dtype | None) -> Iterator[Slice]:
    for name, (shape, stored) in reader.tensors.items():
        if name.startswith("optimizer."):
            continue
        layers = range(shape[0]) if name.startswith("decoder.layers.") else (None,)
        for layer in layers:
            offset = tuple(0 for _ in shape) if layer is None else (layer, *(0 for _ in shape[1:]))
            size = shape if layer is None else (1, *shape[1:])
            make = partial(reader.read, name, offset, size)
            yield Slice(name, shape, offset, size, dtype or stored, make)
