"""Hugging Face folder in, run directory out, and back: what `megatron-md convert` does around the tensors.

Both directions write under a temporary name and rename at the end, so that no target ever looks complete that is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from megatron_md.checkpoint.directory import (
    CONFIG_NAME,
    FORMAT_VERSION,
    RECORD_NAME,
    checkpoint_name,
    find_checkpoint,
    model_identity,
)
from megatron_md.checkpoint.hf import original
from megatron_md.checkpoint.hf.configs import LONGEST_ROW, MOST, UnsupportedConfigError
from megatron_md.checkpoint.hf.families import Family, check_exportable
from megatron_md.checkpoint.hf.folder import FolderError, HuggingFaceFolder, write_folder
from megatron_md.checkpoint.hf.tensors import Exporter, check_folder, import_slices
from megatron_md.checkpoint.integrity import seal, verify
from megatron_md.checkpoint.safe_pickle import guarded
from megatron_md.checkpoint.storage import Slice, TensorReader, write_tensors
from megatron_md.config import DataConfig, ObjectiveConfig, ResolvedConfig, ResolvedModel, load_resolved, to_yaml
from megatron_md.errors import UserError
from megatron_md.files import sync, write_synced
from megatron_md.json_file import LARGE, read_json, read_regular
from megatron_md.train.progress import Progress

MASK_TOKEN = "<|mask|>"


@dataclass(frozen=True)
class ImportPlan:
    """What an import would write.

    Attributes:
        model: shape of the model as it will be.
        slices: its tensors.
        config: content of `config.json`.
        tokenizer: content of its tokenizer's file, or None where it has none.
        has_new_token: config and tokenizer have got a mask token that the source lacks.
    """

    model: ResolvedModel
    slices: list[Slice]
    config: bytes
    tokenizer: bytes | None
    has_new_token: bool


def plan_import(
    folder: HuggingFaceFolder, family: Family, *, dtype: torch.dtype | None = None, add_mask_token: bool = False
) -> ImportPlan:
    """Check a folder against its family and plan how its tensors become ours.

    Raises:
        UserError: the config is not supported, or the tensors are not those of the config.
    """
    try:
        model = family.read_config(folder.config)
    except (UnsupportedConfigError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder.path / 'config.json'}: not a {family.name} model that is supported: {error}"
        ) from None
    check_folder(folder, family, model)
    config = read_regular(folder.path / "config.json", "download it again")
    files = [folder.path / name for name in (original.JSON_TOKENIZER, original.SENTENCEPIECE)]
    tokenizer = next((file.read_bytes() for file in files if file.is_file()), None)
    rows = 0
    if add_mask_token:
        if not files[0].is_file():
            raise UserError(f"{files[0]}: missing; a mask token is added to the tokenizer and the weights together")
        tokenizer, token = _with_mask_token(files[0])
        rows = max(0, token + 1 - model.vocab)
        sizes = {key: model.vocab + rows for key in ("vocab_size", "embedding_size") if key in folder.config}
        config = (json.dumps({**folder.config, **sizes, "mask_token_id": token}, indent=2) + "\n").encode()
    slices = import_slices(folder, family, model, dtype=dtype, extra_rows=rows)
    return ImportPlan(replace(model, vocab=model.vocab + rows), slices, config, tokenizer, add_mask_token)


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


def run_config(plan: ImportPlan, family: Family, target: Path) -> ResolvedConfig:
    """The config of a converted run: the model, its tokenizer, and the objective that its weights were trained with."""
    tokenizer = str(target / original.RUN_TOKENIZER) if plan.tokenizer is not None else None
    objective = ObjectiveConfig(
        name="autoregressive" if family.causal else "masked_diffusion",
        mask_logit="keep",
        right_shift=family.causal or family.right_shift,
    )
    length = min(plan.model.max_length, LONGEST_ROW)
    return ResolvedConfig(
        run_dir=str(target),
        model=plan.model,
        data=DataConfig(tokenizer=tokenizer, seq_length=length),
        objective=objective,
    )


def import_folder(
    folder: HuggingFaceFolder,
    plan: ImportPlan,
    family: Family,
    target: Path,
    *,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write a run directory with one checkpoint, at step 0, that any layout can load.

    Args:
        folder: open.
        plan: as from `plan_import`.
        family: the folder's.
        target: the run directory; new.
        advance: called for every slice that is made.

    Raises:
        UserError: the target exists, or the disk is full.
    """
    config = run_config(plan, family, target)
    identity = {**model_identity(config), "objective is causal": family.causal}
    if plan.tokenizer is not None:
        identity["tokenizer"] = hashlib.sha256(plan.tokenizer).hexdigest()
    with _new_folder(target) as partial:
        checkpoint = partial / "checkpoints" / checkpoint_name(0)
        checkpoint.mkdir(parents=True)
        write_tensors(checkpoint, [replace(part, make=_counted(part.make, advance)) for part in plan.slices])
        write_synced(checkpoint / CONFIG_NAME, to_yaml(config))
        record = {
            "format": FORMAT_VERSION,
            "progress": asdict(Progress.start(config)),
            "layout": {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "data": 1},
            "optimizer": [],
            "identity": identity,
            "val_nelbo": None,
        }
        write_synced(checkpoint / RECORD_NAME, json.dumps(record, indent=1))
        seal(checkpoint)
        (partial / "checkpoints" / "latest").write_text(checkpoint.name)
        (partial / "config.yaml").write_text(to_yaml(config))
        new = plan.tokenizer if plan.has_new_token else None
        original.keep(partial, folder, family, config=plan.config, tokenizer=new)
        if plan.tokenizer is not None:
            (partial / original.RUN_TOKENIZER).write_bytes(plan.tokenizer)
            names = folder.path / original.NAMES_OF_TOKENS
            if names.is_file():
                shutil.copyfile(names, partial / names.name)


@dataclass(frozen=True)
class Export:
    """A checkpoint that can be written as a Hugging Face folder.

    Attributes:
        model: its shape.
        exporter: its tensors.
        beside: everything else.
    """

    model: ResolvedModel
    exporter: Exporter
    beside: original.Surroundings

    def write(self, target: Path, *, advance: Callable[[], None] = lambda: None) -> None:
        """Write the folder, calling `advance` for every tensor.

        Raises:
            UserError: the target exists, or the disk is full.
        """

        def read(name: str) -> torch.Tensor:
            advance()
            return self.exporter.read(name)

        with _new_folder(target) as partial:
            write_folder(
                partial,
                config=self.beside.config,
                shards=self.beside.shards,
                read=read,
                companions=self.beside.companions,
            )


@contextmanager
def open_export(
    source: Path, family: Family, *, dtype: torch.dtype | None = None, trust: bool = False
) -> Iterator[Export]:
    """Verify and open a run directory (its newest checkpoint) or a checkpoint for export.

    Where the run was converted from a folder with the same tensors, config, tokenizer and the cut into files are those.

    Raises:
        UserError: no complete checkpoint, or a model that the family cannot express.
    """
    checkpoint = source if trust and (source / RECORD_NAME).is_file() else find_checkpoint(source)
    verify(checkpoint, trust=trust)
    config = load_resolved(checkpoint / CONFIG_NAME)
    check_exportable(config, family)
    with guarded(checkpoint):
        exporter = Exporter(TensorReader(checkpoint), family, config.model, dtype=dtype)
        run = checkpoint.parent.parent
        yield Export(config.model, exporter, original.surroundings(run, config, family, exporter.tensors))


def _counted(make: Callable[[], torch.Tensor], advance: Callable[[], None]) -> Callable[[], torch.Tensor]:
    def counted() -> torch.Tensor:
        advance()
        return make()

    return counted


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when the block ends well, and is removed otherwise.

    Raises:
        FolderError: there is something of that name, or it cannot be written.
    """
    if target.exists():
        raise FolderError(f"{target}: exists already; choose another folder, or remove it")
    partial = target.with_name(f".writing_{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        os.replace(partial, target)
        sync(target.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise FolderError(f"{target}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
