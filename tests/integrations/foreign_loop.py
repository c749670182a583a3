"""A loop that is not ours: the one of megatron-core's own example, with megatron-core's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_md.config import Config
from megatron_md.config.training import LRScheduleConfig
from tests.small_run import LENGTH, ROWS
from tests.train.test_trainer import config_for

STEPS = 4
StageOf = Callable[[Any, int | None], Any]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor2": (2, {"tensor": 2}),
    "tensor2+sequence": (2, {"tensor": 2, "sequence_parallel": True}),
    "pipeline2": (2, {"pipeline": 2}),
    "pipeline2-interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "data2": (2, {}),
}


def start(config: Config) -> None:
    """Process groups as another trainer makes them."""
    import os

    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_md import cpu

    cpu.activate()
    alone = {} if "RANK" in os.environ else {"init_method": "tcp://127.0.0.1:0", "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    layout = config.parallel
    virtual = layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, virtual)
    model_parallel_cuda_manual_seed(123, inference_rng_tracker=True)  # the one that knows no CUDA


def foreign_loop(
    config: Config, steps: int, takes_state: bool = False, stage_of: StageOf | None = None
) -> list[dict[str, float]]:
    """Train by megatron-core's parts alone; each step's figures, averaged as Megatron-LM averages reports."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_md.integrations.bridge import DiffusionTask
    from megatron_md.parallel import shutdown

    start(config)
    task, keys, virtual = DiffusionTask(config), config.optimizer, config.parallel.virtual_pipeline
    build = task.model_provider if stage_of is None else partial(stage_of, task)
    stages = [build(vp_stage=stage if virtual > 1 else None) for stage in range(virtual)]
    core, ddp = stages[0].config, DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = [DistributedDataParallel(core, ddp, stage) for stage in stages]
    adam = OptimizerConfig(
        optimizer="adam", lr=keys.lr, min_lr=keys.lr, weight_decay=keys.weight_decay, adam_beta1=keys.beta1,
        adam_beta2=keys.beta2, adam_eps=keys.eps, clip_grad=keys.clip_grad,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(adam, model)
    lr, decay = keys.lr, keys.weight_decay  # set by the scheduler, which leaves norms without decay
    scheduler = OptimizerParamScheduler(optimizer, lr, lr, lr, 0, steps, "constant", decay, decay, steps, "constant")
    core.finalize_model_grads_func, core.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    data: list[Any] = [task.data_iterator() for _ in model]
    forward_step: Any = task.forward_step
    if takes_state:
        state = SimpleNamespace(train_state=SimpleNamespace(consumed_train_samples=0))
        data = [None for _ in model]

        def forward_step(data_iterator: Any, stage: Any) -> Any:
            return task.bridge_forward_step(state, data_iterator, stage)

    micro = config.train.micro_batch_size
    curve = []
    for _ in range(steps):
        for stage in model:
            stage.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if virtual > 1 else data[0],
            model=model if virtual > 1 else model[0],
            num_microbatches=ROWS // micro // parallel_state.get_data_parallel_world_size(),
            seq_length=LENGTH,
            micro_batch_size=micro,
            decoder_seq_length=LENGTH,
            forward_only=False,
        )
        grad_norm = float(optimizer.step()[1])
        scheduler.step(1)
        figures = {"grad_norm": grad_norm}
        for name in reports[0] if reports else ():
            total = torch.vstack([report[name] for report in reports]).sum(0)
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            figures[name] = float(total[0] / total[1])
        curve.append(figures)
    shutdown()
    return curve


def small(folder: Path, corpus: dict[str, str], **sections: Any) -> Config:
    keys: dict[str, Any] = {"train": {"steps": STEPS}, "validation": {"sequences": 0}}
    keys["optimizer"] = {"lr_schedule": LRScheduleConfig(name="constant")}
    return config_for(folder, corpus, **{**keys, **sections})


def assert_same(curves: list[list[dict[str, float]]], ours: list[dict[str, Any]], first: float = 2e-7) -> None:
    """The first step alike to rounding, those after it, which make that grow, as between layouts."""
    reporting = 0
    for curve in curves:
        assert len(curve) == len(ours) == STEPS
        for step, (found, expected) in enumerate(zip(curve, ours, strict=True)):
            rtol = 1e-5 if step else first
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=rtol)
            reporting += "lm loss" in found
            if "lm loss" in found:  # the last pipeline stage
                assert found["lm loss"] == pytest.approx(expected["loss"], rel=rtol)
                assert found["masked_ce"] == pytest.approx(expected["masked_ce"], rel=rtol)
                assert found["mean_mask_rate"] == pytest.approx(expected["mean_mask_rate"], rel=rtol)
    assert reporting >= STEPS
