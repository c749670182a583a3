"""What the keys of training mean on a device."""

from __future__ import annotations

from typing import Literal

import pytest

from megatron_md.config import ConfigError, TrainConfig, config_from_mapping


@pytest.mark.parametrize(
    ("precision", "device", "settled"),
    [
        ("auto", "cuda", "bf16"),
        ("auto", "cpu", "fp32"),
        ("fp32", "cuda", "fp32"),
        ("bf16", "cpu", "bf16"),
        ("fp8", "cuda", "fp8"),
    ],
)
def test_precision_follows_the_device_where_it_is_left_open(
    precision: Literal["auto", "fp32", "bf16", "fp8"], device: str, settled: str
) -> None:
    train = TrainConfig(precision=precision, steps=7)
    assert train.uses_bf16(device) == (settled != "fp32")
    assert train.settled(device) == TrainConfig(precision=settled, steps=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_that_keeps_nothing_or_everything_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"train.ema_decay"):
        config_from_mapping({"train": {"ema_decay": decay}})
