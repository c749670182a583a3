"""Counts what passes between torch and its device: storages alive, FLOPs, memory traffic, collectives."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_md.simulate.stage import ATTENTION, BACKWARD, FORWARD, HEAD, LAYERS, RECOMPUTED, UPDATE

# The allocator of torch hands out multiples of this many bytes.
ALLOCATION = 512

# Operations that move nothing, besides those that torch knows to be views.
_FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift", "prim", "profiler")
# Those that do not read what they write to, and those that touch as much of their table as they give out.
_OVERWRITING = ("aten::copy_", "aten::zero_", "aten::fill_")
_LOOK_UPS = ("aten::embedding", "aten::index", "aten::index_select", "aten::gather")


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _on_device(tree: Any) -> list[torch.Tensor]:
    # `leaf.device` would be an operation of its own.
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cuda"]


class Meter(TorchDispatchMode):
    """Watches every operation; `category` says what newly allocated memory is for.

    Attributes:
        now: bytes allocated.
        peak: most bytes that were.
        at_peak: those by category.
        kernels: calls by (part of the step, kind, operation, FLOPs of a call, bytes of a call).
        calls: collectives by (part, operation, name of the process group).
        bytes: bytes of those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.category, self.is_updating = "weights", False
        self.kernels: Counter[tuple[str, str, str, int, int]] = Counter()
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.bytes: Counter[tuple[str, str, str]] = Counter()
        self._by_category: Counter[str] = Counter()
        self._alive: dict[int, tuple[int, str]] = {}
        self._heads: set[int] = set()
        self._modules: list[int] = []  # whose forward pass is running
        self._fused: list[torch.UntypedStorage] | None = None

    @contextmanager
    def peak_kept(self) -> Iterator[None]:
        """Within it, the peak is not that of the run."""
        before = self.peak, self.at_peak
        yield
        self.peak, self.at_peak = before

    # What runs.

    @property
    def part(self) -> str:
        """The part of the step that is running."""
        if self.is_updating:
            return UPDATE
        return FORWARD if torch._C._current_graph_task_id() == -1 else BACKWARD

    @contextmanager
    def watching_modules(self, heads: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Within it, forward passes of modules are noticed: those of `heads`, and those within a backward pass."""
        self._heads = {id(head) for head in heads}
        before = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs: self._modules.append(id(module))
        )
        after = torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: (self._modules.pop(), None)[1]
        )
        yield
        before.remove()
        after.remove()

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs as one kernel on the device, as torch.compile makes it: nothing in between is stored."""

        @wraps(function)
        def call(*args: Any, **keys: Any) -> Any:
            if self._fused is not None:
                return function(*args, **keys)
            self._fused = []
            inside = self._fused
            try:
                result = function(*args, **keys)
            finally:
                self._fused = None
            references = [weakref.ref(storage) for storage in inside]
            del inside[:]
            for reference in references:
                if (storage := reference()) is not None:
                    self._allocate(storage)
            self._count(function.__name__, 0, sum(map(_size, _on_device((args, keys, result)))))
            return result

        return call

    def _kind(self, part: str) -> str:
        if part == BACKWARD and self._modules:
            return RECOMPUTED
        return HEAD if self._in_head() else LAYERS

    def _in_head(self) -> bool:
        return not self._heads.isdisjoint(self._modules)

    # Memory.

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        category = HEAD if self._in_head() else self.category
        self._alive[key] = size, category
        self._by_category[category] += size
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self._by_category)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        size, category = self._alive.pop(key)
        self._by_category[category] -= size
        self.now -= size

    def retag(self, tensor: torch.Tensor | None, category: str) -> None:
        """Say what a tensor's memory is for."""
        if tensor is None:
            return
        key = tensor.untyped_storage()._cdata
        size, before = self._alive[key]
        self._alive[key] = size, category
        self._by_category[before] -= size
        self._by_category[category] += size

    # Operations.

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        keys = kwargs or {}
        name: str = func._schema.name
        if name == "aten::_local_scalar_dense":  # .item(): nobody knows the value
            return 1.0 if args[0].dtype.is_floating_point else 1
        if name.startswith("c10d::"):
            return self._communicate(func, name[6:].rstrip("_"), args, keys)
        result = func(*args, **keys)
        outputs = _on_device(result)
        if self._fused is not None:
            self._fused += [tensor.untyped_storage() for tensor in outputs]
            return result
        for tensor in outputs:
            self._allocate(tensor.untyped_storage())
        if not func.is_view and not name.startswith(_FREE):
            size = _traffic(func, name, args, keys, outputs)
            if size:
                self._count(name, _flops(func, args, keys, result), size, is_attention="attention" in name)
        return result

    def _count(self, name: str, flops: int, size: int, *, is_attention: bool = False) -> None:
        part = self.part
        kind = self._kind(part)
        if is_attention and kind != RECOMPUTED:
            kind = ATTENTION
        self.kernels[part, kind, name, flops, size] += 1

    def _communicate(self, func: Any, name: str, args: tuple[Any, ...], keys: dict[str, Any]) -> Any:
        group = next(
            (dist.ProcessGroup.unbox(arg).group_name for arg in args if isinstance(arg, torch.ScriptObject)), ""
        )
        key = self.part, name, group
        self.calls[key] += 1
        self.bytes[key] += max((sum(map(_size, _on_device(arg))) for arg in args), default=0)
        if "coalesced" in name:  # the fake group has no kernel for these
            from torch._C._distributed_c10d import FakeWork

            return FakeWork().boxed()
        result = func(*args, **keys)
        for tensor in _on_device(result):
            self._allocate(tensor.untyped_storage())
        return result


def _flops(func: Any, args: tuple[Any, ...], keys: dict[str, Any], result: Any) -> int:
    """FLOPs as torch's own counter has them; half for causal attention, whose kernel leaves out what is hidden."""
    packet = func._overloadpacket
    in_place = packet.__name__.endswith("_")
    count = flop_registry.get(getattr(torch.ops.aten, packet.__name__[:-1], None) if in_place else packet)
    if count is None:
        return 0
    flops = int(count(*args, **keys, out_val=result))
    is_causal = any(argument.name == "is_causal" and value for argument, value in _arguments(func, args, keys))
    return flops // 2 if is_causal else flops


def _arguments(func: Any, args: tuple[Any, ...], keys: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The arguments that a call gives, each with its place in the operation's schema."""
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else keys.get(argument.name)
        if value is not None:
            yield argument, value


def _traffic(func: Any, name: str, args: tuple[Any, ...], keys: dict[str, Any], outputs: list[torch.Tensor]) -> int:
    """Bytes that an operation reads from and writes to the device's memory, each tensor once."""
    if name in _LOOK_UPS:
        return 2 * sum(map(_size, outputs))
    if name == "aten::index_put_":
        return 3 * _size(args[2])
    read, written = 0, 0 if func._schema.is_mutable else sum(map(_size, outputs))
    for argument, value in _arguments(func, args, keys):
        size = sum(min(_size(tensor), tensor.untyped_storage().nbytes()) for tensor in _on_device(value))
        # The fused optimizer would write gradients too, if it had to unscale them.
        is_written = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        written += size if is_written else 0
        if not is_written or not (argument.kwarg_only or name in _OVERWRITING):
            read += size
    return read + written
