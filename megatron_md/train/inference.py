"""A model that is only looked at, on any layout: logits for samplers, negative log-likelihoods for estimators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.nn.functional import cross_entropy

from megatron_md.batch import CorruptedBatch, Int64Array
from megatron_md.config import ResolvedConfig
from megatron_md.diffusion.proposal import guide
from megatron_md.errors import UserError
from megatron_md.model.kept_rows import KeptRows
from megatron_md.parallel import World, sum_over_ranks
from megatron_md.train.step import ForwardPass


class Inference(ForwardPass):
    """A denoiser (tokens [B, L] -> logits fp32 [B, L, V]) and a `Scorer`; every rank makes the same calls.

    A causal model predicts each position from those to its left, so that filling a canvas in blocks of one token is its
    own left-to-right sampling.
    """

    def __init__(
        self, config: ResolvedConfig, world: World, chunks: list[Any], *, causal: bool, mask_token_id: int
    ) -> None:
        super().__init__(config, world, chunks)
        self.causal, self.right_shift, self.block_size = causal, self.shift.enabled, config.objective.final_block_size
        self.data_rank, self.data_size, self.device = world.data_rank, world.data_size, world.device
        self.max_length = config.model.max_length
        self._vocab = config.model.vocab
        # What a causal model of ours reads first, as in training; a right-shifted one reads the row itself.
        self._bos_token_id = mask_token_id if causal and not self.right_shift else None

    def __call__(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [B, L, V] of token ids on this rank's device, -inf for tokens that are never predicted.

        Every rank of a replica of the model calls this with the same tokens, and gets the same logits.
        """
        return self.logits_of_block(tokens_BL, slice(0, tokens_BL.shape[1]))

    def logits_of_block(self, tokens_BL: torch.Tensor, block: slice) -> torch.Tensor:
        """Those of a block of the rows alone: the head, large where the vocabulary is, computes no others."""
        if self.block_size is not None:
            raise UserError("objective.name block_diffusion: a block model gives no logits of whole rows")
        if self._bos_token_id is not None:
            bos_B1 = tokens_BL.new_full((len(tokens_BL), 1), self._bos_token_id)
            tokens_BL = torch.cat((bos_B1, tokens_BL[:, :-1]), dim=1)
        place_K = self.shift.outputs(np.arange(block.start, block.stop)).clip(min=0)  # nothing predicts the first one
        return self._logits_at(tokens_BL, place_K, None)

    @torch.no_grad()
    def negative_log_likelihoods(self, batches: Sequence[CorruptedBatch]) -> list[np.ndarray[Any, Any]] | None:
        """Each batch's nll_M in nats, without gradients; None on ranks that do not hold the last pipeline stage."""
        with self._looking():
            outputs = self.predict(batches, forward_only=True)
        return [output.nll_M.cpu().numpy() for output in outputs] if self.world.is_last_stage else None

    @torch.no_grad()
    def guided_negative_log_likelihoods(
        self, batches: Sequence[CorruptedBatch], without_prompt: Sequence[Int64Array], guidance: float
    ) -> list[np.ndarray[Any, Any]] | None:
        """Each batch's nll_M in nats of guided logits, of which all of a batch are held twice; None as above."""
        found = []
        for batch, unprompted_BL in zip(batches, without_prompt, strict=True):
            conditional_MV, unconditional_MV = (
                self(torch.from_numpy(tokens_BL).to(self.device)).flatten(0, 1)[batch.positions_M]
                for tokens_BL in (batch.tokens_BL, unprompted_BL)
            )
            guided_MV = guide(conditional_MV, unconditional_MV, guidance)
            targets_M = torch.from_numpy(batch.targets_M).to(self.device)
            found.append(cross_entropy(guided_MV, targets_M, reduction="none").cpu().numpy())
        return found if self.world.is_last_stage else None

    def sum_over_ranks(self, figures: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel ranks of what the last pipeline stages hold, given to every rank (on the CPU)."""
        return sum_over_ranks(figures, self.world)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """The model in evaluation mode, and never in fp8, which takes few lengths; training may go on behind it."""
        training = [chunk for chunk in self.chunks if chunk.training]  # a change of mode visits every module
        core = self.chunks[0].config  # one for all layers and chunks
        fp8, core.fp8 = core.fp8, None
        for chunk in training:
            chunk.eval()
        try:
            yield
        finally:
            core.fp8 = fp8
            for chunk in training:
                chunk.train()

    def _from_last_stage(self, logits_BLV: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
        """The last pipeline stage's logits, given to every stage."""
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            assert logits_BLV is not None
            return logits_BLV
        if logits_BLV is None:
            logits_BLV = torch.empty((*shape, self._vocab), dtype=torch.float32, device=self.device)
        logits_BLV = logits_BLV.contiguous()
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(logits_BLV, src=source, group=parallel_state.get_pipeline_model_parallel_group())
        return logits_BLV

    def logits_of_slice(self, tokens_BL: torch.Tensor, wanted: slice, rows: KeptRows) -> torch.Tensor:
        """Logits fp32 [B, K, V] at the `wanted` places of a slice of rows, whose other keys and values are kept.

        Args:
            tokens_BL: the slice's token ids.
            wanted: places in the slice.
            rows: where the slice lies, and what is kept; it keeps more then.
        """
        return self._logits_at(tokens_BL, np.arange(wanted.start, wanted.stop), rows)

    @torch.no_grad()
    def _logits_at(self, tokens_BL: torch.Tensor, place_K: Int64Array, rows: KeptRows | None) -> torch.Tensor:
        """Logits fp32 [B, K, V] at places of tokens, which are whole rows or the slice that `rows` says."""
        count, length = tokens_BL.shape
        position_M = (np.arange(count)[:, None] * length + place_K).flatten()
        here, own_M = self.row_slice.find(position_M, length)
        step = partial(self._logits_step, torch.from_numpy(own_M).to(self.device), rows)
        with self._looking():
            outputs = self.through(step, [tokens_BL], (count, length), forward_only=True, collect_non_loss_data=True)
        logits_BKV = None
        if self.world.is_last_stage:
            whole_MV = self.row_slice.whole_logits(outputs[0], here, len(position_M))
            logits_BKV = whole_MV.unflatten(0, (count, len(place_K)))
        return self._from_last_stage(logits_BKV, (count, len(place_K)))

    def _logits_step(
        self, position_M: torch.Tensor, rows: KeptRows | None, iterator: Iterator[torch.Tensor], model: Any
    ) -> tuple[Any, Any]:
        inputs = self.inputs(next(iterator), start=rows.start if rows else 0)
        return model(*inputs, None, labels=position_M, packed_seq_params=rows), lambda logits, non_loss_data: logits
