"""What has to hold on every device: on the CPU in every run of the tests, and by the same functions on CUDA."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_md.cli import main
from megatron_md.parity.validate import default_reference
from tests.checkpoint.legs import SHARDED, leg, legs_config
from tests.ranks import run_ranks
from tests.small_run import variant
from tests.test_docs import first_steps_of_the_record
from tests.train.test_step import LAYOUTS, assert_same, train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def fp32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the ranks, which are started anew: TF32 keeps ten bits of the mantissa, the CPU all of them."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")


def on(device: str, **sections: dict[str, Any]) -> Any:
    """The small run on a device."""
    return variant(**{**sections, "train": {**sections.get("train", {}), "device": device}})


@on_every_device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_are_the_same_to_the_bit(device: str, precision: str) -> None:
    keys = {"deterministic": True, "precision": precision}
    config = on(device, parallel={"distributed_optimizer": True}, train=keys)
    (first,), (second,) = (run_ranks(train, 1, config, 5) for _ in range(2))
    assert first["curve"] == second["curve"]
    for (name, *_, values), (_, *_, again) in zip(first["shards"], second["shards"], strict=True):
        np.testing.assert_array_equal(values, again, err_msg=name)


@on_every_device
def test_bf16_follows_the_curve_of_fp32(device: str) -> None:
    exact, rounded = (
        np.array(run_ranks(train, 1, on(device, parallel=SHARDED, train={"precision": precision}), 20)[0]["curve"])
        for precision in ("fp32", "bf16")
    )
    np.testing.assert_allclose(rounded[:, 0], exact[:, 0], rtol=0.01)  # loss
    np.testing.assert_allclose(rounded[:, 1], exact[:, 1], rtol=0.05)  # gradient norm
    np.testing.assert_array_equal(rounded[:, 3], exact[:, 3])  # mask rates: no rounding may touch them
    assert not np.array_equal(rounded[:, 0], exact[:, 0]), "bf16 was not used"


def head_and_full_logits(device: str, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Loss and gradients of hidden states and weight: from our head, and from logits of all positions."""
    from megatron_md.model.head import Prediction, masked_cross_entropy

    generator = torch.Generator().manual_seed(0)
    rows, width, vocab, excluded = 512, 64, 1000, 7
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) / 8).to(device, dtype).requires_grad_()
    positions = torch.randperm(rows, generator=generator)[:200].to(device)
    targets = torch.randint(excluded + 1, vocab, (200,), generator=generator).to(device)
    weights = torch.rand(200, generator=generator).to(device) + 0.5
    never = torch.tensor([excluded], device=device)
    ours = masked_cross_entropy(
        hidden.index_select(0, positions),
        weight,
        Prediction(positions, targets, weights),
        first_token=0,
        excluded=never,
        chunk=64,
    ).loss
    logits = (hidden @ weight.t()).float().index_fill(1, never, float("-inf"))
    full = (F.cross_entropy(logits[positions], targets, reduction="none") * weights).sum()
    found = [[loss.detach(), *torch.autograd.grad(loss, (hidden, weight))] for loss in (ours, full)]
    return [[tensor.float().cpu() for tensor in tensors] for tensors in found]


@on_every_device
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_the_head_is_a_cross_entropy_over_full_logits(device: str, dtype: torch.dtype, rtol: float) -> None:
    ours, full = run_ranks(head_and_full_logits, 1, device, dtype)[0]
    for found, expected in zip(ours, full, strict=True):
        difference = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
        assert float(difference) < rtol


@on_every_device
def test_the_recorded_parity_run_is_found_again(device: str, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text(default_reference().read_text() if device == "cuda" else first_steps_of_the_record(2))
    words = ["parity", "validate", f"train.device={device}", "--reference", str(record)]
    assert run_ranks(main, 1, words, timeout=900.0) == [0]


# On the CPU these are tests/train/test_step.py's.
@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, (size, _) in LAYOUTS.items() if size > 1])
def test_layouts_over_nccl_reproduce_one_device(name: str) -> None:
    size, layout = LAYOUTS[name]
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    alone = run_ranks(train, 1, on("cuda", parallel=SHARDED), 5)
    assert_same(run_ranks(train, size, on("cuda", parallel=layout), 5), alone[0])


def local_leg(config: Any, run: Path, first: int, stop: int, save: bool) -> Any:
    """`leg`, from our own layers, whatever is installed."""
    from megatron_md.model import build

    build.use_transformer_engine = lambda device: False  # this process ends with the test
    return leg(config, run, first, stop, save)


# On the CPU tests/checkpoint/test_layer_forms.py has layers of Transformer Engine's form.
@pytest.mark.gpu
@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine")
@pytest.mark.parametrize("legs", [(leg, local_leg), (local_leg, leg)], ids=["out of Transformer Engine", "into it"])
def test_a_run_resumes_with_the_other_layers(legs: Any, tmp_path: Path) -> None:
    config = legs_config(SHARDED, tied=True, precision="bf16")
    config = variant(config, train={"device": "cuda"})
    parts = [run_ranks(one, 1, config, tmp_path / "run", 3 * n, 3 * n + 3, True)[0] for n, one in enumerate(legs)]
    whole = run_ranks(legs[0], 1, config, tmp_path / "whole", 0, 6, False)[0]
    losses = np.array([*parts[0], *parts[1]])[:, 0]
    np.testing.assert_allclose(losses, np.array(whole)[:, 0], rtol=0.01)
