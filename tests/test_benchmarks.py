"""The benchmark for one GPU, as far as a CPU can show it: its loops, its figures, what it counts as what."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_md.run.check import check_config
from megatron_md.run.estimate import memory_per_rank, training_flops_per_token
from megatron_md.simulate.guard import compiler

ROOT = Path(__file__).parent.parent
SMALL = ["--device", "cpu", "--eager", "--micro-batches", "2", "--rows", "1", "--layers", "1"]


@pytest.fixture(scope="module")
def one_gpu() -> ModuleType:
    """The script as a module; it finds its neighbours as a script does."""
    folder = str(ROOT / "benchmarks")
    sys.path.append(folder)
    spec = importlib.util.spec_from_file_location("one_gpu", ROOT / "benchmarks/one_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(folder)
    return module


@pytest.mark.slow
def test_both_loops_run_and_are_told(tmp_path: Path, one_gpu: ModuleType) -> None:
    file = tmp_path / "figures.json"
    words = ["tiny", *SMALL, "--repeats", "1", "--warmup", "1", "--hardware", "h100", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/one_gpu.py"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(file.read_text())["results"]
    assert result["shape"] == "tiny (1 of 4 layers), 2x1x128"
    config = one_gpu.config_of(one_gpu.parse(["tiny", *SMALL]), "tiny", 1)
    ours, plain = (result["loops"][loop] for loop in one_gpu.LOOPS)
    everywhere = 256 * training_flops_per_token(config, config.model.vocab, 1.0)
    assert plain["flops"] == everywhere > ours["flops"] > 0.5 * everywhere  # the head at about half of the positions
    for found in (ours, plain):
        assert found["tokens_per_second"] == pytest.approx(256 / found["step_seconds"])
        assert 0.0 < found["outside"] < 1.0
        assert found["seconds_by_class"]["products"] > 0.0 and found["seconds_by_class"]["attention"] > 0.0
    simulated = result["loops"]["ours, h100 simulated"]
    if compiler() is None:
        assert "no C++ compiler" in simulated["failure"]
    else:
        assert 0.0 < simulated["mfu"] < 1.0 and simulated["peak_gib"] > 0.0
    for line in one_gpu.table([result]):
        assert line in done.stdout


KERNELS = {
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>",
        "fmha_cutlassB_bf16_aligned_64x64_k64_sm80",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ],
    "products": [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616>",
        "aten::mm",
        "aten::addmm",
    ],
    "other": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>",
        "triton_red_fused__softmax_0",
        "Memcpy DtoD (Device -> Device)",
        "aten::mul",
        "aten::copy_",
        "aten::_foreach_norm",
    ],
}


@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_are_counted_where_they_belong(kind: str, one_gpu: ModuleType) -> None:
    found = one_gpu.time_by_class(dict.fromkeys(KERNELS[kind], 1.0))
    assert found == {**dict.fromkeys(KERNELS, 0.0), kind: float(len(KERNELS[kind]))}


def test_the_largest_slice_is_one_that_fits(one_gpu: ModuleType) -> None:
    args = one_gpu.parse(["8b", "--device", "cpu"])
    memory = 80 * 2**30
    layers = one_gpu.largest_slice(args, "8b", memory)

    def needed(count: int) -> float:
        config = one_gpu.config_of(args, "8b", count)
        return memory_per_rank(config, check_config(config, 1, corpora=False)).total

    assert 1 < layers < 32
    assert needed(layers) <= one_gpu.ROOM * memory < needed(layers + 1)
    assert one_gpu.largest_slice(args, "8b", 2**60) == 32
    assert one_gpu.largest_slice(args, "8b", 1) == 1


def test_a_loop_that_fails_costs_its_own_line_only(one_gpu: ModuleType) -> None:
    fine = {"tokens_per_second": 1000.0, "mfu": 0.4, "peak_gib": 30.0, "outside": 0.25}
    ours, plain = one_gpu.LOOPS
    head, first, second = one_gpu.table([{"shape": "8b", "loops": {ours: fine, plain: {"failure": "out of memory"}}}])
    assert head.split() == ["shape", "loop", "tokens/s", "MFU", "peak", "outside"]
    assert first.split()[2:] == ["1,000", "40.0%", "30.0", "GiB", "25.0%"]
    assert second.endswith("out of memory")
    *_, last = one_gpu.table([{"shape": "8b", "loops": {ours: fine, plain: {**fine, "tokens_per_second": 500.0}}}])
    assert "ours is 2.00x as fast" in last


@pytest.mark.parametrize(
    ("words", "expected"), [(["2b"], "choose from"), (["1b", "--device", "cuda"], "no CUDA device")]
)
def test_bad_words_are_refused(
    words: list[str], expected: str, one_gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if expected == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        one_gpu.parse(words)
    assert expected in capsys.readouterr().err
