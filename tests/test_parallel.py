"""Process groups, device and seeds: a job's places, and what an error leaves behind."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_md import cuda, parallel
from megatron_md.config import Config, ParallelConfig, TrainConfig
from tests.ranks import run_ranks


def place(config: Config) -> parallel.World:
    with parallel.session(config) as world:
        return world


@pytest.mark.distributed
def test_every_rank_has_its_place() -> None:
    layout = ParallelConfig(pipeline=2)
    first, second = run_ranks(place, 2, Config(parallel=layout))
    assert (first.rank, second.rank) == (0, 1) and first.size == second.size == 2
    assert first.is_main and not second.is_main
    assert second.is_last_stage and not first.is_last_stage
    assert first.data_size == 1
    shares = run_ranks(place, 2, Config())
    assert [(world.data_rank, world.data_size, world.is_last_stage) for world in shares] == [(0, 2, True), (1, 2, True)]


def opened_after_errors(config: Config) -> list[bool]:
    """Whether groups are open after an error in the work, after one before it, and after work that ends well."""
    found = []
    for broken in (config, replace(config, parallel=ParallelConfig(tensor=3)), config):
        try:
            with parallel.session(broken):
                if not found:
                    raise ValueError("in the work")
        except (ValueError, RuntimeError):
            pass
        found.append(dist.is_initialized())
    return found


@pytest.mark.distributed
def test_an_error_in_a_lone_process_leaves_no_groups() -> None:
    assert run_ranks(opened_after_errors, 1, Config()) == [[False, False, False]]


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=r"train.device=auto or cpu"):
        parallel.select_device("cuda")
    assert parallel.select_device("auto") == parallel.select_device("cpu") == torch.device("cpu")
    assert parallel.peak_flops(torch.device("cpu"), "bf16") is None


def test_the_peak_is_that_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    device = torch.device("cuda")
    assert parallel.peak_flops(device, "bf16") == 989e12 and parallel.peak_flops(device, "fp8") == 2 * 989e12
    assert parallel.peak_flops(device, "fp32") is None


def test_what_cuda_reads_is_set_unless_the_user_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*cuda.ENVIRONMENT, "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    # The same value as to be set: monkeypatch then knows what to take back.
    for name in cuda.ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    cuda.prepare_environment()
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    cuda.prepare_environment()
    assert {name: os.environ[name] for name in cuda.ENVIRONMENT} == cuda.ENVIRONMENT | {"NCCL_NVLS_ENABLE": "1"}


def kernels(config: Config) -> tuple[bool, str | None, str | None]:
    """Whether a job asks torch for deterministic kernels only, and what it asks cuBLAS and NCCL for."""
    with parallel.session(config):
        wanted = (os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"))
        return (torch.are_deterministic_algorithms_enabled(), *wanted)


@pytest.mark.distributed
def test_deterministic_asks_every_library_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.delenv(name, raising=False)
    assert run_ranks(kernels, 1, Config()) == [(False, None, None)]
    assert run_ranks(kernels, 1, Config(train=TrainConfig(deterministic=True))) == [(True, ":4096:8", "Ring")]
