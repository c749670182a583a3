"""Where a run goes on from: its newest checkpoint, another run's, or an earlier one after bad numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_md.checkpoint import rollback
from megatron_md.checkpoint.contract import config_changes
from megatron_md.checkpoint.directory import checkpoint_name, find_checkpoint, named_checkpoints
from megatron_md.checkpoint.hf import original
from megatron_md.checkpoint.hf.peft import load_adapters
from megatron_md.checkpoint.manager import CheckpointManager
from megatron_md.checkpoint.saving import Checkpointing
from megatron_md.checkpoint.state import model_state
from megatron_md.config import LoraConfig, ResolvedConfig
from megatron_md.data.ledger import LEDGER_NAME, QuarantineLedger
from megatron_md.errors import UserError
from megatron_md.messages import tell
from megatron_md.model.build import draw_weights
from megatron_md.model.initialize import sharded_tensors
from megatron_md.parallel import World
from megatron_md.run import estimate
from megatron_md.train import ema
from megatron_md.train.callbacks.metrics import append_event
from megatron_md.train.callbacks.quarantine import Quarantine
from megatron_md.train.progress import Progress
from megatron_md.train.trainer import Trainer


@dataclass(frozen=True)
class Restore:
    """Puts checkpoints in place of a trainer's state; every rank makes the same calls."""

    config: ResolvedConfig
    world: World
    manager: CheckpointManager
    saving: Checkpointing
    quarantine: Quarantine

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self.manager.run_dir

    def resume(self, trainer: Trainer) -> bool:
        """Continue from the newest undamaged checkpoint, if there is one; False if the run is finished already.

        A run without a checkpoint starts from `checkpoint.load`, if that is set, else from weights that are drawn.
        Adapters are put on the weights of `checkpoint.load` in either case.

        Raises:
            UserError: there are checkpoints and `checkpoint.resume` is never, or none of them can be read.
        """
        returned = rollback.finish(self.directory)
        if self.config.lora is not None:
            self._load_base(trainer)
        loaded = self._load_newest(trainer)
        if loaded is None and self.config.lora is not None:
            self._start_adapters(trainer, self.config.lora)
        elif loaded is None and self.config.checkpoint.load is not None:
            loaded = self._load_another(trainer, Path(self.config.checkpoint.load))
        elif loaded is None:
            draw_weights(self.config, trainer.stepper.chunks)
            trainer.optimizer.reload_model_params()  # its own fp32 parameters, taken from weights not drawn yet
        if loaded is None:
            ema.restart(trainer.optimizer)
            return True
        self._continue_from(trainer, *loaded, returned)
        step = trainer.progress.step
        is_finished = step >= self.config.train.steps
        if self.world.is_main:
            tell(f"{self.directory}: {'finished, nothing to do' if is_finished else 'continues'} at step {step}")
            if not is_finished:
                changed = config_changes(loaded[0], self.manager.resolved_config)
                append_event(self.directory, "loaded", path=str(loaded[0]), changed=changed)
        return not is_finished

    def roll_back(self, trainer: Trainer) -> None:
        """Return to the newest checkpoint from before the bad numbers; `rollback` says what is left out from here on.

        Raises:
            BadNumbersError: on all ranks, if there is none, or `train.max_rollbacks` is reached.
        """
        self.saving.settle(trainer)
        left, most = trainer.progress, self.config.train.max_rollbacks
        returned = rollback.agreed(self.directory, left, max_rollbacks=most, poisoned=trainer.poisoned)
        trainer.poisoned = None
        checkpoint = self.manager.directory / checkpoint_name(returned.step)
        progress = self.manager.load(trainer.stepper.chunks, trainer.optimizer, checkpoint)
        self._continue_from(trainer, checkpoint, progress, returned)
        if self.world.is_main:
            rows = [list(jump) for jump in returned.jumps if jump not in left.jumps]
            without = "".join(f", from now on without the rows {first} to {stop - 1}" for first, stop in rows)
            append_event(
                self.directory,
                "rolled back",
                step=returned.step,
                left_step=left.step,
                rows=rows[0] if rows else None,
                reason=returned.reason,
            )
            tell(f"megatron-md: {returned.reason}: back to step {returned.step}{without}")

    def _load_newest(self, trainer: Trainer) -> tuple[Path, Progress] | None:
        if self.config.checkpoint.resume == "never" and named_checkpoints(self.manager.directory):
            raise UserError(
                f"{self.directory} holds checkpoints and checkpoint.resume is never: "
                "choose another run_dir, remove it, or set checkpoint.resume=auto"
            )
        return self.manager.load_newest(trainer.stepper.chunks, trainer.optimizer)

    def _load_base(self, trainer: Trainer) -> None:
        """Take the weights that adapters are trained on; a resumed run needs them as well."""
        assert self.manager.base is not None, "a run with adapters has one"
        self.manager.load_model_only(trainer.stepper.chunks, trainer.optimizer, self.manager.base.path)

    def _start_adapters(self, trainer: Trainer, keys: LoraConfig) -> None:
        """Draw adapters that change nothing yet, or take those of a PEFT folder."""
        assert self.manager.base is not None, "a run with adapters has one"
        chunks, base = trainer.stepper.chunks, self.manager.base.path
        self._hand_on(base)
        if keys.load is None:
            draw_weights(self.config, chunks, adapters_only=True)
        else:
            load_adapters(sharded_tensors(model_state(chunks)), Path(keys.load), self.config)
        trainer.optimizer.reload_model_params()  # its own fp32 parameters
        if self.world.is_main:
            trained, whole = estimate.trained_count(self.config), estimate.parameter_count(self.config.model)
            tell(f"{self.directory}: trains {trained:,} parameters of adapters on the {whole:,} of {base}")
            append_event(self.directory, "weights_loaded", path=str(base), adapters=keys.load)

    def _hand_on(self, checkpoint: Path) -> None:
        if self.world.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            original.hand_on(checkpoint.parent.parent, self.directory)

    def _load_another(self, trainer: Trainer, source: Path) -> tuple[Path, Progress] | None:
        """Take the weights of another run, or all of it."""
        chunks, optimizer, checkpoint = trainer.stepper.chunks, trainer.optimizer, find_checkpoint(source)
        self._hand_on(checkpoint)
        if self.config.checkpoint.load_only is None:
            return checkpoint, self.manager.load(chunks, optimizer, checkpoint)
        self.manager.load_model_only(chunks, optimizer, checkpoint)
        if self.world.is_main:
            tell(f"{self.directory}: starts with the weights of {checkpoint}")
            append_event(self.directory, "weights_loaded", path=str(checkpoint))
        return None

    def _continue_from(
        self, trainer: Trainer, checkpoint: Path, progress: Progress, returned: rollback.Rollback | None
    ) -> None:
        trainer.progress = progress if returned is None else returned.applied(progress)
        self.quarantine.ledger = QuarantineLedger.read(checkpoint / LEDGER_NAME)
        trainer.stream.quarantine(self.quarantine.ledger)
