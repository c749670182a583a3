"""Names that are known before torch is imported are those of the package's own things, no more and no less."""

from __future__ import annotations

from typing import Any

import pytest

import megatron_md.diffusion.objective
import megatron_md.diffusion.unmasking  # noqa: F401  (registers the strategies, as the objectives above)
from megatron_md.diffusion.names import objectives, strategies
from megatron_md.diffusion.registry import Registry


@pytest.mark.parametrize("registry", [objectives, strategies], ids=lambda registry: registry.kind)
def test_names_are_those_of_what_registers_itself(registry: Registry[Any]) -> None:
    ours = [name for name, thing in registry._things.items() if thing.__module__.startswith("megatron_md.diffusion.")]
    assert sorted(registry.built_in) == sorted(ours)


def test_a_name_is_known_before_its_module_is_imported() -> None:
    registry: Registry[object] = Registry("thing", ("heavy",))
    registry.check("heavy")
    registry.register("light")(len)
    assert registry.names() == ["heavy", "light"]
    with pytest.raises(ValueError, match=r"unknown thing 'hevy'; did you mean 'heavy'\? \(known: heavy, light\)"):
        registry.check("hevy")
