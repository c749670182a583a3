"""Every stand-in that megatron-core needs on a machine without CUDA, in one place.

`activate()` is called once per process before a model is built. Where CUDA is the device it is never called.
What a config knob, a layer-spec entry or a subclass can solve is solved there instead: `CPU_TRANSFORMER_CONFIG`
holds the knobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

# Kernels and behaviours of TransformerConfig that exist on CUDA only.
CPU_TRANSFORMER_CONFIG: dict[str, Any] = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "deallocate_pipeline_outputs": False,
    "batch_p2p_comm": False,
    "batch_p2p_sync": False,
}


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaLiteralsOnCpu(TorchFunctionMode):
    """Reads the literals `device="cuda"`, `.cuda()`, `pin_memory` and `torch.cuda.XTensor` as their CPU meaning."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        result = func(*args, **(kwargs or {}))
        # The distributed optimizer tells dtypes apart by `param.type() == 'torch.cuda.FloatTensor'`.
        if func is torch.Tensor.type and len(args) == 1 and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


_mode: _CudaLiteralsOnCpu | None = None


def activate() -> None:
    """Make megatron-core run on the CPU in the calling thread; further calls do nothing.

    Raises:
        RuntimeError: CUDA is initialised in this process, where stand-ins would silently move work to the host.
    """
    global _mode
    if _mode is not None:
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("CPU stand-ins were asked for in a process that already uses CUDA")
    from megatron.core.tensor_parallel import random as core_random

    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.current_stream = lambda device=None: torch.cpu.current_stream()  # type: ignore[assignment, return-value]
    # Recomputation saves and restores the CPU generator by itself; there is no second one here.
    core_random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.empty(0)
    core_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: None
    _mode = _CudaLiteralsOnCpu()
    _mode.__enter__()


@contextmanager
def suspended() -> Iterator[None]:
    """Within it, torch's literals mean what they say again (for code that knows nothing of megatron-core)."""
    if _mode is None:
        yield
        return
    _mode.__exit__(None, None, None)
    try:
        yield
    finally:
        _mode.__enter__()


def assert_safe_transformer_config(config: Any) -> None:
    """Check the settings that were seen to corrupt results silently over gloo.

    Raises:
        AssertionError: a setting of `config` (a megatron-core TransformerConfig) is one of them.
    """
    assert not config.deallocate_pipeline_outputs, "deallocate_pipeline_outputs gives wrong losses over gloo"
    if config.virtual_pipeline_model_parallel_size:
        assert config.overlap_p2p_comm and not config.batch_p2p_comm, (
            "interleaving with batched p2p pairs the wrong messages over gloo"
        )
