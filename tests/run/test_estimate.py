"""Estimates: parameter counts against published figures, FLOPs against closed forms, memory against its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_md.config import ResolvedConfig, config_from_mapping, resolve
from megatron_md.run.check import check_config
from megatron_md.run.estimate import (
    layers_per_stage,
    memory_per_rank,
    parameter_count,
    predicted_fraction,
    report,
    training_flops_per_token,
)


def config_of(preset: str, vocab: int = 126464, **sections: Any) -> ResolvedConfig:
    model = {"preset": preset, **sections.pop("model", {}), "vocab": vocab}
    return resolve(config_from_mapping({"model": model, **sections}))


@pytest.mark.parametrize(
    ("preset", "vocab", "expected"),
    [
        ("8b", 126464, 8_015_581_184),  # LLaDA-8B, as published
        ("1b", 126464, 1_487_243_264),  # LLaDA-1B: 1.49B
        ("1b-aligned", 126464, 1_510_041_600),
        ("50m", 50304, 51_061_248),
        ("50m", 32000, 41_689_600),
        ("tiny", 8192, 1_840_256),
    ],
)
def test_parameters_of_presets(preset: str, vocab: int, expected: int) -> None:
    assert parameter_count(config_of(preset, vocab).model) == expected
    assert config_from_mapping({"model": {"preset": preset}}).model.vocab in (None, vocab)


def test_parameters_of_a_small_model_by_hand() -> None:
    model = {"layers": 2, "hidden": 6, "heads": 3, "kv_heads": 1, "head_dim": 4, "ffn": 5, "tied": False}
    plain = resolve(config_from_mapping({"model": model, "data": {"seq_length": 9}}), vocab=7).model
    attention, ffn, norms = 6 * 12 + 2 * 6 * 4 + 12 * 6, 3 * 6 * 5, 2 * 6
    expected = 2 * (attention + ffn + norms) + 6 + 2 * 7 * 6
    assert parameter_count(plain) == expected
    assert parameter_count(replace(plain, tied=True)) == expected - 7 * 6
    assert parameter_count(replace(plain, qk_norm=True)) == expected + 2 * (2 * 4)
    assert parameter_count(replace(plain, qkv_bias=True)) == expected + 2 * (12 + 4 + 4)
    assert parameter_count(replace(plain, position="learned")) == expected + 9 * 6


def test_llada_8b_takes_51_gigaflop_per_token_with_the_head_everywhere() -> None:
    config = config_of("8b", data={"seq_length": 4096})
    assert training_flops_per_token(config, 126464, fraction=1.0) == pytest.approx(51.4e9, rel=1e-3)


def test_flops_without_attention_and_embedding_are_6n() -> None:
    config = config_of("8b", data={"seq_length": 1})
    matrices = parameter_count(replace(config.model, vocab=0)) - 32 * 2 * 4096 - 4096
    attention = 3 * 32 * 4 * 1 * 4096
    assert training_flops_per_token(config, 0, fraction=1.0) - attention == 6 * matrices


def test_attention_is_not_halved_but_for_the_causal_baseline() -> None:
    def attention(name: str) -> float:
        costs = [
            training_flops_per_token(config_of("tiny", data={"seq_length": n}, objective={"name": name}), 10, 1.0)
            for n in (512, 1024)
        ]
        return costs[1] - costs[0]

    assert attention("masked_diffusion") == 3 * 4 * (4 * 512 * 128)
    assert attention("autoregressive") == attention("masked_diffusion") / 2


def test_recomputation_adds_a_forward_pass_of_the_layers_only() -> None:
    def cost(recompute: str, recomputation: bool) -> float:
        return training_flops_per_token(
            config_of("tiny", train={"recompute": recompute}), 8192, 0.5, recomputation=recomputation
        )

    forward = 4 * (2 * 4 * 128 * 128 + 2 * 3 * 128 * 344 + 4 * 256 * 128)
    assert cost("full", True) - cost("full", False) == forward
    assert cost("selective", True) - cost("selective", False) == 4 * (4 * 256 * 128)
    assert cost("none", True) == cost("full", False)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"mask_schedule": "uniform:0.45,0.55"}, 0.5),
        ({"mask_schedule": "uniform:0,1"}, 0.5),
        ({"mask_schedule": "point:0.3"}, 0.3),
        ({"name": "autoregressive", "mask_schedule": "point:0.3"}, 1.0),
    ],
)
def test_predicted_fraction_is_the_expected_mask_rate(objective: dict[str, Any], expected: float) -> None:
    assert predicted_fraction(config_of("tiny", objective=objective)) == pytest.approx(expected, abs=1e-6)


def test_layers_per_stage() -> None:
    assert layers_per_stage(config_of("8b", parallel={"pipeline": 4})) == [8, 8, 8, 8]
    uneven = {"pipeline": 4, "first_stage_layers": 7, "last_stage_layers": 5}
    assert layers_per_stage(config_of("8b", parallel=uneven)) == [7, 10, 10, 5]
    assert layers_per_stage(config_of("8b", parallel={"pipeline": 3, "last_stage_layers": 10})) == [11, 11, 10]


@pytest.mark.parametrize(
    ("precision", "ema_decay", "fixed", "sharded"),
    [("bf16", None, 6, 12), ("fp32", None, 8, 8), ("bf16", 0.999, 6, 16), ("fp32", 0.999, 8, 12)],
)
def test_memory_of_weights_gradients_and_optimizer(
    precision: str, ema_decay: float | None, fixed: int, sharded: int
) -> None:
    train = {"precision": precision, "ema_decay": ema_decay, "global_batch_size": 8, "micro_batch_size": 1}
    for distributed, shards in ((True, 8), (False, 1)):
        config = config_of("8b", parallel={"distributed_optimizer": distributed}, train=train)
        memory = memory_per_rank(config, check_config(config, 8, corpora=False))
        assert memory.parameters == 8_015_581_184
        assert memory.weights + memory.gradients == fixed * memory.parameters
        assert memory.optimizer == pytest.approx(sharded * memory.parameters / shards)


def test_tensor_and_pipeline_parallel_ranks_hold_their_share() -> None:
    def per_rank(world: int, **parallel: Any) -> int:
        # With a single micro-batch the last stage, which holds the head, is the fullest.
        train = {"global_batch_size": 1, "micro_batch_size": 1}
        config = config_of("8b", model={"tied": True}, parallel=parallel, train=train)
        return memory_per_rank(config, check_config(config, world, corpora=False)).parameters

    whole, norms = per_rank(1), 32 * 2 * 4096 + 4096
    assert per_rank(8, tensor=8) == (whole - norms) // 8 + norms
    # The tied output layer on another stage is a copy of the embedding.
    layers = whole - 126464 * 4096 - 4096
    assert per_rank(2, pipeline=2) == layers // 2 + 126464 * 4096 + 4096


def test_activations_shrink_with_recomputation_and_split_rows() -> None:
    def activations(recompute: str, **parallel: Any) -> float:
        config = config_of(
            "8b",
            parallel=parallel,
            data={"seq_length": 4096},
            train={"recompute": recompute, "global_batch_size": 8, "micro_batch_size": 1, "precision": "bf16"},
        )
        return memory_per_rank(config, check_config(config, config.parallel.replica, corpora=False)).activations

    assert activations("full") < activations("selective") < activations("none")
    # Without recomputation everything is split under sequence parallelism, but for the buffer that gathers rows.
    hidden = 2 * 4096 * 4096
    assert activations("none", tensor=8, sequence_parallel=True) == activations("none") / 8 + hidden
    assert activations("none", tensor=8, sequence_parallel=True) < activations("none", tensor=8)
    assert activations("full", tensor=2, context=4) == activations("full", tensor=2) / 4
    # A token in a layer: 4H + 3A + 3K + 3F elements of two bytes, an fp32 number for each norm and each head; the norm
    # at the end keeps its input, and its output is there.
    token = 2 * (4 * 4096 + 3 * 4096 + 3 * 4096 + 3 * 12288) + 4 * (2 + 32)
    assert activations("none") == 32 * 4096 * token + 2 * hidden
    assert activations("full") == 32 * hidden + 2 * hidden


def test_the_head_takes_its_weights_gradient_in_fp32_and_a_chunk_of_logits() -> None:
    def head(chunk: int, rate: str = "point:0.5", **train: Any) -> float:
        config = config_of(
            "8b",
            data={"seq_length": 4096},
            objective={"head_chunk": chunk, "mask_schedule": rate},
            train={"global_batch_size": 1, "micro_batch_size": 1, "precision": "bf16", **train},
        )
        return memory_per_rank(config, check_config(config, 1, corpora=False)).head

    weight, hidden = 126464 * 4096, 2 * 2 * 2048 * 4096
    # One chunk: logits and their gradient; then the product that is added to the gradient takes two bytes a weight.
    assert head(2048) == 4 * weight + 4 * 2048 * 126464 + 2 * weight + hidden
    assert head(4096) == head(2048)
    assert head(2048, "uniform:0,1") > head(2048, "uniform:0.45,0.55") > head(2048)
    assert head(256) < head(1024) < head(2048)


def test_report_names_every_figure() -> None:
    config = config_of(
        "8b",
        data={"seq_length": 4096},
        parallel={"tensor": 4, "pipeline": 2, "vocab_multiple": 128},
        objective={"mask_schedule": "uniform:0.45,0.55"},
        train={"steps": 15_000, "global_batch_size": 128, "micro_batch_size": 1, "precision": "bf16"},
    )
    text = report(config, check_config(config, 64, corpora=False))
    for expected in (
        "preset: 8b",
        "64 = tensor 4 x pipeline 2 x context 1 x data 8",
        "16 of 1 rows per rank and step",
        "8,015,581,184",
        "0.5000 of the positions",
        "49.87 GFLOP executed (full L x L attention",
        "48.09 GFLOP per token (6N",
        "524,288 = 128 rows x 4,096",
        "15,000",
        "7,864,320,000",
    ):
        assert expected in text


def test_report_counts_the_padded_vocabulary_and_the_ramp() -> None:
    ramp = {"start": 4, "increment": 4, "steps": 2}
    config = config_of(
        "tiny",
        8190,
        parallel={"tensor": 2, "vocab_multiple": 64},
        train={"steps": 4, "global_batch_size": 8, "micro_batch_size": 4, "batch_ramp": ramp},
    )
    text = report(config, check_config(config, 2, corpora=False))
    assert "8,190 (embedding padded from 8,190 to 8,192 rows)" in text
    assert "from 4 rows at step 0" in text
    assert f"{(4 + 4 + 8 + 8) * 256:,} (" in text
