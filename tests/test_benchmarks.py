"""The benchmarks of one GPU and of decoding, as far as tiny runs on a CPU can show them: what is counted as what."""

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
from tests.ranks import run_ranks
from tests.train.test_trainer import pretrain
from tests.trained_run import run_config

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


# A sampler as LLaDA's repository has it: the likeliest of all proposals of a block, one a step.
STAND_IN = """
import torch

@torch.no_grad()
def generate(model, prompt, *, steps, gen_length, block_length, mask_id):
    assert steps == gen_length
    canvas = torch.cat((prompt, prompt.new_full((1, gen_length), mask_id)), dim=1)
    for step in range(steps):
        end = prompt.shape[1] + (step // block_length + 1) * block_length
        best, token = model(canvas).logits.softmax(-1)[0, :end].max(-1)
        place = best.masked_fill(canvas[0, :end] != mask_id, -1.0).argmax()
        canvas[0, place] = token[place]
    return canvas
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_every_way_of_decoding_is_counted_and_what_is_exact_writes_the_same_texts(
    trained: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    blocks = {"name": "block_diffusion", "block_size": 8}
    for name, objective in (("whole-rows", {}), ("in-blocks", blocks)):
        keys = {"model": {"tied": False, "init_std": 0.1}, "optimizer": {"lr": 1e-9}, "objective": objective}
        run_ranks(pretrain, 1, run_config(trained, name, **keys))
    (tmp_path / "generate.py").write_text(STAND_IN)
    file, script = tmp_path / "figures.json", str(ROOT / "benchmarks/decode.py")
    words = ["--prompt", "8", "--length", "16", "--block", "8", "--prompts", "2", "--repeats", "1"]
    words += ["--llada", str(tmp_path), "--json", str(file)]
    done = subprocess.run(
        [sys.executable, script, str(trained / "whole-rows"), str(trained / "in-blocks"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Fast-dLLM is left out" in done.stdout
    rows, in_blocks = (
        {(way["sampler"], way["strategy"], way["cache"]): way for way in ways}
        for ways in json.loads(file.read_text())["results"].values()
    )
    # Two texts of two blocks of 8 after a prompt of 8. Kept keys: of each block's 8 passes, the first sees all.
    tokens = {"none": 2 * 16 * 24, "prefix": 2 * (2 * 24 + 7 * (16 + 8)), "dual": 2 * (2 * 24 + 7 * 2 * 8)}
    for cache, expected in tokens.items():
        way = rows["ours", "low_confidence", cache]
        assert (way["passes"], way["tokens"]) == (2 * 16, expected)
    theirs = rows["LLaDA", "low_confidence", "none"]
    assert (theirs["passes"], theirs["tokens"]) == (2 * 16, tokens["none"])
    assert theirs["texts"] == rows["ours", "low_confidence", "none"]["texts"]
    # A block model's passes end with the block at hand; kept, the first pass of a block feeds what has settled as well.
    tokens = {"none": 2 * 8 * (16 + 24), "auto": 2 * (16 + 7 * 8 + 16 + 7 * 8)}
    for strategy in ("low_confidence", "threshold", "factor"):
        none, auto = (in_blocks["ours", strategy, cache] for cache in tokens)
        assert none["texts"] == auto["texts"] and none["passes"] == auto["passes"] <= 2 * 16
    for cache, expected in tokens.items():
        way = in_blocks["ours", "low_confidence", cache]
        assert (way["passes"], way["tokens"]) == (2 * 16, expected)
