"""One rank's training step on fake CUDA tensors: the real model, data-parallel module, optimizer and schedule."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from megatron_md import parallel
from megatron_md.batch import CorruptedBatch
from megatron_md.config import ResolvedConfig
from megatron_md.diffusion.objective import build_objective
from megatron_md.model.build import build_model, count_parameters, wrap_data_parallel
from megatron_md.run.estimate import highest_fraction, predicted_fraction
from megatron_md.simulate import fake_cuda
from megatron_md.simulate.meter import Meter
from megatron_md.simulate.stage import CATEGORIES, UPDATE, Collective, Kernel, Stage
from megatron_md.train.optimizer import build_optimizer
from megatron_md.train.step import Stepper

# Groups whose collectives come with every micro-batch; the others' come once a step.
_PER_MICRO_BATCH = ("tensor", "pipeline", "context")
_GROUPS = {
    "tensor": parallel_state.get_tensor_model_parallel_group,
    "pipeline": parallel_state.get_pipeline_model_parallel_group,
    "context": parallel_state.get_context_parallel_group,
    "data": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    "data (of one context rank)": parallel_state.get_data_parallel_group,
    "model": parallel_state.get_model_parallel_group,
    "embedding": lambda: parallel_state.get_embedding_group(check_initialized=False),
    "world": lambda: dist.group.WORLD,
}

# The highest mask rate needs a pass of its own where the head then sees this much more than at the mean rate.
_NOTABLE = 1.1


def simulate_stage(config: ResolvedConfig, meter: Meter, micro_batches: int) -> Stage:
    """Build this rank's part of a run and make steps with it, in the mode of fake tensors.

    The layers of a stage cost the same for each micro-batch: of many micro-batches only as many are run as fill the
    pipeline and one round more, and what a further one costs is the difference.

    Args:
        config: the run.
        meter: what `fake_cuda.activate` got its stand-in for torch.compile from.
        micro_batches: per step.
    """
    world = parallel.initialize(config)
    objective = build_objective(config.objective, seed=config.seed, mask_token_id=config.model.vocab - 1)
    with fake_cuda.CudaKernels(meter.fused), fake_cuda.fake_tensors(), meter:
        chunks: list[Any] = build_model(
            config, world.device, causal=objective.causal, mask_token_id=config.model.vocab - 1, initialize=False
        )
        meter.category = "gradients"
        chunks = wrap_data_parallel(chunks, config)
        gc.collect()
        for chunk in chunks:
            for buffer in chunk.buffers:
                meter.retag(buffer.param_data, "weights")
        meter.category = "optimizer"
        optimizer = build_optimizer(config, chunks)
        gc.collect()
        built, meter.category = meter.now, "activations"
        steps = _Steps(config, meter, Stepper(config, world, chunks, optimizer, objective), micro_batches)
        heads = [chunk.output_layer for chunk in unwrap_model(chunks) if chunk.post_process]
        with meter.watching_modules(heads):
            kernels, collectives = steps.costs()
            if heads:
                steps.raise_mask_rate()
    return Stage(
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        rank=world.rank,
        parameters=count_parameters(chunks),
        micro_batches=micro_batches,
        built=built,
        peak=meter.peak,
        memory={name: meter.at_peak.get(name, 0) for name in CATEGORIES},
        kernels=kernels,
        collectives=collectives,
    )


class _Steps:
    """Steps of a stage with any number of micro-batches."""

    def __init__(self, config: ResolvedConfig, meter: Meter, stepper: Stepper, micro_batches: int) -> None:
        self.config, self.meter, self.stepper, self.micro_batches = config, meter, stepper, micro_batches
        # The interleaved schedule takes whole rounds over the pipeline.
        self.round = config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1
        self.few = min(config.parallel.pipeline, micro_batches)

    def costs(self) -> tuple[list[Kernel], list[Collective]]:
        """Kernels and collectives of a step, from a first step and one that is a round longer."""
        many = self.few + self.round
        # Weights are gathered in the forward pass from the second step on.
        first = self._counted(self.few)
        with nullcontext() if many <= self.micro_batches else self.meter.peak_kept():
            second = self._counted(many)
        kernels, calls, sizes = (
            _Growth(before, after, many, self.round) for before, after in zip(first, second, strict=True)
        )
        return self._kernels(kernels), self._collectives(calls, sizes)

    def raise_mask_rate(self) -> None:
        """A step with all rows at the highest mask rate, for its memory."""
        mean, highest = predicted_fraction(self.config), highest_fraction(self.config)
        if highest > _NOTABLE * mean:
            self._run(min(self.few + self.round, self.micro_batches), highest)

    def _kernels(self, calls: _Growth) -> list[Kernel]:
        found = []
        for key in calls.after:
            often, once = calls.split(key)
            part, kind, name, flops, size = key
            if often:
                found.append(Kernel(part, kind, name, flops, size, round(often * self.micro_batches)))
            if once:
                found.append(Kernel(UPDATE, kind, name, flops, size, round(once)))
        return found

    def _collectives(self, calls: _Growth, sizes: _Growth) -> list[Collective]:
        found, labels = [], group_labels()
        for key in calls.after:
            part, name, group = key
            label, ranks = labels.get(group, (group, ()))
            if part == UPDATE or label not in _PER_MICRO_BATCH:
                found.append(Collective(part, name, label, ranks, calls.after[key], sizes.after[key]))
                continue
            (often, once), (large, rest) = calls.split(key), sizes.split(key)
            if often:
                total, size = round(often * self.micro_batches), round(large * self.micro_batches)
                found.append(Collective(part, name, label, ranks, total, size))
            if once:
                found.append(Collective(UPDATE, name, label, ranks, round(once), round(rest)))
        return found

    def _counted(self, micro_batches: int) -> tuple[Counter[Any], Counter[Any], Counter[Any]]:
        meter = self.meter
        meter.kernels, meter.calls, meter.bytes = Counter(), Counter(), Counter()
        self._run(micro_batches, predicted_fraction(self.config))
        return meter.kernels, meter.calls, meter.bytes

    def _run(self, micro_batches: int, mask_rate: float) -> None:
        batch = uniform_batch(self.config, mask_rate)
        votes = [0.0] * 4  # damaged documents, and a request to stop by each way there is
        with _update_made(self.stepper, self.meter):
            report = self.stepper.train([batch] * micro_batches, lambda loss, grad_norm: None, votes)
        assert report.fault is None


def uniform_batch(config: ResolvedConfig, mask_rate: float) -> CorruptedBatch:
    """A micro-batch in which this share of the positions is predicted, spread evenly."""
    rows, length = config.train.micro_batch_size, config.data.seq_length
    shift = int(config.objective.right_shift)
    count = max(1, min(round(mask_rate * rows * length), rows * length - shift))
    positions_M = shift + np.arange(count, dtype=np.int64) * (rows * length - shift) // count
    block = config.objective.final_block_size
    if block == length:
        block = None
    if block is not None:  # rows [x_t, x_0]
        positions_M += positions_M // length * length
    return CorruptedBatch(
        tokens_BL=np.zeros((rows, length if block is None else 2 * length), dtype=np.int64),
        positions_M=positions_M,
        targets_M=np.zeros(count, dtype=np.int64),
        weights_M=np.ones(count, dtype=np.float32),
        denominator=rows * length,
        mask_rate_B=np.full(rows, mask_rate, dtype=np.float32),
        block_size=block,
    )


@contextmanager
def _update_made(stepper: Stepper, meter: Meter) -> Iterator[None]:
    """Within it, every step clips its gradients and makes its update, and the meter is told when that begins."""
    predict, update = stepper.predict, stepper._update

    def noticed(*args: Any, **keys: Any) -> Any:
        outputs = predict(*args, **keys)
        meter.is_updating, meter.category = True, "optimizer"
        return outputs

    replaced = {"predict": noticed, "_update": lambda grad_norm: update(2.0 * stepper.clip_grad)}
    vars(stepper).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            delattr(stepper, name)  # the class's again
        meter.is_updating, meter.category = False, "activations"


class _Growth:
    """What a step counts, taken apart into a share of each micro-batch and a rest that comes once."""

    def __init__(self, before: Counter[Any], after: Counter[Any], micro_batches: int, more: int) -> None:
        self.before, self.after, self.micro_batches, self.more = before, after, micro_batches, more

    def split(self, key: Any) -> tuple[float, float]:
        """(per micro-batch, once)."""
        often = max(0, self.after[key] - self.before[key]) / self.more
        return often, self.after[key] - often * self.micro_batches


def group_labels() -> dict[str, tuple[str, tuple[int, ...]]]:
    """What each process group of this rank is for, and its global ranks, by the group's name.

    Groups of other names with the same ranks are taken for those here.
    """
    labels: dict[str, tuple[str, tuple[int, ...]]] = {}
    purposes: dict[tuple[int, ...], str] = {}
    for label, get in _GROUPS.items():
        group = get()
        if group is None or isinstance(group, list):
            continue
        ranks = tuple(dist.get_process_group_ranks(group))
        labels.setdefault(group.group_name, (label, ranks))
        purposes.setdefault(ranks, label)
    for group in list(dist.distributed_c10d._world.pg_map):
        ranks = tuple(dist.get_process_group_ranks(group))
        labels.setdefault(group.group_name, (purposes.get(ranks, f"{len(ranks)} ranks"), ranks))
    return labels
