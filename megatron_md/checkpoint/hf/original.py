"""What lies beside the weights of a Hugging Face folder: kept by a converted run, handed on, and given back.

RUN/huggingface holds the source's config.json, its tokenizer and code files and how its tensors were cut into files, as
data: nothing in it is run. A run that starts from a converted one inherits it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_md import run_files
from megatron_md.checkpoint.hf.families import Family
from megatron_md.checkpoint.hf.folder import HuggingFaceFolder, plan_shards
from megatron_md.checkpoint.hf.tensors import special_tokens
from megatron_md.config import ResolvedConfig
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.data.tokenizer_json import CONFIG_NAME as NAMES_OF_TOKENS
from megatron_md.errors import UserError
from megatron_md.json_file import LARGE, as_record, read_json

JSON_TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_RECORD = "source.json"  # the family, and the tensors of each weight file


@dataclass(frozen=True)
class Surroundings:
    """A folder without its weights.

    Attributes:
        config: content of `config.json`.
        shards: the tensors of each weight file.
        companions: content of the other files, by name.
    """

    config: bytes
    shards: Mapping[str, list[str]]
    companions: Mapping[str, bytes]


@dataclass(frozen=True)
class _Source:
    """The content of `source.json`."""

    family: str
    shards: dict[str, list[str]]


def keep(run: Path, folder: HuggingFaceFolder, family: Family, *, config: bytes, tokenizer: bytes | None) -> None:
    """Keep in a run what an export needs to give back the very same folder.

    Args:
        run: the run directory.
        folder: the source.
        family: its family.
        config: content of its `config.json`.
        tokenizer: content of its `tokenizer.json`, where that is not the source's any more.
    """
    directory = run / run_files.ORIGINAL
    directory.mkdir()
    for file in folder.companions():
        shutil.copyfile(file, directory / file.name)
    if tokenizer is not None:
        (directory / JSON_TOKENIZER).write_bytes(tokenizer)
    (directory / "config.json").write_bytes(config)
    (directory / _RECORD).write_text(json.dumps({"family": family.name, "shards": folder.shards()}, indent=1))


def hand_on(source: Path, target: Path) -> None:
    """Give a run what the run that it starts from keeps of its Hugging Face folder, if that is anything."""
    if (source / run_files.ORIGINAL).is_dir():
        shutil.copytree(source / run_files.ORIGINAL, target / run_files.ORIGINAL, dirs_exist_ok=True)


def surroundings(run: Path, config: ResolvedConfig, family: Family, sizes: Mapping[str, int]) -> Surroundings:
    """What to write beside the weights of a run: the original's files as far as they are still true of it.

    Args:
        run: the run directory.
        config: its config.
        family: the folder's.
        sizes: bytes of each tensor by its name.

    Raises:
        UserError: what the run keeps of the original is damaged.
    """
    original = run / run_files.ORIGINAL
    if original.is_dir() and _has_same_tokenizer(run, original):
        name, shards, kept = _read(original)
        files = {path.name: path.read_bytes() for path in sorted(original.iterdir()) if path.name != _RECORD}
        source = files.pop("config.json")
        has_same_tensors = {tensor for names in shards.values() for tensor in names} == set(sizes)
        if name == family.name and has_same_tensors and _is_same_model(config, family, kept):
            return Surroundings(source, shards, files)
        return Surroundings(_written(config, family, special_tokens(kept)), plan_shards(sizes), files)
    file = next(
        (path for path in (run / run_files.TOKENIZER, Path(config.data.tokenizer or "")) if path.is_file()), None
    )
    if file is None:
        return Surroundings(_written(config, family, {}), plan_shards(sizes), {})
    tokenizer = Tokenizer(file)
    ids = {key: getattr(tokenizer, key) for key in ("mask_token_id", "eos_token_id", "pad_token_id")}
    return Surroundings(_written(config, family, ids), plan_shards(sizes), _tokenizer_files(file))


def _read(original: Path) -> tuple[str, dict[str, list[str]], dict[str, Any]]:
    """Family, cut into files and `config.json` of an original."""
    way_out = f"remove {original} to export with a new config.json"
    record = read_json(original / _RECORD, way_out, most_bytes=LARGE)
    source = as_record(_Source, record, original / _RECORD, way_out)
    if any(Path(name).name != name for name in source.shards):
        raise UserError(f"{original / _RECORD}: names files of other folders; {way_out}")
    return source.family, source.shards, read_json(original / "config.json", way_out)


def _has_same_tokenizer(run: Path, original: Path) -> bool:
    own = run / run_files.TOKENIZER
    files = [original / name for name in (JSON_TOKENIZER, SENTENCEPIECE)]
    return not own.is_file() or any(file.is_file() and file.read_bytes() == own.read_bytes() for file in files)


def _is_same_model(config: ResolvedConfig, family: Family, kept: Mapping[str, Any]) -> bool:
    """Whether a kept `config.json` of the family is still true: a run may have gone on with another rope_theta."""
    before = family.read_config(kept)
    now = replace(config.model, init_std=before.init_std)
    if family.in_blocks and kept.get("block_size") != config.objective.final_block_size:
        return False
    same_length = not config.model.is_length_given or config.model.max_length == before.max_length
    return same_length and family.write_config(now, {}, before.max_length) == family.write_config(
        before, {}, before.max_length
    )


def _written(config: ResolvedConfig, family: Family, tokens: Mapping[str, int]) -> bytes:
    size = config.objective.final_block_size
    keys = {**tokens, "block_size": size} if size is not None else tokens
    content = family.write_config(config.model, keys, config.model.max_length)
    return (json.dumps(content, indent=2) + "\n").encode()


def _tokenizer_files(file: Path) -> dict[str, bytes]:
    """The files of a run's tokenizer under the names that Hugging Face looks for."""
    data = file.read_bytes()
    if not data.lstrip().startswith(b"{"):
        return {SENTENCEPIECE: data}
    names = file.with_name(NAMES_OF_TOKENS)
    tokens = read_json(names, "remove it, or restore it") if names.exists() else {}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    return {JSON_TOKENIZER: data, NAMES_OF_TOKENS: (json.dumps(content, indent=2) + "\n").encode()}
