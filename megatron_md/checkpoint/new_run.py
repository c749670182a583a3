"""A run directory with one checkpoint of weights that any layout can load, written without a model; and new folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron_md import run_files
from megatron_md.checkpoint.directory import CONFIG_NAME, FORMAT_VERSION, RECORD_NAME, checkpoint_name, read_record
from megatron_md.checkpoint.hf import original
from megatron_md.checkpoint.hf.folder import FolderError
from megatron_md.checkpoint.integrity import seal
from megatron_md.checkpoint.storage import Slice, write_tensors
from megatron_md.config import ResolvedConfig, to_yaml
from megatron_md.files import sync, write_synced
from megatron_md.train.progress import Progress

Advance = Callable[[], None]


def counted(slices: Sequence[Slice], advance: Advance) -> list[Slice]:
    """The same slices, each of which calls `advance` when it is made."""

    def telling(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def told() -> torch.Tensor:
            advance()
            return make()

        return told

    return [replace(part, make=telling(part.make)) for part in slices]


def write_run(
    directory: Path,
    config: ResolvedConfig,
    identity: Mapping[str, Any],
    slices: Sequence[Slice],
    *,
    progress: Progress | None = None,
    **more: Any,
) -> None:
    """Write RUN/config.yaml and a sealed checkpoint.

    Args:
        directory: of the run; exists.
        config: of the run.
        identity: what a run must agree on with its weights.
        slices: parts that make up its weights.
        progress: where the weights stand; at step 0 if None.
        more: what else the checkpoint records.

    Raises:
        OSError: the disk is full.
    """
    progress = progress or Progress.start(config)
    record = {
        "format": FORMAT_VERSION,
        "progress": asdict(progress),
        "layout": {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "data": 1},
        "optimizer": [],
        "identity": identity,
        "val_nelbo": None,
        **more,
    }
    checkpoint = directory / run_files.CHECKPOINTS / checkpoint_name(progress.step)
    checkpoint.mkdir(parents=True)
    write_tensors(checkpoint, slices)
    write_synced(checkpoint / CONFIG_NAME, to_yaml(config))
    write_synced(checkpoint / RECORD_NAME, json.dumps(record, indent=1))
    seal(checkpoint)
    (directory / run_files.CHECKPOINTS / run_files.LATEST).write_text(checkpoint.name)
    (directory / run_files.CONFIG).write_text(to_yaml(config))


def write_successor(
    target: Path, checkpoint: Path, config: ResolvedConfig, slices: Sequence[Slice], advance: Advance, **keys: Any
) -> None:
    """Write a run with whole weights that were made from a run's checkpoint; it has that run's tokenizer.

    Args:
        target: the new run's directory.
        checkpoint: of the other run.
        config: of the other run.
        slices: the weights.
        advance: called for every slice that is made.
        keys: of `write_run`.

    Raises:
        UserError: the target exists, or the disk is full.
    """
    run, identity = checkpoint.parent.parent, read_record(checkpoint)["identity"]
    kept = {key: value for key, value in identity.items() if key.startswith(("model.", "tokenizer", "objective"))}
    tokenizer = run / run_files.TOKENIZER
    own = str(target / tokenizer.name) if tokenizer.is_file() else config.data.tokenizer
    config = replace(
        config,
        run_dir=str(target),
        lora=None,
        checkpoint=replace(config.checkpoint, load=None, load_only=None),
        data=replace(config.data, tokenizer=own),
    )
    with new_folder(target) as folder:
        write_run(folder, config, kept, counted(slices, advance), **keys)
        original.hand_on(run, folder)
        for name in (run_files.TOKENIZER, original.NAMES_OF_TOKENS):
            if (run / name).is_file():
                shutil.copyfile(run / name, folder / name)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
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
