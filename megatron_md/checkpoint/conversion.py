"""Hugging Face folder in, run directory out, and back: what `megatron-md convert` does around the tensors.

Both directions write under a temporary name and rename at the end, so that no target ever looks complete that is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_md.checkpoint.bridge import Exporter, check_folder, import_slices, special_tokens
from megatron_md.checkpoint.directory import (
    CONFIG_NAME,
    FORMAT_VERSION,
    RECORD_NAME,
    checkpoint_name,
    find_checkpoint,
    model_identity,
)
from megatron_md.checkpoint.families import Family, UnsupportedConfigError, check_exportable
from megatron_md.checkpoint.hf_folder import HuggingFaceFolder, plan_shards, write_folder
from megatron_md.checkpoint.integrity import seal, verify
from megatron_md.checkpoint.safe_pickle import guarded
from megatron_md.checkpoint.storage import Slice, TensorReader, write_tensors
from megatron_md.config import Config, DataConfig, ModelConfig, ObjectiveConfig, load_config, to_yaml
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.files import sync, write_synced
from megatron_md.train.progress import Progress

ORIGINAL = "huggingface"  # folder of a converted run with the files of its source, but the weights
LONGEST_ROW = 4096
MASK_TOKEN = "<|mask|>"


@dataclass(frozen=True)
class ImportPlan:
    """What an import would write.

    Attributes:
        model: shape of the model as it will be.
        slices: its tensors.
        tokenizer: content of `tokenizer.json`, to the byte, or None where the source has none.
        tokens: special token ids by their names in `config.json`.
        extra_rows: rows that a mask token adds to the vocabulary.
    """

    model: ModelConfig
    slices: list[Slice]
    tokenizer: bytes | None
    tokens: dict[str, int]
    extra_rows: int


def plan_import(
    folder: HuggingFaceFolder, family: Family, *, dtype: torch.dtype | None = None, add_mask_token: bool = False
) -> ImportPlan:
    """Check a folder against its family and plan how its tensors become ours.

    Raises:
        ValueError: the config is not supported, or the tensors are not those of the config.
    """
    try:
        model = family.read_config(folder.config)
    except (UnsupportedConfigError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.path / 'config.json'}: not a {family.name} model that is supported: {error}"
        ) from None
    check_folder(folder, family, model)
    tokens = special_tokens(folder.config)
    path = folder.path / "tokenizer.json"
    tokenizer = path.read_bytes() if path.is_file() else None
    rows = 0
    if add_mask_token:
        if tokenizer is None:
            raise ValueError(f"{path}: missing; a mask token is added to the tokenizer and the weights together")
        tokenizer, tokens["mask_token_id"] = _with_mask_token(path, tokenizer)
        assert model.vocab is not None
        rows = max(0, tokens["mask_token_id"] + 1 - model.vocab)
    slices = import_slices(folder, family, model, dtype=dtype, extra_rows=rows)
    return ImportPlan(replace(model, vocab=(model.vocab or 0) + rows), slices, tokenizer, tokens, rows)


def _with_mask_token(path: Path, text: bytes) -> tuple[bytes, int]:
    """A tokenizer.json with a mask token behind its last one, and the id of that."""
    try:
        content = json.loads(text)
        added = content["added_tokens"]
        ids = [*content["model"]["vocab"].values(), *(token["id"] for token in added)]
        if any(token["content"] == MASK_TOKEN for token in added):
            raise ValueError(f"{path}: has the token {MASK_TOKEN} already; leave out --add-mask-token")
        token = {"id": max(ids) + 1, "content": MASK_TOKEN, "special": True}
        added.append({**token, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)})
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a tokenizer.json of a kind that a token can be added to") from error
    return json.dumps(content, ensure_ascii=False, indent=2).encode(), int(str(token["id"]))


def run_config(plan: ImportPlan, family: Family, target: Path) -> Config:
    """The config of a converted run: the model, its tokenizer, and the objective that its weights were trained with."""
    tokenizer = str(target / "tokenizer.model") if plan.tokenizer is not None else None
    objective = ObjectiveConfig(
        name="autoregressive" if family.causal else "masked_diffusion",
        mask_logit="keep",
        right_shift=family.causal or family.right_shift,
    )
    length = min(plan.model.max_length or LONGEST_ROW, LONGEST_ROW)
    return Config(
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
        ValueError: the target exists.
        OSError: the disk is full.
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
        _keep_original(folder, plan, partial / ORIGINAL)
        if plan.tokenizer is not None:
            (partial / "tokenizer.model").write_bytes(plan.tokenizer)
            names = folder.path / "tokenizer_config.json"
            if names.is_file():
                shutil.copyfile(names, partial / names.name)


def _keep_original(folder: HuggingFaceFolder, plan: ImportPlan, directory: Path) -> None:
    """Keep what an export needs to give back the very same folder."""
    directory.mkdir()
    for file in folder.companions():
        shutil.copyfile(file, directory / file.name)
    if plan.tokenizer is not None:
        (directory / "tokenizer.json").write_bytes(plan.tokenizer)
    source = (folder.path / "config.json").read_bytes()
    if plan.extra_rows or plan.tokens != special_tokens(folder.config):
        changed = {**folder.config, **plan.tokens, "vocab_size": plan.model.vocab}
        source = (json.dumps(changed, indent=2) + "\n").encode()
    (directory / "config.json").write_bytes(source)
    (directory / "shards.json").write_text(json.dumps(folder.shards(), indent=1))


@dataclass(frozen=True)
class Export:
    """A checkpoint that can be written as a Hugging Face folder.

    Attributes:
        model: its shape.
        exporter: its tensors.
        content: of `config.json`.
        shards: the tensors of each weight file.
        companions: files that travel with the weights.
    """

    model: ModelConfig
    exporter: Exporter
    content: Mapping[str, Any] | bytes
    shards: Mapping[str, list[str]]
    companions: Sequence[Path]

    def write(self, target: Path, *, advance: Callable[[], None] = lambda: None) -> None:
        """Write the folder, calling `advance` for every tensor.

        Raises:
            ValueError: the target exists.
            OSError: the disk is full.
        """

        def read(name: str) -> torch.Tensor:
            advance()
            return self.exporter.read(name)

        with _new_folder(target) as partial:
            write_folder(partial, config=self.content, shards=self.shards, read=read, companions=self.companions)


@contextmanager
def open_export(
    source: Path, family: Family, *, dtype: torch.dtype | None = None, trust: bool = False
) -> Iterator[Export]:
    """Verify and open a run directory (its newest checkpoint) or a checkpoint for export.

    Where the run was converted from a folder with the same tensors, config, tokenizer and the cut into files are those.

    Raises:
        ValueError: no complete checkpoint, or a model that the family cannot express.
    """
    checkpoint = source if trust and (source / RECORD_NAME).is_file() else find_checkpoint(source)
    verify(checkpoint, trust=trust)
    config = load_config(checkpoint / CONFIG_NAME)
    if config.model.vocab is None:
        raise ValueError(f"{checkpoint / CONFIG_NAME}: model.vocab is missing")
    check_exportable(config.model, family)
    with guarded(checkpoint):
        exporter = Exporter(TensorReader(checkpoint), family, config.model, dtype=dtype)
        yield Export(config.model, exporter, *_folder_content(checkpoint.parent.parent, config, family, exporter))


def _folder_content(
    run: Path, config: Config, family: Family, exporter: Exporter
) -> tuple[Mapping[str, Any] | bytes, Mapping[str, list[str]], Sequence[Path]]:
    """config.json, the weight files and the files beside them."""
    length = config.model.max_length or config.data.seq_length
    original, planned = run / ORIGINAL, plan_shards(exporter.tensors)
    if original.is_dir():
        shards: dict[str, list[str]] = json.loads((original / "shards.json").read_text())
        files = [path for path in sorted(original.iterdir()) if path.name not in ("config.json", "shards.json")]
        if {name for names in shards.values() for name in names} == set(exporter.tensors):
            return (original / "config.json").read_bytes(), shards, files
        kept = special_tokens(json.loads((original / "config.json").read_text()))
        return family.write_config(config.model, kept, length), planned, files
    file = next((path for path in (run / "tokenizer.model", Path(config.data.tokenizer or "")) if path.is_file()), None)
    if file is None:
        return family.write_config(config.model, {}, length), planned, []
    tokenizer = Tokenizer(file)
    ids = {key: getattr(tokenizer, key) for key in ("mask_token_id", "eos_token_id", "pad_token_id")}
    return family.write_config(config.model, ids, length), planned, [file]


def _counted(make: Callable[[], torch.Tensor], advance: Callable[[], None]) -> Callable[[], torch.Tensor]:
    def counted() -> torch.Tensor:
        advance()
        return make()

    return counted


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when the block ends well, and is removed otherwise.

    Raises:
        ValueError: there is something of that name.
    """
    if target.exists():
        raise ValueError(f"{target}: exists already; choose another folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".writing_{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
