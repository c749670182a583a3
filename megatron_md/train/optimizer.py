"""AdamW inside megatron-core's (distributed) optimizer; learning rate and weight decay as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.optim.adamw import adamw

from megatron_md.config import Config
from megatron_md.config import OptimizerConfig as OptimizerKeys
from megatron_md.model.build import apply_overrides
from megatron_md.train import ema


class AdamW(torch.optim.Optimizer):
    """torch's fused AdamW with one step counter per parameter group.

    torch.optim.AdamW keeps one counter per parameter. megatron-core restores those as one shared tensor, which is then
    counted up once per parameter (the first resumed loss is right, the rest drift), and fails to restore them at all
    in its fully reshardable format. Here the counter is `group["step"]`, as in the fused optimizers of apex and
    Transformer Engine; exported state dictionaries carry it per parameter as well, where megatron-core looks for it.
    State is allocated at once, so that a checkpoint can be read into it before the first step.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._allocate()
        self.register_load_state_dict_post_hook(lambda optimizer: self._drop_parameter_steps())

    @classmethod
    def in_place_of(cls, other: torch.optim.AdamW) -> AdamW:
        """An optimizer that takes over the parameter groups (the very dicts) of another one that has not stepped."""
        settings = {key: other.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
        # The shards of megatron-core's distributed optimizer are views, which torch's constructor would refuse.
        optimizer = cls([{"params": []}], **settings)
        optimizer.param_groups = other.param_groups
        optimizer._allocate()
        return optimizer

    def _allocate(self) -> None:
        for group in self.param_groups:
            group["step"] = 0
            for parameter in group["params"]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }

    def state_dict(self) -> dict[str, Any]:
        """State as torch's own AdamW exports it, a `step` tensor per parameter included."""
        exported = super().state_dict()
        for group in exported["param_groups"]:
            step = torch.tensor(float(group["step"]))
            for index in group["params"]:
                exported["state"][index] = {**exported["state"][index], "step": step}
        return exported

    def _drop_parameter_steps(self) -> None:
        """After a load: the count goes into the groups and nowhere else."""
        for group in self.param_groups:
            counts = {int(self.state[p].pop("step")) for p in group["params"] if "step" in self.state[p]}
            counts.add(int(group["step"]))
            if len(counts) > 1:
                raise RuntimeError(f"optimizer state holds different step counts {sorted(counts)}: it is damaged")
            group["step"] = counts.pop()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                # The kernel counts each entry up by one itself.
                steps = torch.full((len(params),), float(group["step"]), device=params[0].device).unbind()
                adamw(
                    params,
                    [p.grad for p in params],
                    [self.state[p]["exp_avg"] for p in params],
                    [self.state[p]["exp_avg_sq"] for p in params],
                    [],
                    list(steps),
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
            group["step"] += 1


def learning_rate(keys: OptimizerKeys, step: int, total_steps: int) -> float:
    """Learning rate of the update from `step` to `step + 1`.

    Linear warm-up over `warmup_steps`, times the shape:
    constant; cosine from lr to min_lr; wsd: lr, then linear to min_lr over the last `decay_steps`;
    piecewise: linear between the given [fraction of the run, learning rate] points.
    """
    shape = keys.lr_schedule
    warmup = min(1.0, (step + 1) / shape.warmup_steps) if shape.warmup_steps else 1.0
    if shape.name == "constant" or (step < shape.warmup_steps and shape.name != "piecewise"):
        return keys.lr * warmup
    if shape.name == "cosine":
        length = max(1, (shape.decay_steps or total_steps) - shape.warmup_steps)
        done = min(1.0, (step - shape.warmup_steps) / length)
        return shape.min_lr + (keys.lr - shape.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
    if shape.name == "wsd":
        decay = shape.decay_steps if shape.decay_steps is not None else total_steps // 10
        left = (total_steps - step) / decay if decay else 1.0
        return shape.min_lr + (keys.lr - shape.min_lr) * min(1.0, left)
    return warmup * _interpolate(shape.points, step / total_steps)


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Piecewise-linear function through `points`, constant beyond both ends."""
    (x0, y0), *rest = points
    if x <= x0:
        return y0
    for x1, y1 in rest:
        if x < x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        x0, y0 = x1, y1
    return y0


def build_optimizer(config: Config, chunks: list[Any]) -> MegatronOptimizer:
    """megatron-core's optimizer over DDP-wrapped model chunks.

    Its inner Adam is apex's or Transformer Engine's fused one where megatron-core found them, else `AdamW` above.

    Raises:
        UserError: an unknown field under `megatron.optimizer`.
    """
    keys = config.optimizer
    bf16 = bool(chunks[0].config.bf16)
    fields: dict[str, Any] = dict(
        optimizer="adam",
        lr=keys.lr,
        weight_decay=keys.weight_decay,
        adam_beta1=keys.beta1,
        adam_beta2=keys.beta2,
        adam_eps=keys.eps,
        clip_grad=keys.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
    )
    core = OptimizerConfig(**apply_overrides(fields, config.megatron.optimizer, OptimizerConfig, "optimizer"))
    optimizer = get_megatron_optimizer(core, chunks, use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        if type(part.optimizer) is torch.optim.AdamW:
            part.optimizer = AdamW.in_place_of(part.optimizer)
    if config.train.ema_decay is not None:
        allocate_optimizer(optimizer)
        ema.keep(optimizer)
    return optimizer


def set_hyperparameters(optimizer: MegatronOptimizer, *, lr: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of every parameter group; norms and biases (wd_mult 0) are not decayed."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def optimizer_updates(optimizer: MegatronOptimizer) -> int:
    """Updates that the optimizer counts for its bias correction; skipped steps are not among them."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups if group["params"]), default=0)


def allocate_optimizer(optimizer: MegatronOptimizer) -> None:
    """Make the optimizer's tensors exist before its first step, where its kind would make them only then."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False) or len(part.optimizer.state):
            continue
        if isinstance(part, DistributedOptimizer):
            part.load_state_dict(part.state_dict())
        else:
            part.init_state_fn(part.optimizer, part.config)


def set_optimizer_updates(optimizer: MegatronOptimizer, updates: int) -> None:
    """Set the count of updates after the tensors have been loaded."""
    for group in optimizer.param_groups:
        group["step"] = updates
