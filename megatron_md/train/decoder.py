"""Decoding block by block, with keys and values kept between steps.

Of a block model that is exact: its blocks see nothing to their right, so that what is settled to their left does not
change, and one pass feeds the block and what has settled since. A denoiser that sees whole rows has nothing exact to
keep; it may keep what it saw when a block began (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618), of the text before the
block (`prefix`) or of all but the block (`dual`): both approximate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_md.diffusion.sampler_config import CacheName
from megatron_md.errors import UserError
from megatron_md.model.attention import SDPACoreAttention
from megatron_md.model.block_attention import BlockRows
from megatron_md.model.kept_rows import Kept, KeptRows
from megatron_md.train.inference import Inference


@dataclass
class _Canvas:
    """What is kept of a canvas: keys and values, up to which place they are settled, and the block at hand."""

    kept: Kept = field(default_factory=dict)
    settled: int = 0
    block: slice | None = None


class Decoder:
    """Gives a sampler the logits of one block of its canvas after the other; every rank makes the same calls.

    Attributes:
        tokens_computed: tokens that went through the model so far, for all rows.
    """

    def __init__(self, denoiser: Inference, cache: CacheName) -> None:
        """Make one for one canvas, from left to right.

        Args:
            denoiser: the model.
            cache: `auto` keeps what is exact (all of a block model, nothing of others); see `SamplerConfig`.

        Raises:
            UserError: the model cannot keep anything approximately.
        """
        self.denoiser, self.cache = denoiser, cache
        self.tokens_computed = 0
        self._canvases = (_Canvas(), _Canvas())
        if cache in ("prefix", "dual") and (
            denoiser.causal
            or denoiser.right_shift
            or denoiser.block_size is not None
            or not _keeps(denoiser.chunks)
            or denoiser.row_slice.size > 1
        ):
            raise UserError(
                f"cache {cache} is for denoisers that see whole rows and predict each token at its place, with "
                "this package's attention and without context parallelism: leave it out"
            )

    def __call__(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """The denoiser's logits of whole rows."""
        return self.denoiser(tokens_BL)

    def of_block(self, canvas_BL: torch.Tensor, block: slice, *, is_guide: bool = False) -> torch.Tensor:
        """Logits fp32 [B, K, V] of a block of the canvas [B, L], whose tokens before it do not change any more.

        Args:
            canvas_BL: token ids.
            block: where the block lies.
            is_guide: it is the other canvas, without what is given, that guidance asks for.
        """
        canvas = self._canvases[is_guide]
        if self.denoiser.block_size is not None:
            return self._of_block_model(canvas_BL, block, canvas, self.denoiser.block_size)
        if self.cache in ("auto", "none"):
            self.tokens_computed += canvas_BL.numel()
            return self.denoiser.logits_of_block(canvas_BL, block)
        length = canvas_BL.shape[1]
        if canvas.block != block:
            canvas.block = block
            return self._pass(canvas_BL, block, KeptRows(length=length, kept=canvas.kept, keep=length), length)
        is_dual = self.cache == "dual"
        rows = KeptRows(start=block.start, length=length, kept=canvas.kept, sees_after=is_dual)
        return self._pass(canvas_BL, block, rows, block.stop if is_dual else length)

    def _of_block_model(self, canvas_BL: torch.Tensor, block: slice, canvas: _Canvas, size: int) -> torch.Tensor:
        length = canvas_BL.shape[1]
        begin = block.start // size * size
        stop = min(begin + size, length)
        assert block.stop <= stop, "a block of the canvas lies within one of the model's"
        start = canvas.settled
        place = torch.arange(stop, device=canvas_BL.device)
        mask = None
        if start < begin:
            until = begin if self.denoiser.is_clean_causal else 0
            seen = BlockRows(block_size=size, length=length, copies=1, causal_until=until)
            mask = seen.mask(place[start:], place, "slice")
        is_kept = self.cache != "none"
        rows = KeptRows(start=start, length=length, kept=canvas.kept, keep=begin - start if is_kept else 0, mask=mask)
        canvas.settled = begin if is_kept else 0
        return self._pass(canvas_BL, block, rows, stop)

    def _pass(self, canvas_BL: torch.Tensor, block: slice, rows: KeptRows, stop: int) -> torch.Tensor:
        """Feed places `rows.start` to `stop`; logits of the block."""
        tokens_BL = canvas_BL[:, rows.start : stop]
        self.tokens_computed += tokens_BL.numel()
        wanted = slice(block.start - rows.start, block.stop - rows.start)
        return self.denoiser.logits_of_slice(tokens_BL, wanted, rows)


def _keeps(chunks: list[Any]) -> bool:
    """Whether all attention is ours, which alone knows `KeptRows`."""
    return all(isinstance(module, SDPACoreAttention) for chunk in chunks for module in _core_attentions(chunk))


def _core_attentions(chunk: Any) -> Iterator[Any]:
    return (module.core_attention for module in chunk.modules() if hasattr(module, "core_attention"))
