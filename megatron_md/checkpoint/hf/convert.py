"""Hugging Face folder in, run directory out, and back: what `megatron-md convert` does around the tensors.

Both directions write under a temporary name and rename at the end, so that no target ever looks complete that is not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_md import run_files
from megatron_md.checkpoint.contract import model_identity
from megatron_md.checkpoint.directory import CONFIG_NAME, RECORD_NAME, Weights, check_weights, find_checkpoint
from megatron_md.checkpoint.hf import original
from megatron_md.checkpoint.hf.configs import LONGEST_ROW, MOST, read_block_size
from megatron_md.checkpoint.hf.families import Direction, Family, check_asked, check_exportable, is_run
from megatron_md.checkpoint.hf.folder import HuggingFaceFolder, write_folder
from megatron_md.checkpoint.hf.model_card import CARD_NAME, model_card
from megatron_md.checkpoint.hf.peft import AdapterExport, open_adapter_export
from megatron_md.checkpoint.hf.tensors import Exporter, check_folder, import_slices, table
from megatron_md.checkpoint.integrity import verify
from megatron_md.checkpoint.merged import Merge, open_merge, open_reader
from megatron_md.checkpoint.new_run import Advance, counted, new_folder, write_run
from megatron_md.checkpoint.safe_pickle import guarded
from megatron_md.checkpoint.storage import Slice
from megatron_md.config import DataConfig, ObjectiveConfig, ResolvedConfig, ResolvedModel, load_resolved
from megatron_md.errors import UserError
from megatron_md.json_file import LARGE, read_json, read_regular

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASK_TOKEN = "<|mask|>"


def _pass() -> None:
    """No progress to show."""


@dataclass(frozen=True)
class Import:
    """A Hugging Face folder that can be written as a run.

    Attributes:
        folder: open.
        family: its family.
        model: shape of the model as it will be.
        slices: its tensors.
        config: content of `config.json`.
        tokenizer: content of its tokenizer's file, or None where it has none.
        has_new_token: config and tokenizer have got a mask token that the source lacks.
        block_size: of a block model; None: it is none.
    """

    folder: HuggingFaceFolder
    family: Family
    model: ResolvedModel
    slices: list[Slice]
    config: bytes
    tokenizer: bytes | None
    has_new_token: bool
    block_size: int | None = None

    @property
    def parts(self) -> int:
        """How often `write` calls `advance`."""
        return len(self.slices)

    def table(self) -> list[tuple[str, str, str, str]]:
        """As `tensors.table`."""
        return table(self.family, self.model)

    def write(self, target: Path, *, advance: Advance = _pass) -> None:
        """Write a run directory with one checkpoint, at step 0, that any layout can load.

        Args:
            target: the run directory; new.
            advance: called for every slice that is made.

        Raises:
            UserError: the target exists, or the disk is full.
        """
        config = self._run_config(target)
        identity = {**model_identity(config), "objective is causal": self.family.causal}
        if self.tokenizer is not None:
            identity["tokenizer"] = hashlib.sha256(self.tokenizer).hexdigest()
        with new_folder(target) as partial:
            write_run(partial, config, identity, counted(self.slices, advance))
            new = self.tokenizer if self.has_new_token else None
            original.keep(partial, self.folder, self.family, config=self.config, tokenizer=new)
            if self.tokenizer is not None:
                (partial / run_files.TOKENIZER).write_bytes(self.tokenizer)
                names = self.folder.path / original.NAMES_OF_TOKENS
                if names.is_file():
                    shutil.copyfile(names, partial / names.name)

    def _run_config(self, target: Path) -> ResolvedConfig:
        """The model, its tokenizer, and the objective that its weights were trained with."""
        causal, size = self.family.causal, self.block_size or 1
        longest = min(self.model.max_length, LONGEST_ROW)
        return ResolvedConfig(
            run_dir=str(target),
            model=self.model,
            data=DataConfig(
                tokenizer=None if self.tokenizer is None else str(target / run_files.TOKENIZER),
                seq_length=max(size, longest - longest % size),  # of whole blocks
            ),
            objective=ObjectiveConfig(
                name="autoregressive" if causal else "block_diffusion" if self.block_size else "masked_diffusion",
                block_size=self.block_size,
                mask_logit="keep",
                right_shift=causal or self.family.right_shift,
            ),
        )


@contextmanager
def open_import(
    source: Path,
    family: Family,
    *,
    dtype: torch.dtype | None = None,
    add_mask_token: bool = False,
    block_size: int | None = None,
) -> Iterator[Import]:
    """Open a folder, check it against its family, and plan how its tensors become ours.

    Raises:
        UserError: the config is not supported, or the tensors are not those of the config.
    """
    with HuggingFaceFolder(source) as folder:
        try:
            model = family.read_config(folder.config)
            size = read_block_size(folder.config, block_size, model.max_length) if family.in_blocks else None
        except (TypeError, ValueError) as error:
            raise UserError(f"{source / 'config.json'}: not a {family.name} model that is supported: {error}") from None
        check_folder(folder, family, model)
        config = read_regular(source / "config.json", "download it again")
        files = [source / name for name in (original.JSON_TOKENIZER, original.SENTENCEPIECE)]
        tokenizer = next((file.read_bytes() for file in files if file.is_file()), None)
        new_keys = {} if size is None else {"block_size": size}
        rows = 0
        if add_mask_token:
            if not files[0].is_file():
                raise UserError(f"{files[0]}: missing; a mask token is added to the tokenizer and the weights together")
            tokenizer, token = _with_mask_token(files[0])
            rows = max(0, token + 1 - model.vocab)
            new_keys |= {key: model.vocab + rows for key in ("vocab_size", "embedding_size") if key in folder.config}
            new_keys["mask_token_id"] = token
        if not new_keys.items() <= folder.config.items():
            config = (json.dumps({**folder.config, **new_keys}, indent=2) + "\n").encode()
        slices = import_slices(folder, family, model, dtype=dtype, extra_rows=rows)
        model = replace(model, vocab=model.vocab + rows)
        yield Import(folder, family, model, slices, config, tokenizer, add_mask_token, size)


def _with_mask_token(path: Path) -> tuple[bytes, int]:
    """A tokenizer.json with a mask token behind its last one, and the id of that."""
    content = read_json(path, "download it again", most_bytes=LARGE)
    try:
        added = content["added_tokens"]
        ids = [*content["model"]["vocab"].values(), *(token["id"] for token in added)]
        if any(token["content"] == MASK_TOKEN for token in added):
            raise UserError(f"{path}: has the token {MASK_TOKEN} already; leave out --add-mask-token")
        if not all(type(id) is int and 0 <= id < MOST for id in ids):
            raise UserError(f"{path}: an id of its tokens is no whole number from 0 to {MOST - 1}; download it again")
        token = {"id": max(ids) + 1, "content": MASK_TOKEN, "special": True}
        added.append({**token, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a tokenizer.json of a kind that a token can be added to") from error
    return json.dumps(content, ensure_ascii=False, indent=2).encode(), int(str(token["id"]))


@dataclass(frozen=True)
class Export:
    """A checkpoint that can be written as a Hugging Face folder.

    Attributes:
        family: the folder's.
        model: its shape.
        exporter: its tensors.
        beside: everything else.
    """

    family: Family
    model: ResolvedModel
    exporter: Exporter
    beside: original.Surroundings

    @property
    def parts(self) -> int:
        """How often `write` calls `advance`."""
        return len(self.exporter.tensors)

    def table(self) -> list[tuple[str, str, str, str]]:
        """As `tensors.table`."""
        return table(self.family, self.model)

    def write(self, target: Path, *, advance: Advance = _pass) -> None:
        """Write the folder, calling `advance` for every tensor.

        Raises:
            UserError: the target exists, or the disk is full.
        """

        def read(name: str) -> torch.Tensor:
            advance()
            return self.exporter.read(name)

        with new_folder(target) as partial:
            write_folder(
                partial,
                config=self.beside.config,
                shards=self.beside.shards,
                read=read,
                companions=self.beside.companions,
            )


@contextmanager
def open_export(
    source: Path,
    family: Family,
    *,
    dtype: torch.dtype | None = None,
    trust: bool = False,
    weights: Weights = "model",
) -> Iterator[Export]:
    """Verify and open a run directory (its newest checkpoint) or a checkpoint for export.

    Adapters are merged with the weights that they belong to. Where the run was converted from a folder with the same
    tensors, config, tokenizer and the cut into files are those.

    Raises:
        UserError: no complete checkpoint, or a model that the family cannot express.
    """
    checkpoint = source if trust and (source / RECORD_NAME).is_file() else find_checkpoint(source)
    verify(checkpoint, trust=trust)
    check_weights(checkpoint, weights)
    config = load_resolved(checkpoint / CONFIG_NAME)
    check_exportable(config, family)
    with guarded(checkpoint):
        reader = open_reader(checkpoint, config, dtype=dtype, weights=weights)
        exporter = Exporter(reader, family, config.model, dtype=dtype)
        beside = original.surroundings(checkpoint.parent.parent, config, family, exporter.tensors)
        card = model_card(checkpoint, config, family, weights, hf_config=beside.config)
        # A card that its owner has put beside the kept files stays as it is.
        yield Export(family, config.model, exporter, replace(beside, companions={CARD_NAME: card, **beside.companions}))


def open_conversion(
    source: str | Path,
    *,
    family: str | None = None,
    to: Direction,
    dtype: Dtype | None = None,
    add_mask_token: bool = False,
    block_size: int | None = None,
    trust: bool = False,
    weights: Weights = "model",
) -> AbstractContextManager[Import | Export | AdapterExport | Merge]:
    """Check a source of the family of this name, and open it for its conversion; for the arguments see `convert`.

    Raises:
        UserError: it cannot be converted.
    """
    source = Path(source)
    kind = check_asked(source, None, family, to, add_mask_token=add_mask_token, block_size=block_size)
    torch_dtype = DTYPES[dtype] if dtype else None
    if to == "megatron" and is_run(source):
        return open_merge(source, dtype=torch_dtype, weights=weights)
    assert kind is not None, "checked"
    if to == "hf":
        return open_export(source, kind, dtype=torch_dtype, trust=trust, weights=weights)
    if to == "peft":
        return open_adapter_export(source, kind, dtype=torch_dtype, weights=weights)
    return open_import(source, kind, dtype=torch_dtype, add_mask_token=add_mask_token, block_size=block_size)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    family: str | None = None,
    to: Direction,
    dtype: Dtype | None = None,
    add_mask_token: bool = False,
    block_size: int | None = None,
    trust: bool = False,
    weights: Weights = "model",
    verify: bool = False,
    progress: Callable[[int], AbstractContextManager[Advance]] = lambda parts: nullcontext(_pass),
    tell: Callable[[str], None] = print,
) -> Path:
    """Convert a Hugging Face folder into a run at step 0, or a run or checkpoint into a Hugging Face folder.

    Adapters are merged with their weights either way; `peft` alone keeps them apart.

    Args:
        source: what to convert.
        target: new.
        family: llada, dream, llama, qwen2, qwen3 or sdar; None merges the adapters of a run `to` megatron.
        to: the direction; peft writes the adapters of a run alone.
        dtype: data type of the weights; as they are if None.
        add_mask_token: add a mask token to a causal model's vocabulary; towards `megatron` only.
        block_size: of a block model whose `config.json` does not say; towards `megatron` only.
        trust: open a checkpoint that has no manifest to verify it by.
        weights: of a run, `ema` takes the average of the weights, in their data type.
        verify: compare the logits of both sides (needs transformers).
        progress: given the number of tensors, a context that yields what is called for each of them.
        tell: takes a line on what has been written, and those of the comparison.

    Returns:
        The target.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    source, target = Path(source), Path(target)
    asked: dict[str, Any] = {"add_mask_token": add_mask_token, "block_size": block_size, "weights": weights}
    kind = check_asked(source, target, family, to, **asked)
    if verify and (kind is None or to == "peft"):
        raise UserError("--verify compares a run with a folder of whole weights; leave it out")
    ready = open_conversion(source, family=family, to=to, dtype=dtype, trust=trust, **asked)
    with ready as conversion, progress(conversion.parts) as advance:
        conversion.write(target, advance=advance)
    if to == "megatron":
        tell(f"{target}: a run at step 0; train from it with checkpoint.load={target} checkpoint.load_only=model")
    elif to == "peft":
        tell(f"{target}: adapters for a {family} model, as PEFT reads them")
    else:
        tell(f"{target}: a {family} folder of Hugging Face")
    if verify and kind is not None:
        from megatron_md.checkpoint.hf.verify import compare_logits  # megatron-core, which nothing else here needs

        for line in compare_logits(*((target, source) if to == "hf" else (source, target)), kind, weights):
            tell(line)
    return target
