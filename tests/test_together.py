"""What one rank finds out all learn; where one fails all raise its error."""

from __future__ import annotations

import os
from typing import Any

import pytest

from megatron_md.config import Config, ConfigError
from megatron_md.errors import UserError
from megatron_md.together import on_main, place, together
from tests.ranks import run_ranks


class UnsendableError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("cannot travel")


def raised(work: Any, call: Any) -> tuple[type, str]:
    try:
        call(work)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


def fail(rank: str, error: Exception) -> int:
    if os.environ["RANK"] == rank:
        raise error
    return int(os.environ["RANK"])


def job(config: Config) -> dict[str, Any]:
    from megatron_md import parallel

    with parallel.session(config):
        rank = int(os.environ["RANK"])
        return {
            "place": place(),
            "on_main": on_main(lambda: rank + 10),
            "together": together(lambda: rank + 10),
            "only main is asked": on_main(lambda: fail("1", UserError("not called"))),
            "main fails": raised(lambda: fail("0", ConfigError(["one", "two"])), on_main),
            "the last one fails": raised(lambda: fail("1", UserError("bad")), together),
            "unsendable": raised(lambda: fail("1", UnsendableError(1, 2)), together),
        }


@pytest.mark.distributed
def test_two_ranks_learn_and_fail_alike() -> None:
    first, second = run_ranks(job, 2, Config())
    assert first.pop("place") == (0, 2) and second.pop("place") == (1, 2)
    assert (
        first
        == second
        == {
            "on_main": 10,
            "together": [10, 11],
            "only main is asked": 0,
            "main fails": (ConfigError, "one\ntwo"),
            "the last one fails": (UserError, "bad"),
            "unsendable": (RuntimeError, "UnsendableError: cannot travel"),
        }
    )


def test_a_lone_process_just_calls() -> None:
    assert (place(), on_main(lambda: 3), together(lambda: 3)) == ((0, 1), 3, [3])
    with pytest.raises(UserError, match="bad"):
        on_main(lambda: (_ for _ in ()).throw(UserError("bad")))
