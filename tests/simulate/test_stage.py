"""What a simulation found survives the way between processes, and adds up."""

from __future__ import annotations

import json

from megatron_md.simulate.stage import BACKWARD, FORWARD, Stage
from tests.simulate.made_up import collective, kernel, stage


def test_a_stage_comes_back_from_json() -> None:
    found = stage([kernel(FORWARD, 4, 2, count=3)], [collective(FORWARD, "_allgather_base", "tensor", 2, 8)])
    assert Stage.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_flops_and_groups_add_up() -> None:
    gather = [collective(part, "_allgather_base", "tensor", 2, 8, count=2) for part in (FORWARD, BACKWARD)]
    found = stage(
        [kernel(FORWARD, 4, count=3), kernel(BACKWARD, 10)], [*gather, collective(FORWARD, "send", "pipeline", 2, 99)]
    )
    assert found.flops() == found.flops("layers") == 22
    assert found.flops("head") == 0
    assert list(found.per_group()) == [("send", "pipeline", 2, 1, 99), ("_allgather_base", "tensor", 2, 4, 16)]
