"""Supervision of the ranks by one another: one that fails ends all within seconds, one that hangs is found and named.

Every rank has a background thread that looks about once a second whether a verdict stands in the store that the job was
started with. Nothing else is sent while all is well, so that this serves thousands of ranks.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch.distributed as dist

from megatron_md.errors import (
    EXIT_BAD_INPUT,
    EXIT_ERROR,
    EXIT_PEER_FAILED,
    PeerFailedError,
    RunFailedError,
    UserError,
    final,
    hang_mark,
)
from megatron_md.messages import tell, tell_error
from megatron_md.parallel import World
from megatron_md.together import on_main
from megatron_md.train.bounded_store import BoundedStore, SilentStoreError
from megatron_md.train.callback import Callback, StepResult
from megatron_md.train.logs import rank_log
from megatron_md.train.trainer import Trainer

logger = logging.getLogger("megatron_md")

GRACE = 5.0  # seconds that a rank has to end by itself once another one has failed
CONTACT = 2.0  # seconds that a rank which has lost a peer waits for that peer's own words, and for any of the store
COMMUNICATION = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")

Verdict = dict[str, Any]


class Watchdog(Callback):
    """A context around a rank's whole work; as a callback it hears what goes on, and `disarm` ends its wait.

    Of several errors the first one is let through; the ranks that fail as its consequence raise `PeerFailedError`.
    """

    def __init__(self, seconds: float, world: World, run_dir: Path) -> None:
        """Watch over this rank.

        Args:
            seconds: longest time between two calls of `alive`.
            world: this process's place in the job.
            run_dir: stacks go into its logs.
        """
        self.seconds = seconds
        self.world = world
        self.run_dir = run_dir
        self.margin = min(10.0, max(1.0, seconds / 4))  # for the ranks' reports of a hang
        self.on_failure: Callable[[str], None] = lambda text: None
        self._last: float | None = None
        self._armed_at = -math.inf
        self._beats = 0
        self._step = 0
        self._store: Any = None
        self._store_is_silent = False
        self._ended = threading.Event()
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._stacks: TextIO | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        path = rank_log(self.run_dir, self.world.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = path.open("a")
        if self.world.size > 1:
            token = on_main(lambda: uuid.uuid4().hex)
            # A connection of its own: the main thread may be blocked in the other one.
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
            self._store = BoundedStore(dist.PrefixStore(f"megatron_md/{token}", store), CONTACT)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disarm()
        try:
            if isinstance(error, Exception) and not isinstance(error, RunFailedError) and self._store is not None:
                self._fail(error)
        finally:
            self._ended.set()
            self._thread.join(1.0)

    def between(self, callbacks: Iterable[Callback]) -> list[Callback]:
        """The callbacks with this one around each, so that none of them alone may take longer than a step may."""
        return [self, *(either for callback in callbacks for either in (callback, self))]

    def on_start(self, trainer: Trainer) -> None:
        """Wait for signs of life from here on."""
        self.alive(trainer.progress.step)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Take the step for a sign of life."""
        self.alive(trainer.progress.step)

    def on_end(self, trainer: Trainer) -> None:
        """Take what the other callbacks do at the end for signs of life."""
        self.alive(trainer.progress.step)

    def alive(self, step: int) -> None:
        """Something has been done at this step: start waiting anew."""
        now = time.monotonic()
        self._step, self._beats, self._last = step, self._beats + 1, now
        if now - self._armed_at < min(1.0, self.margin):
            return  # arming starts a thread, which the steps of a small model would wait for
        self._armed_at = now
        # In case that a thread which holds the interpreter's lock keeps the watching one from running.
        # pytest and the like replace sys.stderr by objects without a file descriptor.
        faulthandler.dump_traceback_later(self.seconds + 4 * self.margin, exit=True, file=sys.__stderr__ or 2)

    def disarm(self) -> None:
        """Wait for no sign of life any more."""
        self._last, self._armed_at = None, -math.inf
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        period = min(1.0, self.seconds / 10)
        while not self._ended.wait(period):
            last = self._last
            verdict = self._verdict()
            if verdict is not None and verdict["rank"] != self.world.rank:
                self._follow(verdict)
            elif last is not None and time.monotonic() - last > self.seconds:
                self._hang()
            elif self._parent is not None and os.getppid() != self._parent:
                self._leave("the launcher is gone", EXIT_ERROR)

    def _verdict(self) -> Verdict | None:
        """What has been said by the first rank that had something to say."""
        try:
            is_there = self._store is not None and self._store.check(["verdict"])
            self._store_is_silent = False
            if is_there:
                return dict(json.loads(self._store.get("verdict")))
        except SilentStoreError as error:
            # A link may come back, and the steps go on; if they do not, that is found as a hang.
            if not self._store_is_silent:
                logger.warning("the job's store is silent: %s", error)
            self._store_is_silent = True
        except RuntimeError as error:
            # Who held the store has ended; communication will fail next, and says so.
            logger.warning("the job's store is gone: %s", error)
            self._store = None
        return None

    def _claim(self, kind: str) -> Verdict:
        """Speak for the job; the answer is what the first rank has said."""
        own = {"kind": kind, "rank": self.world.rank}
        if self._store is None:
            return own
        try:
            return dict(json.loads(self._store.compare_set("verdict", "", json.dumps(own))))
        except RuntimeError:
            return own

    def _fail(self, error: Exception) -> None:
        """This rank's main thread has raised.

        Raises:
            PeerFailedError: because another rank has failed before, or this one's bad input has been told.
        """
        lost = _is_communication(error)
        deadline = time.monotonic() + CONTACT
        while lost and self._verdict() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        verdict = self._verdict() or self._claim("bad input" if isinstance(error, UserError) else "failure")
        if verdict["kind"] == "hang":
            self._thread.join()  # it reports, and ends the process
        if verdict["rank"] != self.world.rank:
            logger.warning("rank %s failed first", verdict["rank"])
            # The agent of this machine kills the rest as soon as one has ended: the first one speaks before.
            time.sleep(0.5)
            code = final(EXIT_BAD_INPUT) if verdict["kind"] == "bad input" else EXIT_PEER_FAILED
            raise PeerFailedError(code) from error
        text = f"rank {self.world.rank} failed at step {self._step}"
        if lost:
            line = str(error).splitlines()[0]
            tell(f"megatron-md: rank {self.world.rank} lost contact with another one ({line})")
            raise PeerFailedError from error
        self.on_failure(f"{text}: {type(error).__name__}: {error}")
        if isinstance(error, UserError):
            tell_error(error)
            raise PeerFailedError(final(EXIT_BAD_INPUT)) from error
        tell(f"megatron-md: {text}:")

    def _follow(self, verdict: Verdict) -> None:
        """Another rank has spoken."""
        if verdict["kind"] == "hang":
            self._tell_where()
            self._wait_for(lambda: bool(self._store.check(["reported"])), 2 * self.margin)
            self._leave(f"rank {verdict['rank']} found a hang", EXIT_PEER_FAILED)
        if not self._ended.wait(GRACE):
            self._leave(f"rank {verdict['rank']} failed", EXIT_PEER_FAILED)

    def _hang(self) -> None:
        """Too long without a sign of life: find out who hangs, say so, end."""
        verdict = self._claim("hang")
        if verdict["rank"] != self.world.rank:
            return self._follow(verdict)
        self._tell_where()
        text = self._who_hangs()
        logs = self.run_dir / "logs"
        text = f"no step for {self.seconds:g} s after step {self._step}: {text}; stacks of all ranks in {logs}"
        tell(f"megatron-md: {text}")
        self.on_failure(text)
        with suppress(RuntimeError):
            if self._store is not None:
                self._store.set("reported", "1")
        self._leave("hang", EXIT_ERROR)

    def _who_hangs(self) -> str:
        places = {self.world.rank: self._place()}
        if self.world.size == 1:
            return describe_hang(places, 1)
        try:
            if self._store is None:
                raise SilentStoreError("its launcher has ended")
            self._wait_for(lambda: self._store.add("told", 0) >= self.world.size, self.margin)
            for rank in range(self.world.size):
                if self._store.check([f"place/{rank}"]):
                    places[rank] = json.loads(self._store.get(f"place/{rank}"))
        except RuntimeError as error:
            node = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return f"rank {self.world.rank} has lost the node at {node}, which holds the job's store ({error})"
        return describe_hang(places, self.world.size)

    def _tell_where(self) -> None:
        """Give the others this rank's place, its launcher a sign, and the log its stacks."""
        logger.error("no step for %g s on some rank; stacks of this one:", self.seconds)
        self._dump_stacks()
        mark = hang_mark()
        with suppress(RuntimeError, OSError):
            if mark is not None:
                mark.touch()
            if self._store is not None:
                self._store.set(f"place/{self.world.rank}", json.dumps(self._place()))
                self._store.add("told", 1)

    def _place(self) -> dict[str, Any]:
        """Where the main thread stands, and how far it has come."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        place, communicates = "?", False
        if frame is not None:
            code = frame.f_code
            place = f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
        while frame is not None:
            communicates |= "torch/distributed" in frame.f_code.co_filename
            frame = frame.f_back
        return {"place": place, "communicates": communicates, "beats": self._beats}

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        try:
            while not condition() and time.monotonic() < deadline:
                time.sleep(0.05)
        except RuntimeError:
            return  # the store is gone

    def _dump_stacks(self) -> None:
        if self._stacks is not None:
            faulthandler.dump_traceback(file=self._stacks, all_threads=True)

    def _leave(self, why: str, code: int) -> None:
        """End this process from the background thread, whatever the main thread does."""
        logger.error("this process ends: %s", why)
        self._dump_stacks()
        os._exit(code)


def describe_hang(places: dict[int, dict[str, Any]], size: int) -> str:
    """Name the ranks that hang, given what those ranks say that can speak.

    A rank that does not speak is stopped or gone. Else those hang that have come less far than others; else those that
    compute while others wait for them in a collective.
    """
    silent = [rank for rank in range(size) if rank not in places]
    if silent:
        return f"{_names(silent)} gives no sign of life (stopped, or its machine is gone)"
    least = min(place["beats"] for place in places.values())
    behind = [rank for rank, place in places.items() if place["beats"] == least]
    if len(behind) == size:
        behind = [rank for rank, place in places.items() if not place["communicates"]] or list(places)
    where = sorted({places[rank]["place"] for rank in behind})
    return f"{_names(sorted(behind))} hangs in {', '.join(where[:3])}"


def _names(ranks: list[int], most: int = 8) -> str:
    rest = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ("rank " if len(ranks) == 1 else "each of ranks ") + ", ".join(map(str, ranks[:most])) + rest


def _is_communication(error: Exception) -> bool:
    """Whether an error may be the consequence of another rank's end."""
    text = str(error).lower()
    return isinstance(error, (dist.DistError, ConnectionError)) or (
        isinstance(error, RuntimeError) and any(word in text for word in COMMUNICATION)
    )
