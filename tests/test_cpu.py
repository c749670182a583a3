"""The stand-ins do what they claim, in this thread only, and the corrupting settings are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_md import cpu
from megatron_md.config import Config
from megatron_md.model.build import transformer_config
from megatron_md.parallel import World


def test_cuda_literals_mean_the_cpu(world: World) -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device(), pin_memory=True).device.type == "cpu"
    tensor = torch.ones(3)
    assert tensor.cuda() is tensor and tensor.pin_memory() is tensor
    assert tensor.type() == "torch.cuda.FloatTensor" and tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.float64).dtype is torch.float64
    torch.cuda.synchronize()


def test_suspended_code_sees_plain_torch(world: World) -> None:
    with cpu.suspended():
        assert torch.ones(1).type() == "torch.FloatTensor"
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1, device="cuda")
    assert torch.zeros(1, device="cuda").device.type == "cpu"


def test_a_second_activation_changes_nothing(world: World) -> None:
    mode = cpu._mode
    cpu.activate()
    assert cpu._mode is mode


@pytest.mark.parametrize("wrong", [{"deallocate_pipeline_outputs": True}, {"overlap_p2p_comm": False}])
def test_settings_that_corrupt_silently_are_refused(small_config: Config, world: World, wrong: dict[str, bool]) -> None:
    interleaved = replace(small_config, parallel=replace(small_config.parallel, pipeline=2, virtual_pipeline=2))
    core = transformer_config(replace(interleaved, model=replace(interleaved.model, layers=4)), world.device)
    for key, value in wrong.items():
        setattr(core, key, value)
    with pytest.raises(AssertionError, match="gloo"):
        cpu.assert_safe_transformer_config(core)
