"""The loops that the benchmarks of the step compare: ours through megatron-core, and one of plain PyTorch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from plain_transformer import PlainTransformer

from megatron_md import cpu
from megatron_md.batch import BatchPosition, CleanBatch, CorruptedBatch
from megatron_md.config import ResolvedConfig
from megatron_md.diffusion.objective import build_objective
from megatron_md.parallel import World
from megatron_md.train.step import Stepper, corrupt

MASK = 3


def random_rows(config: ResolvedConfig, documents: int | None = None) -> list[CleanBatch]:
    """The micro-batches of a step on one process, in documents of a length or none."""
    length, rows, size = config.data.seq_length, config.train.global_batch_size, config.train.micro_batch_size
    tokens = np.random.default_rng(0).integers(MASK + 1, config.model.vocab, (rows, length))
    boundaries = np.append(np.arange(0, length, documents or length), length).astype(np.int32)
    position = BatchPosition(0, rows)
    return [
        CleanBatch(
            tokens[first : first + size],
            np.ones((size, length), dtype=bool),
            np.arange(first, first + size),
            position,
            cu_seqlens=[boundaries] * size,
        )
        for first in range(0, rows, size)
    ]


def corrupted(config: ResolvedConfig, rows: Sequence[CleanBatch]) -> list[CorruptedBatch]:
    """What our step makes of them."""
    return corrupt(config, build_objective(config.objective, seed=config.seed, mask_token_id=MASK), rows)


def build_stepper(config: ResolvedConfig, world: World) -> Stepper:
    """Our model, optimizer and step."""
    from megatron_md.model.build import build_model, wrap_data_parallel
    from megatron_md.train.optimizer import build_optimizer, set_hyperparameters

    objective = build_objective(config.objective, seed=config.seed, mask_token_id=MASK)
    chunks = build_model(config, world.device, causal=False, mask_token_id=MASK, initialize=False)
    for parameter in chunks[0].parameters():
        if parameter.dim() > 1:  # on the device: our own weights, the same in every layout, are drawn on the host
            torch.nn.init.normal_(parameter, std=config.model.init_std)
    chunks = wrap_data_parallel(chunks, config)
    optimizer = build_optimizer(config, chunks)
    set_hyperparameters(optimizer, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)
    return Stepper(config, world, chunks, optimizer, objective)


class PlainLoop:
    """The yardstick: the same shape, rows, masks and settings in plain PyTorch, fp32 weights, autocast on CUDA."""

    def __init__(
        self, config: ResolvedConfig, batches: Sequence[CorruptedBatch], device: torch.device, *, compiled: bool = False
    ) -> None:
        self.model, self.keys, self.device = config.model, config.optimizer, device
        self.plain = PlainTransformer(config.model, config.model.vocab).to(device)
        self.run = torch.compile(self.plain) if compiled else self.plain
        self.adamw = torch.optim.AdamW(
            self.plain.parameters(),
            self.keys.lr,
            (self.keys.beta1, self.keys.beta2),
            self.keys.eps,
            self.keys.weight_decay,
            fused=True,
        )
        self.batches = [
            [torch.from_numpy(a).to(device) for a in (b.tokens_BL, b.positions_M, b.targets_M, b.weights_M)]
            for b in batches
        ]
        self.count = sum(batch.denominator for batch in batches)
        self.excluded = torch.tensor([MASK], device=device)

    def full_logits(self) -> None:
        """A step with logits at every position."""
        self._step(self._full_logits)

    def our_head(self) -> None:
        """A step with our head at the masked positions."""
        self._step(self._our_head)

    def _step(self, loss: Callable[..., torch.Tensor]) -> None:
        # The yardstick pays nothing for our stand-ins.
        is_cuda = self.device.type == "cuda"
        with cpu.suspended(), torch.autocast(self.device.type, torch.bfloat16, enabled=is_cuda):
            self.adamw.zero_grad()
            for tokens, *prediction in self.batches:
                (loss(self.run(tokens), *prediction) / self.count).backward()
            torch.nn.utils.clip_grad_norm_(self.plain.parameters(), self.keys.clip_grad)
            self.adamw.step()

    def _full_logits(
        self, hidden_BLD: torch.Tensor, positions_M: torch.Tensor, targets_M: torch.Tensor, weights_M: torch.Tensor
    ) -> torch.Tensor:
        logits_BLV = F.linear(hidden_BLD, self.plain.output)
        nll_M = F.cross_entropy(logits_BLV.flatten(0, 1)[positions_M], targets_M, reduction="none")
        return (nll_M * weights_M).sum()

    def _our_head(
        self, hidden_BLD: torch.Tensor, positions_M: torch.Tensor, targets_M: torch.Tensor, weights_M: torch.Tensor
    ) -> torch.Tensor:
        from megatron_md.model.head import Prediction, masked_cross_entropy

        hidden_MD = hidden_BLD.reshape(-1, self.model.hidden).index_select(0, positions_M)
        return masked_cross_entropy(
            hidden_MD,
            self.plain.output.to(hidden_MD.dtype),
            Prediction(positions_M, targets_M, weights_M),
            first_token=0,
            excluded=self.excluded,
            chunk=1024,
        ).loss


def timed(step: Callable[[], None]) -> float:
    """Seconds of a step, until the device is done."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory_of(step: Callable[[], None], *, whole: bool = False) -> float:
    """GiB by which the resident set, or the device's memory, grows at its peak during two steps.

    Args:
        step: makes a step.
        whole: count what is taken before the steps as well.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        taken = 0 if whole else torch.cuda.memory_allocated()
        for _ in range(2):
            step()
        return (torch.cuda.max_memory_allocated() - taken) / 2**30
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = 0 if whole else process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        step()
    done.set()
    watcher.join()
    return (peak - before) / 2**30
