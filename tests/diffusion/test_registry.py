from __future__ import annotations

import pytest

from megatron_md.diffusion.registry import Registry


def test_registry_suggests_the_nearest_name_and_guards_its_names() -> None:
    registry: Registry[object] = Registry("thing")

    def first() -> None: ...

    def second() -> None: ...

    assert registry.register("first")(first) is first
    registry.register("first")(first)
    assert registry.get("first") is first and registry.names() == ["first"]
    with pytest.raises(ValueError, match=r"unknown thing 'frist'; did you mean 'first'\? \(known: first\)"):
        registry.get("frist")
    with pytest.raises(ValueError, match="thing 'first' is registered already"):
        registry.register("first")(second)
