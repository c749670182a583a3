"""The parts of a training run, from its config: model, optimizer, data, callbacks, and the loop over them."""

from __future__ import annotations

from pathlib import Path

from megatron_md import parallel
from megatron_md.checkpoint.base import open_base
from megatron_md.checkpoint.contract import resume_contract
from megatron_md.checkpoint.manager import CheckpointManager
from megatron_md.checkpoint.saving import Checkpointing
from megatron_md.config import ResolvedConfig, to_yaml
from megatron_md.data.cache import Cache
from megatron_md.data.chat_rows import validation_rows
from megatron_md.data.ledger import LEDGER_NAME
from megatron_md.data.mixture import open_stream
from megatron_md.data.shards import Manifest, load_manifest
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.objective import build_objective
from megatron_md.diffusion.scoring import ScoredRows
from megatron_md.model.build import build_model, wrap_data_parallel
from megatron_md.parallel import World
from megatron_md.run import estimate
from megatron_md.run.keeper import Keeper
from megatron_md.run.restore import Restore
from megatron_md.train.callback import Callback, imported_callbacks
from megatron_md.train.callbacks.metrics import MetricsWriter
from megatron_md.train.callbacks.profile import Profiler
from megatron_md.train.callbacks.quarantine import Quarantine
from megatron_md.train.callbacks.sampling import Sampling
from megatron_md.train.callbacks.validation import Validation
from megatron_md.train.callbacks.watchdog import Watchdog
from megatron_md.train.inference import Inference
from megatron_md.train.optimizer import build_optimizer
from megatron_md.train.resilience import StopRequest
from megatron_md.train.step import Stepper
from megatron_md.train.trainer import Trainer


def build(
    config: ResolvedConfig, world: World, manifests: list[Manifest], dog: Watchdog
) -> tuple[Trainer, Restore, Keeper]:
    """Build a run, on every rank.

    Args:
        config: checked and resolved.
        world: this process's place in the job.
        manifests: of the training corpora, which share a tokenizer.
        dog: supervises the ranks.
    """
    directory, manifest = Path(config.run_dir), manifests[0]
    objective = build_objective(
        config.objective,
        seed=config.seed,
        mask_token_id=manifest.mask_id,
        eos_token_id=manifest.eos_id,
        within_document=config.data.document_attention == "within_document",
    )
    # `Restore` fills it: drawing the weights of a large model takes minutes, for nothing where they are loaded.
    chunks = build_model(
        config, world.device, causal=objective.causal, mask_token_id=manifest.mask_id, initialize=False
    )
    chunks = wrap_data_parallel(chunks, config)
    optimizer = build_optimizer(config, chunks)
    stepper = Stepper(config, world, chunks, optimizer, objective)
    inference = Inference(config, world, chunks, causal=objective.causal, mask_token_id=manifest.mask_id)
    stream = open_stream(config.data, manifests, seed=config.seed, rows_per_text=config.objective.rows_per_text)

    base = open_base(Path(str(config.checkpoint.load))) if config.lora else None
    quarantine = Quarantine(directory, max_quarantined=config.data.max_quarantined)
    manager = CheckpointManager(
        directory,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        keep_best=config.checkpoint.keep_best,
        resolved_config=to_yaml(config),
        identity=lambda rows: resume_contract(
            config,
            stream.state(rows),
            tokenizer=manifest.tokenizer_sha256,
            causal=objective.causal,
            base=base.sha256 if base else None,
        ),
        texts={LEDGER_NAME: lambda: quarantine.ledger.text()},
        base=base,
    )
    metrics = _metrics(config, world, directory)
    saving = Checkpointing(manager, config.checkpoint, metrics=metrics)
    validation, sampling = _validation(config, inference, manifest), _sampling(config, inference, metrics, dog)
    profiler = Profiler(config.train.profile, directory)
    # The record is written before the checkpoint, so that a resumed run finds every line up to its step.
    own = imported_callbacks(config)
    callbacks: list[Callback | None] = [validation, profiler, quarantine, *own, metrics, sampling, saving]
    restore = Restore(config, world, manager, saving, quarantine)
    trainer = Trainer(
        config,
        world,
        stream,
        stepper,
        optimizer,
        dog.between(callback for callback in callbacks if callback is not None),
        StopRequest(directory if world.is_main else None),
        restore.roll_back,
    )
    return trainer, restore, Keeper(config, world, manifests, metrics, validation)


def _metrics(config: ResolvedConfig, world: World, directory: Path) -> MetricsWriter:
    return MetricsWriter(
        config,
        directory,
        flops_per_token=estimate.training_flops_per_token(config, config.model.vocab),
        peak_flops=parallel.peak_flops(world.device, config.train.precision),
    )


def _sampling(config: ResolvedConfig, denoiser: Inference, metrics: MetricsWriter, dog: Watchdog) -> Sampling | None:
    if not config.sampling.every_steps:
        return None
    assert config.data.tokenizer is not None, "checked before"
    return Sampling(config, denoiser, Tokenizer(config.data.tokenizer), metrics, dog.alive)


def _validation(config: ResolvedConfig, scorer: Inference, manifest: Manifest) -> Validation | None:
    if not config.validation.sequences or config.data.valid is None:
        return None
    valid = load_manifest(config.data.valid, cache=Cache.of(config.data))
    keys = {"seq_length": config.data.seq_length, "count": config.validation.sequences}
    rows = validation_rows(valid, config.data.chat, **keys, unit=config.row_unit)
    scored = ScoredRows(
        rows.tokens_BL,
        scorer.shift.scorable(rows.is_maskable_BL),
        cu_seqlens=rows.cu_seqlens,
        is_apart=valid.kind == "chat",
    )
    return Validation(config, scorer, scored, mask_token_id=manifest.mask_id)
