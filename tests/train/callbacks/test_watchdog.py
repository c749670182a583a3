"""Who hangs is named by those that do not."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_md.train.callbacks.watchdog import Watchdog, describe_hang
from tests.ranks import RankError, run_ranks
from tests.small_run import CONFIG


def at(place: str, beats: int, communicates: bool = False) -> dict[str, Any]:
    return {"place": place, "beats": beats, "communicates": communicates}


def test_a_silent_rank_is_named_before_all_others() -> None:
    assert "rank 2 gives no sign of life" in describe_hang({0: at("a", 1), 1: at("b", 9)}, 3)
    assert "each of ranks 1, 2 gives" in describe_hang({0: at("a", 1)}, 3)


def test_the_rank_that_has_come_less_far_is_named() -> None:
    assert describe_hang({0: at("a", 9), 1: at("read (x.py:3)", 8)}, 2) == "rank 1 hangs in read (x.py:3)"


def test_the_rank_that_computes_while_others_wait_is_named() -> None:
    places = {0: at("all_reduce", 8, True), 1: at("read", 8), 2: at("all_reduce", 8, True)}
    assert describe_hang(places, 3) == "rank 1 hangs in read"


def test_names_of_many_ranks_are_cut_short() -> None:
    text = describe_hang({0: at("a", 1)}, 4096)
    assert "and 4087 more" in text and len(text) < 200


def hang_here() -> None:
    time.sleep(120)


def hang(folder: str, how: str) -> None:
    """Rank 1 fails or hangs while rank 0 waits for it in a collective."""
    from megatron_md import parallel

    # The terminal of each rank.
    descriptor = os.open(f"{folder}/terminal_{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 2)
    try:
        with parallel.session(CONFIG) as world, Watchdog(2.0, world, Path(folder)) as watchdog:
            watchdog.alive(5)
            if world.rank == 1:
                if how == "raise":
                    raise KeyError("planted")
                hang_here()
            dist.barrier()
    except BaseException as error:
        Path(folder, f"ended_{os.environ['RANK']}").write_text(type(error).__name__)
        raise


@pytest.mark.distributed
def test_a_hang_is_reported_once_with_its_rank_and_ends_all(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died without a word"):
        run_ranks(hang, 2, str(tmp_path), "hang", timeout=120)
    for _ in range(600):
        told = "".join((tmp_path / f"terminal_{rank}").read_text() for rank in (0, 1))
        logs = [(tmp_path / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1)]
        if "no step" in told and all("barrier" in logs[0] or "hang_here" in log for log in logs):
            break
        time.sleep(0.1)
    assert told.count("no step for 2 s after step 5: rank 1 hangs in hang_here (test_watchdog.py:") == 1
    assert "hang_here" in logs[1] and "barrier" in logs[0]


@pytest.mark.distributed
def test_the_peers_of_a_failed_rank_end_without_a_traceback_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"planted|PeerFailed|without a word"):
        run_ranks(hang, 2, str(tmp_path), "raise", timeout=120)
    assert "rank 1 failed at step 5" in (tmp_path / "terminal_1").read_text()
    # A `SystemExit`, which the interpreter ends with without a word.
    assert (tmp_path / "ended_0").read_text() == "PeerFailedError"
    assert (tmp_path / "terminal_0").read_text() == "rank 1 failed first\n"
