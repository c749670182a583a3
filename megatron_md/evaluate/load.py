"""A trained denoiser, ready to be called: from a run directory or a checkpoint, on any number of processes."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import CheckpointException

from megatron_md.checkpoint.base import Base, recorded_base
from megatron_md.checkpoint.directory import read_record
from megatron_md.checkpoint.integrity import CheckpointError, verify
from megatron_md.checkpoint.safe_pickle import guarded
from megatron_md.checkpoint.state import load_model as load_weights
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.objective import build_objective
from megatron_md.model.build import build_model
from megatron_md.parallel import World
from megatron_md.plugins import import_plugins
from megatron_md.run.saved import SavedRun
from megatron_md.train.inference import Inference


def is_causal(run: SavedRun, *, mask_token_id: int) -> bool:
    """Whether a run's denoiser attends to the left only: as its checkpoint recorded, else as its objective says.

    Raises:
        CheckpointError: only third-party modules could tell, and the run is not trusted.
    """
    identity = read_record(run.checkpoint)["identity"]
    if isinstance(identity.get("objective is causal"), bool):
        return bool(identity["objective is causal"])
    if run.config.imports and not run.trust:
        raise CheckpointError(
            f"{run.checkpoint}: its config imports {', '.join(run.config.imports)}, which would run their code here: "
            "--trust allows it"
        )
    import_plugins(run.config)
    return build_objective(run.config.objective, seed=run.config.seed, mask_token_id=mask_token_id).causal


def load_model(run: SavedRun, world: World, tokenizer: Tokenizer) -> Inference:
    """Verify the checkpoint, build the model and read its weights; every rank does this.

    Raises:
        CheckpointError: the checkpoint, or the base of its adapters, is damaged, or the checkpoint cannot be verified
            and is not trusted.
    """
    verify(run.checkpoint, trust=run.trust)
    base = recorded_base(run.checkpoint)
    if base is not None:
        verify(base.path)
    mask_token_id = tokenizer.mask_token_id
    causal = is_causal(run, mask_token_id=mask_token_id)
    chunks: list[Any] = build_model(
        run.config, world.device, causal=causal, mask_token_id=mask_token_id, initialize=False
    )
    _load(chunks, run, base)
    for chunk in chunks:
        chunk.eval()
    return Inference(run.config, world, chunks, causal=causal, mask_token_id=mask_token_id)


def _load(chunks: list[Any], run: SavedRun, base: Base | None = None) -> None:
    """Read the weights; what megatron-core makes of files that nothing vouches for is the files' fault."""
    try:
        with guarded(run.checkpoint):
            load_weights(chunks, run.checkpoint, base.path if base else None, weights=run.weights)
    except (Exception, CheckpointException) as error:
        if not run.trust or isinstance(error, CheckpointError):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{run.checkpoint}: cannot be loaded ({type(error).__name__}: {first_line})") from error
