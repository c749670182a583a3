"""Adapters in and out of PEFT's folders, under the names that a family's model has in Hugging Face.

Ours are kept apart for query, key, value, gate and up, as PEFT's are, so that they are copied as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_md.checkpoint.directory import AVERAGE, CONFIG_NAME, Weights, check_weights, find_checkpoint
from megatron_md.checkpoint.hf.families import FAMILIES, Family, check_exportable
from megatron_md.checkpoint.hf.model_card import CARD_NAME, model_card
from megatron_md.checkpoint.hf.peft_config import CONFIG_NAME as PEFT_CONFIG
from megatron_md.checkpoint.hf.peft_config import WEIGHTS_NAME, modules, written
from megatron_md.checkpoint.integrity import verify
from megatron_md.checkpoint.merged import check_adapters
from megatron_md.checkpoint.new_run import new_folder
from megatron_md.checkpoint.safe_pickle import guarded
from megatron_md.checkpoint.storage import TensorReader
from megatron_md.config import ResolvedConfig, load_resolved
from megatron_md.config.lora import LINEARS
from megatron_md.data.optional import optional_package
from megatron_md.errors import UserError
from megatron_md.files import sync, write_synced


def names(family: Family, config: ResolvedConfig) -> Iterator[tuple[str, str, int, str]]:
    """(tensor of PEFT, tensor of ours, layer, module of the family's model) of every factor of every adapter."""
    assert config.lora is not None, "the run has adapters"
    found = modules(family, config.lora)
    for layer in range(config.model.layers):
        for linear in LINEARS:
            for part in linear.adapted(config.lora.targets):
                module = found[part].format(layer=layer)
                for factor in ("A", "B"):
                    yield f"base_model.model.{module}.lora_{factor}.weight", linear.key(factor, part), layer, module


@dataclass(frozen=True)
class AdapterExport:
    """Adapters that can be written as a PEFT folder.

    Attributes:
        family: of the model that they are for.
        config: of the run.
        reader: of the checkpoint.
        dtype: of the tensors; as they are if None.
        card: content of README.md.
    """

    family: Family
    config: ResolvedConfig
    reader: TensorReader
    dtype: torch.dtype | None
    card: bytes

    @property
    def parts(self) -> int:
        """How often `write` calls `advance`."""
        return sum(1 for _ in names(self.family, self.config))

    def table(self) -> list[tuple[str, str, str, str]]:
        """Our tensor, its shape, the layout, and the tensor of PEFT, for the first layer."""
        return [
            (ours, str(list(self.reader.tensors[ours][0])), "plain", name)
            for name, ours, layer, _ in names(self.family, self.config)
            if layer == 0
        ]

    def write(self, target: Path, *, advance: Callable[[], None]) -> None:
        """Write the folder, calling `advance` for every tensor.

        Raises:
            UserError: the target exists, or the disk is full.
        """
        assert self.config.lora is not None, "checked when it was opened"
        safetensors = optional_package("safetensors", str(target), "convert")
        save_file = optional_package("safetensors.torch", str(target), "convert").save_file
        tensors = {}
        for name, ours, layer, _ in names(self.family, self.config):
            advance()
            _, rows, columns = self.reader.tensors[ours][0]
            tensor = self.reader.read(ours, (layer, 0, 0), (1, rows, columns))[0]
            tensors[name] = tensor.to(self.dtype or tensor.dtype).contiguous()
        content = written(self.family, self.config.lora, str(self.config.checkpoint.load))
        with new_folder(target) as partial:
            try:
                save_file(tensors, partial / WEIGHTS_NAME, metadata={"format": "pt"})
            except safetensors.SafetensorError as error:
                raise UserError(f"{target}: cannot be written ({error})") from error
            sync(partial / WEIGHTS_NAME)
            write_synced(partial / PEFT_CONFIG, json.dumps(content, indent=2) + "\n")
            write_synced(partial / CARD_NAME, self.card)


@contextmanager
def open_adapter_export(
    source: Path, family: Family, *, dtype: torch.dtype | None = None, weights: Weights = "model"
) -> Iterator[AdapterExport]:
    """Verify and open a LoRA run (its newest checkpoint) or a checkpoint of one.

    Raises:
        UserError: no complete checkpoint, none with adapters, or a model that the family cannot express.
    """
    checkpoint = find_checkpoint(source)
    verify(checkpoint)
    check_weights(checkpoint, weights)
    config = load_resolved(checkpoint / CONFIG_NAME)
    if config.lora is None:
        raise UserError(f"{checkpoint}: holds whole weights, no adapters; export them with --to hf")
    check_exportable(config, family)
    with guarded(checkpoint):
        reader = TensorReader(checkpoint, instead=AVERAGE if weights == "ema" else "")
        check_adapters(reader.tensors, config)
        card = model_card(checkpoint, config, family, weights, hf_config=None)
        yield AdapterExport(family, config, reader, dtype, card)


def load_adapters(shards: list[Any], folder: Path, config: ResolvedConfig) -> None:
    """Fill this rank's shards of adapters from a PEFT folder.

    Args:
        shards: megatron-core's `ShardedTensor`s of them.
        folder: checked by `peft_config.check_folder`.
        config: of the run.

    Raises:
        UserError: the folder has not the adapters of the config.
    """
    safetensors = optional_package("safetensors", str(folder), "convert")
    file = folder / WEIGHTS_NAME
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            tables = [{name: place for name, *place in names(family, config)} for family in FAMILIES.values()]
            stored = set(content.keys())
            table = next((table for table in tables if table.keys() == stored), None)
            if table is None:
                first = min(stored.symmetric_difference(tables[0]), default="")
                raise UserError(
                    f"lora.load: {file}: its tensors are not the adapters of lora.targets on {config.model.layers} "
                    f"layers of a model of {', '.join(FAMILIES)} ({first})"
                )
            places = {(ours, layer): name for name, (ours, layer, _) in table.items()}
            for shard in shards:
                layer, row, column = shard.global_offset
                whole = content.get_tensor(places[shard.key, layer])
                if tuple(whole.shape) != tuple(shard.global_shape[1:]):
                    raise UserError(
                        f"lora.load: {file}: {places[shard.key, layer]} has shape {list(whole.shape)}, "
                        f"and the run's {list(shard.global_shape[1:])}"
                    )
                rows, columns = shard.data.shape
                with torch.no_grad():
                    shard.data.copy_(whole[row : row + rows, column : column + columns])
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"lora.load: {file}: not a whole safetensors file ({error})") from error
