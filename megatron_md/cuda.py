"""What CUDA wants of a process, in one place, as `cpu` has what its absence wants."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Read by CUDA, NCCL and Transformer Engine when they start; docs/cuda.md says what for.
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TORCH_NCCL_HIGH_PRIORITY": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NVTE_FWD_LAYERNORM_SM_MARGIN": "20",
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "20",
}
DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


def prepare_environment() -> None:
    """Set what this process, and those that it starts, will read; what the user has set stays. Call it before torch."""
    for name, value in ENVIRONMENT.items():
        # The allocator's newer name says the same, and both must not be set.
        if name != "PYTORCH_CUDA_ALLOC_CONF" or "PYTORCH_ALLOC_CONF" not in os.environ:
            os.environ.setdefault(name, value)


def activate(device: torch.device) -> None:
    """Take a CUDA device for this process, with fp32 products in TF32 (`NVIDIA_TF32_OVERRIDE=0` turns that off)."""
    import torch

    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
