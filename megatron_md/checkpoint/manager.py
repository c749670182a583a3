"""Saves and loads the state of a run with megatron-core's distributed checkpoints.

RUN/checkpoints/step_00000100/ is complete or absent: it is written under a temporary name and renamed.
RUN/checkpoints/latest names the newest complete one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_md.model.build import settled_parameters
from megatron_md.train.progress import Progress

FORMAT_VERSION = 1


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint at `step`."""
    return f"step_{step:08d}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run: the one that `latest` names or, if it is gone, the newest there is.

    Raises:
        ValueError: there are checkpoint directories, and none is complete.
    """
    directory = run_dir / "checkpoints"
    pointer = directory / "latest"
    named = [directory / pointer.read_text().strip()] if pointer.is_file() else []
    found = sorted(directory.glob("step_*"), reverse=True)
    for path in [*named, *found]:
        if (path / "progress.json").is_file():
            return path
    if found:
        raise ValueError(f"{directory}: none of its {len(found)} checkpoints is complete; remove them to start anew")
    return None


def read_progress(checkpoint: Path) -> Progress:
    """The progress recorded in a checkpoint.

    Raises:
        ValueError: the directory is not a complete checkpoint of this format.
    """
    path = checkpoint / "progress.json"
    try:
        record = json.loads(path.read_text())
        if record["format"] != FORMAT_VERSION:
            raise ValueError(f"{path}: format {record['format']} is not {FORMAT_VERSION}")
        return Progress(**record["progress"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint}: not a complete checkpoint ({error})") from error


def _unwrapped(chunk: Any) -> Any:
    """The chunk without megatron-core's data-parallel wrapper, under whose names checkpoints are kept."""
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def model_state(chunks: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Sharded state of the model chunks, under the names that megatron-core's optimizer expects."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {
        name: _unwrapped(chunk).sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)
    }


def load_model_state(chunks: list[Any], state: dict[str, Any]) -> None:
    """Put a loaded `model_state` into the model chunks."""
    for number, chunk in enumerate(chunks):
        _unwrapped(chunk).load_state_dict(state["model" if len(chunks) == 1 else f"model{number}"])


def load_model(chunks: list[Any], checkpoint: Path) -> None:
    """Load weights only, for evaluation and generation on any layout.

    Args:
        chunks: model chunks without the data-parallel wrapper.
        checkpoint: a complete checkpoint directory.
    """
    metadata = sharding_metadata(chunks, optimizer=None)
    # Checkpoints hold fp32 weights of the wrapped model under the same names.
    load_model_state(chunks, dist_checkpointing.load(model_state(chunks, metadata), str(checkpoint)))


def sharding_metadata(chunks: list[Any], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    """megatron-core's metadata for `sharded_state_dict`: how the optimizer state is cut.

    `fully_reshardable` moves between any layouts, but megatron-core gets it wrong where a rank's gradients lie in
    several buckets. There the format is `dp_reshardable`, which can change the data-parallel size only.
    """
    metadata: dict[str, Any] = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    if optimizer is None:
        return metadata
    kind = "dp_reshardable" if _several_buckets(chunks) else "fully_reshardable"
    return {**metadata, "distrib_optim_sharding_type": kind, "chained_optim_avoid_prefix": True}


def _several_buckets(chunks: list[Any]) -> bool:
    """True on all ranks or none: overlapped communication, or tied embeddings over a pipeline."""
    denoiser = chunks[0].module
    while hasattr(denoiser, "module"):
        denoiser = denoiser.module
    tied_over_pipeline = (
        denoiser.share_embeddings_and_output_weights and denoiser.config.pipeline_model_parallel_size > 1
    )
    return bool(chunks[0].ddp_config.overlap_grad_reduce or tied_over_pipeline)


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    }


def _optimizer_kind(optimizer: MegatronOptimizer) -> str:
    """Class and arithmetic of megatron-core's optimizer: their states differ."""
    return "/".join(sorted({type(part).__name__ for part in optimizer.chained_optimizers}))


def _check_loadable(checkpoint: Path, chunks: list[Any], optimizer: MegatronOptimizer, saved_kind: str | None) -> None:
    """Refuse by name what megatron-core would load wrongly or not at all.

    Raises:
        ValueError: the checkpoint's optimizer state cannot move to this layout.
    """
    record = json.loads((checkpoint / "progress.json").read_text())
    saved, was, now = record["layout"], record["optimizer"], _optimizer_kind(optimizer)
    if was != now:
        raise ValueError(
            f"{checkpoint}: its state belongs to megatron-core's {was}, this run has {now}: put "
            "parallel.distributed_optimizer and train.precision back to what it was trained with"
        )
    if saved == _layout():
        return
    if saved_kind == "dp_reshardable" or _several_buckets(chunks):
        raise ValueError(
            f"{checkpoint}: its optimizer state was saved at {saved} and cannot move to {_layout()}: resume with the "
            "layout that wrote it (overlapped communication or tied embeddings over a pipeline keep it tied to that)"
        )


class CheckpointManager:
    """Writes, prunes and reads the checkpoints of one run."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_last: int,
        resolved_config: str,
        identity: dict[str, Any] | None = None,
        texts: Mapping[str, Callable[[], str]] | None = None,
    ) -> None:
        """Take charge of RUN/checkpoints; nothing is written yet.

        Args:
            run_dir: the run's directory.
            keep_last: newest checkpoints that are kept.
            resolved_config: text of `config.yaml` in every checkpoint.
            identity: what a checkpoint must agree on to be resumed (JSON values by name): corpus, seed, model shape.
            texts: what else to keep in every checkpoint: file names, and what gives their content when it is saved.
        """
        self.identity = identity or {}
        self.texts = texts or {}
        self.directory = run_dir / "checkpoints"
        self.run_dir = run_dir
        self.keep_last = keep_last
        self.resolved_config = resolved_config

    def save(self, chunks: list[Any], optimizer: MegatronOptimizer, progress: Progress) -> Path:
        """Write a checkpoint; every rank calls this.

        Returns:
            Its directory.
        """
        target = self.directory / checkpoint_name(progress.step)
        partial = self.directory / f".writing_{target.name}"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with settled_parameters(chunks):
            metadata = sharding_metadata(chunks, optimizer)
            state = model_state(chunks, metadata)
            state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
            content = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
            dist_checkpointing.save(state, str(partial), content_metadata=content)
        if dist.get_rank() == 0:
            record = {
                "format": FORMAT_VERSION,
                "progress": asdict(progress),
                "layout": _layout(),
                "optimizer": _optimizer_kind(optimizer),
                "identity": self.identity,
            }
            for name, text in self.texts.items():
                _write_synced(partial / name, text())
            _write_synced(partial / "config.yaml", self.resolved_config)
            _write_synced(partial / "progress.json", json.dumps(record, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
            _sync_directory(self.directory)
            _replace_text(self.directory / "latest", target.name)
            self._prune()
        dist.barrier()
        return target

    @torch.no_grad()
    def load(self, chunks: list[Any], optimizer: MegatronOptimizer, checkpoint: Path) -> Progress:
        """Read a checkpoint into model and optimizer; every rank calls this.

        Raises:
            ValueError: it is incomplete, belongs to another run, or holds optimizer state that this layout cannot take.
        """
        progress = read_progress(checkpoint)
        self._check_identity(checkpoint)
        saved = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
        _check_loadable(checkpoint, chunks, optimizer, saved.get("distrib_optim_sharding_type"))
        metadata = {**sharding_metadata(chunks, optimizer), **saved}
        template = model_state(chunks, metadata)
        template["optimizer"] = optimizer.sharded_state_dict(template, is_loading=True, metadata=metadata)
        state = dist_checkpointing.load(template, str(checkpoint))
        load_model_state(chunks, state)
        optimizer.load_state_dict(state["optimizer"])
        return progress

    def _check_identity(self, checkpoint: Path) -> None:
        saved = json.loads((checkpoint / "progress.json").read_text())["identity"]
        now = json.loads(json.dumps(self.identity))
        lines = [f"{key}: {saved.get(key)} there, {value} now" for key, value in now.items() if saved.get(key) != value]
        if lines:
            raise ValueError(
                f"{checkpoint} belongs to another run ({'; '.join(lines)}): "
                "choose another run_dir, or put these keys back to what it was trained with"
            )

    def _prune(self) -> None:
        complete = sorted(self.directory.glob("step_*"))
        newest = (self.directory / "latest").read_text()
        for old in complete[: -self.keep_last]:
            if old.name != newest:
                shutil.rmtree(old)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.writing")
    _write_synced(temporary, text)
    os.replace(temporary, path)
    _sync_directory(path.parent)
