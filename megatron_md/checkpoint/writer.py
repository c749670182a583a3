"""One checkpoint on its way to the disk: planned by all ranks, written by each for itself, finished by all.

The plan, the staging and the file format are megatron-core's. Its asynchronous saves fork a writer process, which is
not safe beside the threads of gloo, CUDA and the data prefetch; the middle part runs in a thread here (writing and
hashing release the interpreter lock), or at once in a synchronous save.
"""

from __future__ import annotations

import io
import json
import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_md.checkpoint.integrity import CheckpointError, FileRecord, digest_files, seal
from megatron_md.checkpoint.storage import explained
from megatron_md.core_compat import BACKEND, SavePlan
from megatron_md.errors import RunFailedError
from megatron_md.files import write_synced
from megatron_md.model.initialize import sharded_tensors
from megatron_md.together import together


class SaveError(RunFailedError):
    """A checkpoint could not be written; raised on all ranks at once."""


def raise_together(error: BaseException | None) -> None:
    """Raise the same error on all ranks if any of them has one; every rank calls this.

    Raises:
        SaveError: names every rank that failed, and how.
    """
    texts = together(lambda: None if error is None else f"{type(error).__name__}: {error}")
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    if failed:
        raise SaveError(f"the checkpoint could not be written ({'; '.join(failed)})") from error


def _live_storages(state: dict[str, Any]) -> set[int]:
    return {shard.data.untyped_storage().data_ptr() for shard in sharded_tensors(state) if shard.data is not None}


class CheckpointWrite:
    """Staged at construction, written by `start`, completed by `finish`; every rank makes the same calls."""

    def __init__(
        self, directory: Path, state: dict[str, Any], texts: Mapping[str, str], *, copy: bool, validate: bool
    ) -> None:
        """Plan the save and bring its tensors to host memory.

        Args:
            directory: empty; it is complete once `finish` has returned.
            state: sharded state of model and optimizer; used up.
            texts: further files by name; rank 0 writes them.
            copy: training goes on before `start` has ended, so nothing may alias live tensors.
            validate: let megatron-core exchange and check the sharding of all ranks first.
        """
        self.directory = directory
        self.texts = texts
        self.error: BaseException | None = None
        self.own_files: dict[str, FileRecord] = {}
        self._results: list[Any] = []
        self._thread: threading.Thread | None = None
        # No process writes, so that core need not start a manager process to hear from it.
        filesystem_async._results_queue = queue.Queue()
        live = _live_storages(state) if copy else set()
        sharded, self._common = save_preprocess(state, validate)
        self._writer, self._metadata = SavePlan().make(sharded, directory)
        staged = self._writer.preload_tensors(self._writer.write_buckets, True)
        self._buckets = [
            (path, name, (blobs, [(item, _detached(tensor, live)) for item, tensor in tensors]))
            for path, name, (blobs, tensors) in staged
        ]
        self._writer.write_buckets = []

    def start(self, *, in_background: bool) -> None:
        """Write this rank's files, or start to."""
        if in_background:
            self._thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
            self._thread.start()
        else:
            self._write()

    @property
    def is_written(self) -> bool:
        """This rank's files are written, or have failed."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for this rank's files, then complete the checkpoint together with all other ranks.

        Raises:
            SaveError: any rank has failed; the same on all ranks.
        """
        if self._thread is not None:
            self._thread.join()
        raise_together(self.error)
        is_main = dist.get_rank() == 0
        results: list[Any] | None = [None] * dist.get_world_size() if is_main else None
        dist.gather_object(self._results, results)
        error: Exception | None = None
        if is_main:
            try:
                # The plans of all ranks, which megatron-core would keep for a cache that is not used here.
                self._metadata.all_local_plans = None
                self._writer.finish(self._metadata, results)
            except Exception as failure:
                error = failure
        raise_together(error)
        try:
            seal(self.directory, self.own_files)
        except CheckpointError as failure:
            raise SaveError(f"the checkpoint could not be sealed: {failure}") from failure

    def _write(self) -> None:
        try:
            names = [self._write_bucket(bucket) for bucket in self._buckets]
            if dist.get_rank() == 0:
                names += self._write_texts()
            self.own_files = digest_files(self.directory, names)
        except BaseException as error:  # of a thread: told by `finish` on all ranks
            self.error = explained(error, self.directory)
        finally:
            self._buckets = []

    def _write_bucket(self, bucket: Any) -> str:
        results: queue.Queue[Any] = queue.Queue()
        counter: queue.Queue[int] = queue.Queue()
        counter.put(0)
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        self._writer.write_preloaded_data(transforms, 0, bucket, results, counter, use_fsync=True)
        _, outcome = results.get()
        if isinstance(outcome, Exception):
            raise outcome
        self._results += outcome
        return str(bucket[1])

    def _write_texts(self) -> list[str]:
        buffer = io.BytesIO()
        torch.save(self._common, buffer)
        files: dict[str, str | bytes] = {**self.texts, "metadata.json": json.dumps(asdict(BACKEND))}
        files["common.pt"] = buffer.getvalue()
        for name, content in files.items():
            write_synced(self.directory / name, content)
        return list(files)


def _detached(tensor: torch.Tensor, live: set[int]) -> torch.Tensor:
    """The tensor, copied if it shares memory with training."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor
