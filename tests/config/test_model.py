"""What the keys of a layout mean."""

from __future__ import annotations

import pytest

from megatron_md.config import ParallelConfig


@pytest.mark.parametrize(
    ("keys", "by_default", "overlaps"),
    [
        ({}, False, (False, False)),
        ({}, True, (True, True)),
        ({"distributed_optimizer": False}, True, (True, False)),
        ({"overlap_grad_reduce": False}, True, (False, False)),
        ({"overlap_param_gather": False}, True, (True, False)),
        ({"overlap_param_gather": True}, False, (True, True)),
        ({"overlap_grad_reduce": True, "overlap_param_gather": False}, False, (True, False)),
    ],
)
def test_overlap_is_as_asked_or_by_default_where_it_can_be(
    keys: dict[str, bool], by_default: bool, overlaps: tuple[bool, bool]
) -> None:
    assert ParallelConfig(**keys).overlaps(by_default) == overlaps
