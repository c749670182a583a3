"""All in which the supported releases of megatron-core differ for us (0.16.1, and 0.19 which needs Python 3.12).

Everything else of ours runs unchanged on both.
"""

from __future__ import annotations

import logging
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

BACKEND = CheckpointingConfig("torch_dist", 1)


def quieten() -> None:
    """Keep back what 0.19 logs of its own plans: that its GPTModel and its writer of checkpoints will go."""
    for name in (
        "models.gpt.gpt_model",
        "dist_checkpointing.strategies.common",
        "dist_checkpointing.strategies.torch",
        "distributed.distributed_data_parallel",
    ):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)


def gradients_of_norm(optimizer: Any) -> list[torch.Tensor]:
    """The gradients that count in an optimizer's gradient norm: each parameter once over all ranks of its group."""
    gradients = getattr(optimizer, "get_grads_for_grad_norm", None) or optimizer.get_main_grads_for_grad_norm
    found: list[torch.Tensor] = gradients()
    return found


class SavePlan(TorchDistSaveShardedStrategy):
    """megatron-core's strategy up to the point where it would start to write."""

    def __init__(self) -> None:
        super().__init__(BACKEND.sharded_backend, BACKEND.sharded_backend_version, thread_count=1)

    def make(self, sharded: Any, directory: Path) -> tuple[Any, Any]:
        """megatron-core's own writer, with what it is to write, and the metadata of all ranks' tensors.

        Args:
            sharded: sharded state without common state.
            directory: where it goes.
        """
        # 0.19 takes NVIDIA's resiliency extension for its writer unless told otherwise.
        keys = {"async_strategy": "mcore"} if "async_strategy" in signature(self.async_save).parameters else {}
        return self.async_save(sharded, directory, **keys)

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *strategy: Any) -> Any:
        _, metadata, _ = save_state_dict_ret
        return writer, metadata


def storage_formats(metadata: dict[str, Any]) -> tuple[Any, Any]:
    """Formats of the sharded and of the common state by a checkpoint's metadata.json.

    0.16 names both; 0.19 knows one format of the common state, and leaves it out.

    Raises:
        KeyError: the sharded one is not there.
    """
    return metadata["sharded_backend"], metadata.get("common_backend", "torch")
