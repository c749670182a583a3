"""A run directory with one checkpoint at step 0 that any layout can load, written without a model; and new folders."""

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
from megatron_md.checkpoint.directory import CONFIG_NAME, FORMAT_VERSION, RECORD_NAME, checkpoint_name
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


def write_run(directory: Path, config: ResolvedConfig, identity: Mapping[str, Any], slices: Sequence[Slice]) -> None:
    """Write RUN/config.yaml and a sealed checkpoint at step 0.

    Args:
        directory: of the run; exists.
        config: of the run.
        identity: what a run must agree on with its weights.
        slices: parts that make up its weights.

    Raises:
        OSError: the disk is full.
    """
    record = {
        "format": FORMAT_VERSION,
        "progress": asdict(Progress.start(config)),
        "layout": {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "data": 1},
        "optimizer": [],
        "identity": identity,
        "val_nelbo": None,
    }
    checkpoint = directory / run_files.CHECKPOINTS / checkpoint_name(0)
    checkpoint.mkdir(parents=True)
    write_tensors(checkpoint, slices)
    write_synced(checkpoint / CONFIG_NAME, to_yaml(config))
    write_synced(checkpoint / RECORD_NAME, json.dumps(record, indent=1))
    seal(checkpoint)
    (directory / run_files.CHECKPOINTS / run_files.LATEST).write_text(checkpoint.name)
    (directory / run_files.CONFIG).write_text(to_yaml(config))


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
