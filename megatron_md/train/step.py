"""The join of the two wings: corrupted batches go into megatron-core's forward-backward schedule and its optimizer.

Nothing else knows both the diffusion objective and megatron-core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch.nn.utils import get_total_norm

from megatron_md.batch import CleanBatch, CorruptedBatch, RightShift
from megatron_md.config import Config
from megatron_md.core_compat import gradients_of_norm
from megatron_md.diffusion.annealing import hidden_pairs
from megatron_md.diffusion.objective import Objective
from megatron_md.errors import UserError
from megatron_md.model.attention import additive_mask, packed_documents
from megatron_md.model.block_attention import BlockRows, documents_of
from megatron_md.model.head import Prediction, PredictionLoss
from megatron_md.parallel import World
from megatron_md.train import ema
from megatron_md.train.bad_numbers import not_finite
from megatron_md.train.mask_noise import MaskNoise, row_noise
from megatron_md.train.optimizer import optimizer_updates
from megatron_md.train.row_slice import RowSlice


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, the same on every rank.

    Attributes:
        loss: the training objective in nats per counted token.
        grad_norm: global gradient norm before clipping.
        fault: why the update was left out, else None; weights and optimizer state are as they were then.
        metrics: the objective's own means (`masked_ce`, `mean_mask_rate`, ...).
        votes: sums over all ranks of what each had to say.
    """

    loss: float
    grad_norm: float
    fault: str | None
    metrics: dict[str, float]
    votes: list[float]


# Predicted positions are filled up to a multiple of this, so that CUDA's allocator and compiler see few shapes.
CUDA_BUCKET = 128

Judge = Callable[[float, float], str | None]


def _to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def corrupt(config: Config, objective: Objective, batches: Sequence[CleanBatch]) -> list[CorruptedBatch]:
    """Corrupt this rank's micro-batches of one global batch (host work, safe in a background thread)."""
    first, keys, shift = batches[0], config.objective, RightShift(config.objective.right_shift)
    is_hidden_LL = hidden_pairs(config.seed, first.position, first.tokens_BL.shape[1], keys.attention_annealing)
    within_document = config.data.document_attention == "within_document"
    return [
        replace(
            objective.corrupt(replace(batch, is_maskable_BL=shift.scorable(batch.is_maskable_BL))),
            cu_seqlens=batch.cu_seqlens if within_document else batch.seen_apart(),
            is_hidden_LL=is_hidden_LL,
            noise=row_noise(config, batch.position.progress, batch.sample_index_B),
        )
        for batch in batches
    ]


class ForwardPass:
    """Sends micro-batches through the model by megatron-core's schedule, whichever the layout has."""

    def __init__(self, config: Config, world: World, chunks: list[Any]) -> None:
        self.chunks, self.world = chunks, world
        self.micro_batch_size = config.train.micro_batch_size
        self.within_document = config.data.document_attention == "within_document"
        self.shift = RightShift(config.objective.right_shift)
        self.mask_noise: MaskNoise | None = None
        self.is_clean_causal = config.objective.autoregressive_weight > 0.0
        self.bucket = CUDA_BUCKET if world.device.type == "cuda" else 1
        self.row_slice = RowSlice.here()
        # megatron-core's interleaved schedule takes whole rounds over the pipeline only.
        self._round = config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1
        self._schedule = get_forward_backward_func()

    def predict(self, batches: Sequence[CorruptedBatch], *, forward_only: bool) -> list[PredictionLoss]:
        """Forward (and backward) over all micro-batches; the last pipeline stage gets the losses of whole rows."""
        attention_mask = None
        if batches[0].is_hidden_LL is not None:
            # One for all micro-batches and layers: they keep it for their backward pass.
            is_hidden_LL = _to_device(batches[0].is_hidden_LL, self.world.device)
            attention_mask = additive_mask(is_hidden_LL, self.chunks[0].config.params_dtype)
        step = partial(self._forward_step, attention_mask)
        rows, length = batches[0].tokens_BL.shape
        losses = self.through(step, batches, (rows, length), forward_only=forward_only)
        positions = [self.shift.outputs(batch.positions_M) for batch in batches]
        return self.row_slice.whole_losses(losses, positions, length)

    def through(self, step: Callable[..., Any], items: Sequence[Any], shape: tuple[int, ...], **keys: Any) -> list[Any]:
        """What `step` gives for micro-batches of `shape` [B, L]: a list on the last pipeline stage, empty elsewhere."""
        padded = [*items, *[items[-1]] * (-len(items) % self._round)]
        assert keys["forward_only"] or len(padded) == len(items), "the config's checks refuse such a batch"
        iterators = [iter(padded) for _ in self.chunks]
        outputs: list[Any] = self._schedule(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(padded),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            **keys,
        )
        return outputs[: len(items)]

    def _forward_step(
        self, attention_mask: torch.Tensor | None, iterator: Iterator[CorruptedBatch], model: Any
    ) -> tuple[Any, Any]:
        batch, device = next(iterator), self.world.device
        here, positions_M = self.row_slice.find(self.shift.outputs(batch.positions_M), batch.tokens_BL.shape[1])
        # Weights of 0 for what fills up a bucket; its targets must be ones that have a likelihood.
        count = len(positions_M)
        filling = (0, -count % self.bucket)
        prediction = Prediction(
            _to_device(np.pad(positions_M, filling, "edge"), device),
            _to_device(np.pad(batch.targets_M[here], filling, "edge"), device),
            _to_device(np.pad(batch.weights_M[here], filling), device),
        )
        # Every pipeline stage has the batch, so the boundaries need not travel from stage to stage.
        seen = self._seen_apart(batch)
        copies = seen.copies if isinstance(seen, BlockRows) else 1
        inputs = self.inputs(_to_device(batch.tokens_BL, device), copies=copies)
        with nullcontext() if self.mask_noise is None else self.mask_noise.of(batch.noise):
            output = model(*inputs, attention_mask, labels=prediction, packed_seq_params=seen)
        return output, partial(self._loss, batch.denominator, count)

    def _seen_apart(self, batch: CorruptedBatch) -> PackedSeqParams | None:
        """What attention keeps apart: documents, blocks, or nothing."""
        device, cuts = self.world.device, batch.cu_seqlens
        if batch.block_size is None:
            return None if cuts is None else packed_documents(cuts, device)
        length = batch.tokens_BL.shape[1] // 2
        return BlockRows(
            qkv_format="sbhd",
            block_size=batch.block_size,
            length=length,
            causal_until=length if self.is_clean_causal else 0,
            document_BL=None if cuts is None else documents_of(cuts, length, device),
        )

    def inputs(self, tokens_BL: torch.Tensor, *, copies: int = 1, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their positions from `start` on, of this rank's slice of rows that hold a text so many times."""
        length = tokens_BL.shape[1]
        assert length % self.row_slice.size == 0, "the config's checks refuse such rows"
        positions_L = torch.arange(start, start + length // copies, device=tokens_BL.device).repeat(copies)
        positions_BL = positions_L.expand_as(tokens_BL)
        return self.row_slice.of(tokens_BL), self.row_slice.of(positions_BL)

    def _loss(
        self, denominator: int, predicted: int, output: PredictionLoss
    ) -> tuple[torch.Tensor, torch.Tensor, PredictionLoss]:
        """(loss sum, its share of the global count, report): megatron-core divides gradients by the global count."""
        counted = denominator if self.row_slice.is_first else 0
        count = torch.full((), counted, dtype=torch.int, device=output.loss.device)
        # The report must not keep the graph, nor be the tensor that the schedule goes on to change.
        return output.loss, count, PredictionLoss(output.loss.detach().clone(), output.nll_M[:predicted])


class Stepper(ForwardPass):
    """Makes optimizer steps on global batches."""

    def __init__(
        self,
        config: Config,
        world: World,
        chunks: list[Any],
        optimizer: MegatronOptimizer,
        objective: Objective,
    ) -> None:
        super().__init__(config, world, chunks)
        self.optimizer, self.objective = optimizer, objective
        self.clip_grad = config.optimizer.clip_grad
        self.config = config
        if objective.causal and config.objective.attention_annealing:
            raise UserError(
                f"objective.attention_annealing: attention of {objective.name} is always causal; set it to 0"
            )
        core = chunks[0].config
        embedding = getattr(unwrap_model(chunks[0]), "embedding", None)  # of the first pipeline stage
        if config.objective.mask_noise is not None and embedding is not None:
            mask_token_id = getattr(objective, "mask_token_id", None)
            if mask_token_id is None:
                raise UserError(f"objective.mask_noise: {objective.name} does not tell its mask_token_id; set null")
            self.mask_noise = MaskNoise(embedding, mask_token_id, sequence_parallel=core.sequence_parallel)
        core.finalize_model_grads_func = finalize_model_grads
        core.grad_scale_func = optimizer.scale_loss

    def corrupt(self, batches: Sequence[CleanBatch]) -> list[CorruptedBatch]:
        """`corrupt`, as this run says."""
        return corrupt(self.config, self.objective, batches)

    def train(
        self, batches: Sequence[CorruptedBatch], judge: Judge = not_finite, votes: Sequence[float] = ()
    ) -> StepReport:
        """One optimizer step on this rank's micro-batches of a global batch.

        Args:
            batches: the micro-batches.
            judge: from loss and gradient norm, why the update must be left out, or None to make it; the same function
                on every rank.
            votes: this rank's, as many as every other's; they travel with the step's figures.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self.predict(batches, forward_only=False)
        self.optimizer.prepare_grads()
        report = self._agreed(batches, outputs, votes)
        report = replace(report, fault=judge(report.loss, report.grad_norm))
        if report.fault is None:
            self._update(report.grad_norm)
        return report

    def _update(self, grad_norm: float) -> None:
        if self.clip_grad > 0.0:
            for part in self.optimizer.chained_optimizers:
                parameters = part.get_parameters()
                if parameters:
                    clip_grad_by_total_norm_fp32(parameters, self.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()
        if self.config.train.ema_decay is not None:
            ema.update(self.optimizer, self.config.train.ema_decay, optimizer_updates(self.optimizer))

    def _agreed(
        self, batches: Sequence[CorruptedBatch], outputs: list[PredictionLoss], votes: Sequence[float]
    ) -> StepReport:
        """The step's figures, in one sum over all ranks: a last bit that differs must not make some ranks update.

        Loss and metrics are sums over micro-batches and ranks, divided by global counts; the gradient norm is the root
        of a sum of squares, and not finite where any rank's part is not: one device that computes wrongly is enough.
        """
        names = self.objective.metric_names
        sums = torch.zeros(2 + 2 * len(names), dtype=torch.float64, device=self.world.device)
        # Of a replica's last pipeline stage one rank speaks; the others have the same figures, or none.
        is_first = self.row_slice.is_first and parallel_state.get_tensor_model_parallel_rank() == 0
        if self.world.is_last_stage and is_first:
            for batch, output in zip(batches, outputs, strict=True):
                pairs = self.objective.reduce(output.nll_M, batch)
                sums[0] += output.loss
                sums[1] += batch.denominator
                for number, name in enumerate(names):
                    sums[2 + 2 * number] += pairs[name][0]
                    sums[3 + 2 * number] += pairs[name][1]
        own = torch.tensor(votes, dtype=torch.float64).to(self.world.device)
        table = torch.cat((self._squared_norm()[None], sums, own))
        dist.all_reduce(table)
        squares, loss_sum, count, *figures = table.tolist()
        totals, counted = figures[: len(sums) - 2], figures[len(sums) - 2 :]
        means = zip(names, totals[::2], totals[1::2], strict=True)
        return StepReport(
            loss=loss_sum / max(count, 1.0),
            grad_norm=math.sqrt(squares) if math.isfinite(squares) else math.nan,
            fault=None,
            metrics={name: total / number if number else math.nan for name, total, number in means},
            votes=counted,
        )

    def _squared_norm(self) -> torch.Tensor:
        """This rank's part of the squared gradient norm, fp64: summed over all ranks it is the whole."""
        squares = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for part in self.optimizer.chained_optimizers:
            # megatron-core's own norm without apex waits for the device once per tensor.
            norm = get_total_norm(gradients_of_norm(part), foreach=True).to(squares)
            # The group holds every gradient once, and there may be several such groups, each with all of them.
            squares += norm**2 * (part.get_grad_stats_parallel_group().size() / self.world.size)
        return squares
