"""Everything that makes a torch without a device hold fake tensors on "cuda" and megatron-core build on them.

For a process of its own (`megatron_md.simulate.worker`): it changes torch for good. The counterpart for a real run on
the CPU is `megatron_md/cpu.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

_TYPE_NAMES = {torch.bfloat16: "BFloat16", torch.float32: "Float", torch.float16: "Half"}


class _Stream:
    """A stream on which nothing runs."""

    device_index = 0

    def __init__(self, *args: Any, **keys: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


def activate(compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Pretend a CUDA device, and the job that RANK and WORLD_SIZE tell; to be called before megatron-core is imported.

    Args:
        compiled: stands for torch.compile, by which megatron-core fuses elementwise operations.
    """
    cuda: Any = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda device=None: "simulated"
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: nullcontext()
    cuda.Stream = cuda.Event = _Stream
    for name in ("set_device", "manual_seed", "manual_seed_all", "synchronize", "empty_cache", "_lazy_init"):
        setattr(cuda, name, lambda *args, **keys: None)
    replaced: dict[Any, dict[str, Any]] = {
        torch: {"compile": lambda function=None, **keys: compiled if function is None else compiled(function)},
        torch.nn.Module: {"_apply": _apply},
        dist: {"all_gather_object": _all_gather_object, "broadcast_object_list": lambda *args, **keys: None},
    }
    for owner, members in replaced.items():
        for name, value in members.items():
            setattr(owner, name, value)
    torch._C._set_only_lift_cpu_tensors(True)  # a literal stays on the host until it is copied

    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import random as core_random

    from megatron_md import parallel
    from megatron_md.model import block_attention

    block_attention.attend_by_tiles = _flash_in_blocks
    gpt_layer_specs.HAVE_TE = False  # its kernels take real tensors only
    core_random._get_cuda_rng_state = lambda *args, **keys: torch.empty(0)
    core_random._set_cuda_rng_state = lambda *args, **keys: None

    parallel._init_process_group = _join


def _join(device: torch.device, timeout: timedelta) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())


def fake_tensors() -> FakeTensorMode:
    """The mode in which tensors have a shape, a type and a device, and no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _flash_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Any, scale: float
) -> torch.Tensor:
    """A flash kernel over as many pairs as FlexAttention's tiles of 128 hold: (L + S) / 2 keys for each query."""
    seen = min(len(key), (rows.length + max(rows.block_size, 128)) // 2)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key[:seen], value[:seen]))
    return _flash(query, key, value, scale=scale).permute(2, 0, 1, 3)


def _all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
    objects[:] = [own] * len(objects)


def _apply(module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """`Module._apply` by new parameters: torch would swap tensors in place, which fails where a weak reference is."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for table in (module._parameters, module._buffers):
        for name, old in table.items():
            if old is None:
                continue
            with torch.no_grad():
                new = function(old)
            if new is not old and isinstance(old, torch.nn.Parameter):
                new = torch.nn.Parameter(new, old.requires_grad)
                marks = {key: value for key, value in vars(old).items() if key not in vars(new)}
                vars(new).update(marks)
            table[name] = new  # type: ignore[assignment]
    return module


class CudaKernels(TorchFunctionMode):
    """Calls that depend on a device's kernels, as a CUDA device answers them.

    Args:
        fused: makes a function one kernel in the eyes of whoever counts kernels.
    """

    def __init__(self, fused: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        super().__init__()
        self._norm, self._norm_backward = fused(_fused_rms_norm), fused(_fused_rms_norm_backward)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        keys = kwargs or {}
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and args[0].dtype in _TYPE_NAMES:
            # The distributed optimizer tells data types apart by this name.
            return f"torch.cuda.{_TYPE_NAMES[args[0].dtype]}Tensor"
        if func is torch.tensor:
            device = keys.pop("device", None)
            literal = func(_plain(args[0]), **keys)
            # Not copied to the device: a fake tensor whose value is known would be computed with there.
            return literal if device is None else torch.empty(literal.shape, dtype=literal.dtype, device=device)
        if func is F.scaled_dot_product_attention:
            return _flash(*args, **keys)
        if func is F.rms_norm:
            return self._rms_norm(*args, **keys)
        return func(*args, **keys)

    def _rms_norm(
        self, input: torch.Tensor, normalized_shape: Any, weight: torch.Tensor, eps: float | None = None
    ) -> torch.Tensor:
        normed: torch.Tensor = _RMSNorm.apply(input, weight, self._norm, self._norm_backward)
        return normed


def _fused_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of torch's kernel: the output, and a reciprocal root mean square for each row."""
    return torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _fused_rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    """torch's RMSNorm on CUDA; a build without CUDA lacks the kernel and takes it apart into some ten others."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, norm: Any, backward: Any) -> torch.Tensor:
        normed: torch.Tensor
        normed, rstd = norm(x, weight)
        ctx.save_for_backward(x, rstd, weight)
        ctx.kernel = backward
        return normed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.kernel(grad, *ctx.saved_tensors), None, None


def _plain(value: Any) -> Any:
    """Nested lists of numbers for nested lists of tensors of one entry."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, torch.Tensor) else value


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The flash kernel, which torch takes on CUDA where there is no mask."""
    assert attn_mask is None
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    context: torch.Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return context
