"""Masked diffusion inside the trainers of Megatron-LM and Megatron-Bridge: the parts that their `pretrain` asks for.

Both drive megatron-core's schedules with a `forward_step_func`, a model provider and a data iterator. `DiffusionTask`
gives all three for one of our YAML files; loop, optimizer, learning rate and checkpoints are theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, unwrap_model

from megatron_md import parallel
from megatron_md.batch import BoolArray, CorruptedBatch
from megatron_md.config import Config, ResolvedConfig, load_config, resolve
from megatron_md.data.cache import Cache
from megatron_md.data.mixture import open_stream
from megatron_md.data.shards import load_manifest
from megatron_md.data.stream import micro_batches
from megatron_md.diffusion.objective import build_objective
from megatron_md.errors import UserError
from megatron_md.integrations.stock import LogitsOf, check_stock, loss_of_logits
from megatron_md.model.attention import additive_mask
from megatron_md.model.build import Denoiser, build_model, transformer_config
from megatron_md.model.head import Prediction, PredictionLoss
from megatron_md.parallel import World
from megatron_md.plugins import import_plugins
from megatron_md.run.check import check_config
from megatron_md.run.epochs import count_steps
from megatron_md.train.progress import Progress
from megatron_md.train.step import ForwardPass, corrupt

# Where their model's configuration contradicts ours, one of them is not what is trained.
_SHARED_FIELDS = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "sequence_parallel", "params_dtype", "calculate_per_token_loss",
)  # fmt: skip


LossAndReports = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


class _Step(ForwardPass):
    """Our step on a pipeline stage that another trainer's schedule holds."""

    def __init__(self, config: ResolvedConfig, world: World) -> None:
        super().__init__(config, world, [])

    def __call__(self, attention_mask: torch.Tensor | None, batch: CorruptedBatch, model: Any) -> tuple[Any, Any]:
        """The stage's output and the function that makes a loss of it."""
        return self._forward_step(attention_mask, iter((batch,)), model)


class DiffusionTask:
    """One of our configs as what another trainer on megatron-core needs of it.

    The config decides model, layout, data and objective; `optimizer`, `checkpoint`, `validation`, `sampling` and `log`
    are the trainer's business, and its own settings must name the same layout and batch sizes.

    Every rank reads its rows itself, those of a tensor-parallel group the same ones: nothing is broadcast. What is read
    and masked is a function of the seed and of the samples consumed, so that a resumed run goes on with the rows and
    masks that an uninterrupted one would have had.
    """

    def __init__(self, config: Config | Path | str, overrides: Sequence[str] = ()) -> None:
        """Check the config and open its corpora; torch.distributed need not be there yet.

        Args:
            config: a config, or its YAML file.
            overrides: `section.key=value`, where it is a file.

        Raises:
            ConfigError: it cannot be run in a job of this size.
        """
        given = config if isinstance(config, Config) else load_config(config, overrides)
        if given.parallel.context > 1:
            raise UserError("parallel.context above 1 is for our own trainer only: set it to 1")
        if given.objective.block_stages or given.objective.mask_noise:
            raise UserError("objective.block_size and mask_noise are for our own trainer only: set them to null")
        check_config(given, int(os.environ.get("WORLD_SIZE", "1")))
        import_plugins(given)
        given = count_steps(given)
        manifests = [load_manifest(corpus.manifest, cache=Cache.of(given.data)) for corpus in given.data.corpora()]
        if not manifests:
            raise UserError("data.train is not set: name a corpus")
        if any(manifest.kind == "chat" for manifest in manifests):
            raise UserError("data.train holds dialogues, which only megatron-md train makes rows of")
        self.config = resolve(given, manifests[0].vocab_size)
        self.mask_token_id = manifests[0].mask_id
        self.objective = build_objective(
            self.config.objective,
            seed=self.config.seed,
            mask_token_id=self.mask_token_id,
            eos_token_id=manifests[0].eos_id,
            within_document=self.config.data.document_attention == "within_document",
        )
        self.stream = open_stream(
            self.config.data,
            manifests,
            seed=self.config.seed,
            rows_per_text=self.config.objective.rows_per_text,
        )
        self._stages: list[Denoiser] = []
        self._mask: tuple[BoolArray | None, torch.Tensor | None] = (None, None)
        self._checked: set[torch.nn.Module] = set()
        self._iterators: dict[int | None, Iterator[CorruptedBatch]] = {}

    @cached_property
    def device(self) -> torch.device:
        """Where this rank computes, as `train.device` says."""
        return parallel.select_device(self.config.train.device)

    @cached_property
    def transformer(self) -> TransformerConfig:
        """megatron-core's configuration of the model: one for all stages of a rank."""
        return transformer_config(self.config, self.device)

    @cached_property
    def _step(self) -> _Step:
        return _Step(self.config, parallel.current_world(self.device))

    def model_provider(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
        *,
        initialize: bool = True,
    ) -> Denoiser:
        """A pipeline stage of the denoiser, for `model_provider` of Megatron-LM and `provide` of Megatron-Bridge.

        There is one model: a second call gives the same stage.

        Args:
            pre_process: it holds the embedding; follows from the process groups.
            post_process: it holds the head; the same.
            vp_stage: which of the rank's stages, where it has several.
            config: the trainer's configuration of the model, where it has one; must agree with ours.
            pg_collection: unused; the groups are those of `parallel_state`.
            initialize: (of the first call) draw the weights from our seed, the same in every layout; False where a
                checkpoint is loaded.

        Raises:
            UserError: the trainer's configuration or its process groups contradict ours.
        """
        self._check_layout(config)
        if not self._stages:
            causal = self.objective.causal
            keys: dict[str, Any] = {"mask_token_id": self.mask_token_id, "initialize": initialize}
            # They wrap it for bf16 themselves.
            self._stages = unwrap_model(build_model(self.config, self.device, causal=causal, **keys))
        return self._stages[vp_stage or 0]

    def _check_layout(self, theirs: Any) -> None:
        layout = self.config.parallel
        groups = {
            "parallel.tensor": (layout.tensor, parallel_state.get_tensor_model_parallel_world_size()),
            "parallel.pipeline": (layout.pipeline, parallel_state.get_pipeline_model_parallel_world_size()),
            "parallel.context": (layout.context, parallel_state.get_context_parallel_world_size()),
        }
        if theirs is not None:
            groups |= {
                f"{name} (from our config)": (getattr(self.transformer, name), getattr(theirs, name))
                for name in _SHARED_FIELDS
            }
        for name, (ours, found) in groups.items():
            if ours != found:
                raise UserError(f"{name} is {ours}, the trainer's is {found}: set both to the same")

    def datasets_provider(self, consumed_samples: Callable[[], int]) -> Callable[..., tuple[Any, None, None]]:
        """For Megatron-LM's `train_valid_test_datasets_provider`, with `--dataloader-type external --eval-iters 0`.

        Args:
            consumed_samples: tells where the run stands once its checkpoint is loaded:
                `lambda: get_args().consumed_train_samples`.
        """

        def provide(samples: Any = None, vp_stage: int | None = None) -> tuple[Any, None, None]:
            return self.data_iterator(consumed_samples()), None, None

        provide.is_distributed = True  # type: ignore[attr-defined]  # called on every rank, not on the first of a group
        return provide

    def data_iterator(self, consumed_samples: int = 0) -> Iterator[CorruptedBatch]:
        """This data-parallel rank's corrupted micro-batches, from a global batch on and without end.

        Args:
            consumed_samples: rows of the global batches before.

        Raises:
            UserError: no global batch begins there, or the trainer takes another number of micro-batches.
        """
        world = parallel.current_world(self.device)
        progress = Progress.start(self.config, self.stream)
        while progress.next_sample_index < consumed_samples:
            progress = progress.after(self.config, self.stream)
        if progress.next_sample_index != consumed_samples:
            raise UserError(
                f"the trainer has consumed {consumed_samples} samples, where no global batch of "
                f"train.global_batch_size {self.config.train.global_batch_size} begins: set that to the trainer's"
            )
        while True:
            rows = micro_batches(
                self.stream,
                progress.batch_position(self.config),
                self.config.train.micro_batch_size,
                data_rank=world.data_rank,
                data_size=world.data_size,
                length=progress.row_length(self.config, self.stream),
            )
            _check_count(len(rows))
            yield from corrupt(self.config, self.objective, rows)
            progress = progress.after(self.config, self.stream)

    def forward_step(
        self, data_iterator: Iterator[CorruptedBatch], model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[..., Any]]:
        """For `forward_step_func` of Megatron-LM, and of anything that calls megatron-core's schedules.

        Args:
            data_iterator: a `data_iterator` of this task.
            model: a pipeline stage that `model_provider` made, however wrapped; or one of a stock GPTModel with
                `stock.bidirectional` layers, whose logits are computed at every position.
            return_schedule_plan: of overlapped expert parallelism, which is not built here.

        Returns:
            The stage's output and the function that makes of the last stage's output (loss sum, its count, reports):
            the loss divided by the global count is our `loss`, and each report holds the sum and the count of a mean.
        """
        if return_schedule_plan:
            raise UserError("overlapped expert parallelism asks for a schedule plan; turn it off, there are no experts")
        batch = next(data_iterator)
        mask, stage = self._hidden_mask(batch, model), unwrap_model(model)
        if isinstance(stage, Denoiser):
            output, loss = self._step(mask, batch, model)
            return output, partial(self._reported, batch, loss)
        if stage not in self._checked:
            check_stock(stage, self.config, causal=self.objective.causal)
            self._checked.add(stage)
        logits_of = LogitsOf(model)
        output, loss = self._step(mask, batch, logits_of)

        def loss_func(logits_BLV: torch.Tensor) -> LossAndReports:
            assert logits_of.prediction is not None, "the step asks the model for it"
            return self._reported(batch, loss, self._loss_of_logits(stage, logits_BLV, logits_of.prediction))

        return output, loss_func

    def _hidden_mask(self, batch: CorruptedBatch, model: Any) -> torch.Tensor | None:
        """The additive mask of a global batch's hidden pairs, one for all its micro-batches."""
        if batch.is_hidden_LL is not self._mask[0]:
            hidden = batch.is_hidden_LL
            is_hidden_LL = None if hidden is None else torch.from_numpy(hidden).to(self.device)
            mask = None if is_hidden_LL is None else additive_mask(is_hidden_LL, model.config.params_dtype)
            self._mask = (hidden, mask)
        return self._mask[1]

    def _loss_of_logits(self, stage: Any, logits_BLV: torch.Tensor, prediction: Prediction) -> PredictionLoss:
        first = logits_BLV.shape[-1] * parallel_state.get_tensor_model_parallel_rank()
        never = set(range(self.config.model.vocab, stage.vocab_size))
        if self.config.objective.mask_logit == "exclude":
            never.add(self.mask_token_id)
        return loss_of_logits(logits_BLV, prediction, first, never)

    def _reported(self, batch: CorruptedBatch, loss: Callable[..., Any], output: PredictionLoss) -> LossAndReports:
        """(loss sum, its count, reports) of a micro-batch, as megatron-core's schedules take them."""
        loss_sum, count, own = loss(output)
        pairs = {"lm loss": (own.loss, count), **self.objective.reduce(own.nll_M, batch)}
        reports = {
            name: torch.stack([torch.as_tensor(part, dtype=torch.float32, device=count.device) for part in pair])
            for name, pair in pairs.items()
        }
        return loss_sum, count, reports

    def bridge_forward_step(
        self, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[..., Any]]:
        """For `forward_step_func` of Megatron-Bridge, which puts its `GlobalState` into a parameter called `state`.

        Args:
            state: tells by `state.train_state.consumed_train_samples` where the run stands.
            data_iterator: unused: the rows are this task's own.
            model: see `forward_step`.
            return_schedule_plan: see `forward_step`.

        Raises:
            UserError: the trainer evaluates, for which there are no rows.
        """
        if not model.training:
            raise UserError("there are no rows to evaluate on: set the trainer's eval_iters to 0")
        stage = get_attr_wrapped_model(model, "vp_stage")
        if stage not in self._iterators:
            self._iterators[stage] = self.data_iterator(state.train_state.consumed_train_samples)
        return self.forward_step(self._iterators[stage], model, return_schedule_plan)


def _check_count(micro_batches: int) -> None:
    """Megatron-LM and Megatron-Bridge keep their number of micro-batches in megatron-core; other loops may not."""
    if num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None:
        return
    theirs = num_microbatches_calculator.get_num_microbatches()
    if theirs != micro_batches:
        raise UserError(
            f"the trainer takes {theirs} micro-batches per rank and step, train.global_batch_size, "
            f"train.micro_batch_size and train.batch_ramp make {micro_batches}: set them to the trainer's"
        )
