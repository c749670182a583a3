"""The meter on fake tensors of a device that need not be there: what it holds alive, and what operations cost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_md import cpu
from megatron_md.simulate.meter import ALLOCATION, Meter
from megatron_md.simulate.stage import FORWARD, LAYERS, UPDATE


@pytest.fixture
def meter() -> Iterator[Meter]:
    meter = Meter()
    with cpu.suspended(), FakeTensorMode(), meter:  # another test of this process may run megatron-core on the CPU
        yield meter


class Product(torch.nn.Module):
    def __init__(self, right: torch.Tensor) -> None:
        super().__init__()
        self.right = right

    def forward(self, left: torch.Tensor) -> torch.Tensor:
        return left @ self.right


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def costs(meter: Meter) -> list[tuple[str, int, int, int]]:
    """(operation, FLOPs, bytes, calls) of what has been counted."""
    return [(name, flops, size, count) for (_, _, name, flops, size), count in meter.kernels.items()]


def test_memory_follows_storages(meter: Meter) -> None:
    one = matrix(100)
    assert meter.now == ALLOCATION
    view = one.view(10, 10)
    assert meter.now == ALLOCATION
    del one
    assert meter.now == ALLOCATION
    two = matrix(1000)
    assert meter.now == 9 * ALLOCATION
    del view, two
    assert (meter.now, meter.peak) == (0, 9 * ALLOCATION)
    assert torch.empty(1000).device.type == "cpu" and meter.now == 0


def test_what_the_peak_holds_adds_up(meter: Meter) -> None:
    weights = matrix(1024)
    meter.category = "activations"
    kept = matrix(256)
    meter.retag(kept, "gradients")
    matrix(512)
    assert meter.at_peak == {"weights": 4096, "gradients": 1024, "activations": 2048}
    assert sum(meter.at_peak.values()) == meter.peak
    with meter.peak_kept():
        matrix(100_000)
    assert meter.peak == 7168
    del weights


def test_products_cost_two_flops_a_multiply_add_and_each_operand_once(meter: Meter) -> None:
    a, b, out = matrix(4, 8), matrix(8, 16), matrix(4, 16)
    a @ b
    torch.mm(a, b, out=out)
    out.addmm_(a, b)
    size = 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert costs(meter) == [("aten::mm", 1024, size, 2), ("aten::addmm_", 1024, size + 4 * 64, 1)]


def test_elementwise_operations_cost_what_they_touch(meter: Meter) -> None:
    a, b = matrix(256), matrix(256)
    a.add_(b)
    a.zero_()
    b.view(16, 16).t()
    a.view(1, 256) * b.expand(3, 256)
    assert costs(meter) == [
        ("aten::add_", 0, 3 * 1024, 1),
        ("aten::zero_", 0, 1024, 1),
        ("aten::mul", 0, 1024 + 1024 + 3 * 1024, 1),
    ]


def test_look_ups_touch_what_they_give_out(meter: Meter) -> None:
    table, rows = matrix(1000, 8), torch.empty(4, dtype=torch.int64, device="cuda")
    table.index_select(0, rows)
    assert costs(meter) == [("aten::index_select", 0, 2 * 4 * 8 * 4, 1)]


def test_causal_attention_counts_half(meter: Meter) -> None:
    heads = matrix(1, 2, 128, 64, dtype=torch.bfloat16)
    for is_causal in (False, True):
        torch.ops.aten._scaled_dot_product_flash_attention(heads, heads, heads, 0.0, is_causal)
    (whole, half) = (flops for _, flops, _, _ in costs(meter))
    assert whole == 2 * half == 4 * 2 * 128 * 128 * 64


def test_a_fused_function_is_one_kernel_that_stores_its_result_only(meter: Meter) -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        return ((x * 2).exp() + 1).sigmoid()

    x = matrix(1024)
    result = meter.fused(chain)(x)
    assert costs(meter) == [("chain", 0, 2 * 4096, 1)]
    assert meter.peak == meter.now == 2 * 4096
    del result
    assert meter.now == 4096


def test_parts_and_kinds(meter: Meter) -> None:
    x = matrix(8)
    x.add_(1)
    meter.is_updating = True
    x.add_(1)
    assert [key[:2] for key in meter.kernels] == [(FORWARD, LAYERS), (UPDATE, LAYERS)]
    head = Product(matrix(8, 4))
    with meter.watching_modules([head]):
        head(matrix(2, 8))
    assert [kind for (_, kind, name, _, _) in meter.kernels if name == "aten::mm"] == ["head"]


def test_numbers_that_nobody_knows_are_one(meter: Meter) -> None:
    assert matrix(1).item() == 1.0
    assert torch.empty(1, dtype=torch.int64, device="cuda").item() == 1
