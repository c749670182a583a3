"""What a resumed run must agree on with its checkpoint, and what is told of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_md.checkpoint.contract import config_changes, effect, model_identity
from tests.small_run import CONFIG, variant


def test_changed_keys_are_told_with_both_values(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\ntrain: {steps: 5, device: cpu}\nimports: []\n")
    now = "seed: 1\ntrain: {steps: 9, device: cpu}\nimports: []\nlog: {every_steps: 3}\n"
    assert config_changes(tmp_path, now) == {"train.steps": [5, 9], "log.every_steps": [None, 3]}


def test_a_models_identity_is_what_its_weights_and_its_function_depend_on() -> None:
    identity = model_identity(CONFIG)
    alike = variant(model={"init_std": 0.5, "scaled_init": not CONFIG.model.scaled_init, "max_length": 99})
    assert model_identity(alike) == identity and identity["model.head_dim"] == 16
    for key, value in {"layers": 5, "kv_heads": 4, "tied": not CONFIG.model.tied}.items():
        other = model_identity(variant(model={key: value}))
        assert {name for name in identity if identity[name] != other[name]} == {f"model.{key}"}


@pytest.mark.parametrize(
    ("key", "change", "differing", "expected"),
    [
        ("seed", [1, 2], set(), "refused"),
        ("model.layers", [2, 3], {"model.layers"}, "refused"),
        ("model.init_std", [0.1, 0.2], set(), "harmless"),
        ("data.train[0].manifest", ["a", "b"], set(), "depends"),
        ("objective.name", ["masked_diffusion", "autoregressive"], set(), "refused"),
        ("objective.name", ["masked_diffusion", "masked_diffusion_sft"], set(), "harmless"),
    ],
)
def test_the_effect_of_a_changed_key(key: str, change: list[object], differing: set[str], expected: str) -> None:
    assert effect(key, change, differing) == expected
