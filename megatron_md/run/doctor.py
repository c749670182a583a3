"""Whether training can run on this machine: what is installed, what of it works, and what to do about the rest.

Nothing that may be broken is imported here: versions come from the packages' metadata, and everything is tried in
processes of its own (`probe.py`).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from megatron_md.installed import OPTIONAL, is_foreign_apex, removal, version, way_out
from megatron_md.processes import PARENT_VARIABLE, scratch_folder
from megatron_md.run_files import METRICS

PATIENCE_SECONDS = 300.0
SHARED_MEMORY = Path("/dev/shm")
FEW_SHARED_BYTES = 1 << 30  # containers have 64 MiB unless told otherwise

CORE_MODULE = "megatron.core.models.gpt"
IMPORTED = ("transformer_engine.pytorch", "apex.multi_tensor_apply", "triton", CORE_MODULE)


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
        name: what was looked at.
        state: whether it is there, and works.
        found: its version, or what is wrong.
        used_for: what training takes it for.
        way_out: what to do where something is wrong.
        needed: training does not run without it.
    """

    name: str
    state: Literal["ok", "missing", "broken"]
    found: str
    used_for: str
    way_out: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Trial:
    """How a process of its own ended: what it printed, or why it failed (None: it did not)."""

    output: str
    failure: str | None


def examine(nproc: int | None = None) -> Iterator[Finding]:
    """Look at everything, the cheap things first.

    Args:
        nproc: ranks that exchange data and train; one per CUDA device, or two on the CPU, by default.

    Yields:
        Findings, each as soon as it is known.
    """
    yield Finding("python", "ok", platform.python_version(), "everything", needed=True)
    yield packages()
    with ThreadPoolExecutor() as pool:
        torch_trial = pool.submit(attempt, "torch")
        present = [name for name in IMPORTED if find_spec(name.partition(".")[0]) is not None]
        trials = {name: pool.submit(attempt, "import", name) for name in present}
        torch = json.loads(torch_trial.result().output or "{}")
        failures = {name: trial.result().failure for name, trial in trials.items()}
    devices = torch.get("devices", [])
    yield torch_finding(torch_trial.result())
    if torch:
        yield from cuda(torch)
    yield core(failures.get(CORE_MODULE))
    yield transformer_engine(failures)
    yield apex(failures)
    yield triton(failures, devices)
    yield compiler(devices)
    yield room(devices)
    if torch:
        yield from runs(nproc or len(devices) or 2, devices)


def packages() -> Finding:
    """What pip installs beside torch and megatron-core, which have lines of their own."""
    use, own = "data, configs, pictures", ("torch", "megatron-core")
    try:
        wanted = metadata.requires("megatron-md") or []
    except metadata.PackageNotFoundError:
        return Finding("packages", "missing", "megatron-md itself is not installed", use, "pip install . in its folder")
    names = [
        re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in wanted if "extra ==" not in requirement
    ]
    found = {name: version(name) for name in names if name not in own}
    absent = [name for name, installed in found.items() if installed is None]
    if absent:
        return Finding("packages", "missing", ", ".join(absent), use, f"pip install {' '.join(absent)}", needed=True)
    return Finding("packages", "ok", f"{len(found)} of {len(found)}", use, needed=True)


def torch_finding(trial: Trial) -> Finding:
    """Whether torch can be imported."""
    use, installed = "everything", version("torch")
    if trial.failure is None:
        return Finding("torch", "ok", json.loads(trial.output)["version"], use, needed=True)
    if installed is None:
        return Finding("torch", "missing", "", use, "pip install torch, in a build for your CUDA", needed=True)
    again = "reinstall it: pip install --force-reinstall torch"
    return Finding("torch", "broken", f"{installed}: {trial.failure}", use, again, needed=True)


def cuda(torch: dict[str, Any]) -> Iterator[Finding]:
    """CUDA and NCCL, from what torch said."""
    use, devices = "training at speed; the CPU serves without", torch["devices"]
    has_driver = Path("/dev/nvidiactl").exists()
    if devices:
        names = ", ".join(f"{devices.count(name)}x {name}" for name in dict.fromkeys(devices))
        yield Finding("cuda", "ok", f"{torch['cuda']}, {names}", use)
    elif torch["cuda"] is None:
        way = "install a build of torch for CUDA" if has_driver else ""
        yield Finding("cuda", "broken" if has_driver else "missing", "this torch is built without it", use, way)
    elif has_driver:
        told = torch["problem"] or "torch sees no device"
        way = "a driver of the release that CUDA asks for (nvidia-smi tells which), or a torch for an older CUDA"
        yield Finding("cuda", "broken", f"{torch['cuda']}: {told}", use, way)
    else:
        yield Finding("cuda", "missing", f"torch is built for {torch['cuda']}; there is no device here", use)
    if torch["nccl"]:
        yield Finding("nccl", "ok", torch["nccl"], "collectives between CUDA devices")
    elif torch["cuda"] is not None:
        way = "install a build of torch with NCCL"
        yield Finding("nccl", "missing", "", "collectives between CUDA devices", way, needed=len(devices) > 1)


def core(failure: str | None) -> Finding:
    """Whether megatron-core can be imported, which everything of the model needs."""
    use, installed = "model, parallelism, optimizer", version("megatron-core")
    if installed is None and find_spec("megatron") is None:
        return Finding("megatron-core", "missing", "", use, "pip install megatron-core", needed=True)
    if failure is None:
        return Finding("megatron-core", "ok", installed or "version unknown", use, needed=True)
    absent = re.search(r"No module named '([\w.]+)'", failure)
    way = (
        f"pip install {absent[1]}" if absent else "mend what is named there; it may be a broken package of those below"
    )
    return Finding("megatron-core", "broken", f"{installed}: {failure}", use, way, needed=True)


def transformer_engine(failures: dict[str, str | None]) -> Finding:
    """Transformer Engine: megatron-core imports it where it finds it, also on a machine without CUDA."""
    name, use = "transformer_engine", "faster layers on CUDA; our own serve without"
    if IMPORTED[0] not in failures:
        return Finding(name, "missing", "", use)
    found, failure = version(*OPTIONAL[name]) or "version unknown", failures[IMPORTED[0]]
    if failure is None:
        return Finding(name, "ok", found, use)
    return Finding(name, "broken", f"{found}: {failure}", use, way_out(name))


def apex(failures: dict[str, str | None]) -> Finding:
    """NVIDIA's apex, or the package of that name which is something else."""
    use = "fused Adam and norms on CUDA; torch's serve without"
    if IMPORTED[1] not in failures:
        return Finding("apex", "missing", "", use)
    found, failure = version("apex") or "version unknown", failures[IMPORTED[1]]
    if is_foreign_apex():
        return Finding("apex", "broken", f"{found} is not NVIDIA's, but a package index' own", use, removal("apex"))
    if failure is None:
        return Finding("apex", "ok", found, use)
    return Finding("apex", "broken", f"{found}: {failure}", use, way_out("apex"))


def triton(failures: dict[str, str | None], devices: Sequence[str]) -> Finding:
    """Triton, with which torch.compile makes the fused kernels."""
    use, needed = "fused kernels on CUDA; megatron-core 0.19 imports it", bool(devices)
    if "triton" not in failures:
        return Finding("triton", "missing", "", use, "pip install triton" if needed else "", needed)
    found, failure = version("triton") or "version unknown", failures["triton"]
    if failure is None:
        return Finding("triton", "ok", found, use, needed=needed)
    return Finding("triton", "broken", f"{found}: {failure}", use, "pip install --force-reinstall triton", needed)


def compiler(devices: Sequence[str]) -> Finding:
    """A C compiler, as Triton looks for one."""
    use = "what Triton and torch.compile build on CUDA"
    names = [os.environ["CC"].split()[0]] if os.environ.get("CC", "").strip() else ["gcc", "clang", "cc"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is not None:
        return Finding("C compiler", "ok", found, use, needed=bool(devices))
    way = "install gcc (apt-get install gcc), or point CC to a compiler" if devices else ""
    return Finding("C compiler", "missing", f"no {' or '.join(names)}", use, way, needed=bool(devices))


def room(devices: Sequence[str]) -> Finding:
    """Free bytes for checkpoints and for what ranks of a node share."""
    use = "checkpoints; NCCL between devices of a node"
    shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    found = f"{shutil.disk_usage('.').free / 2**30:,.0f} GiB on this disk, {shared / 2**30:,.1f} GiB in {SHARED_MEMORY}"
    if len(devices) > 1 and shared < FEW_SHARED_BYTES:
        return Finding("room", "broken", found, use, "start the container with --ipc=host or --shm-size=16g")
    return Finding("room", "ok", found, use)


def runs(ranks: int, devices: Sequence[str]) -> Iterator[Finding]:
    """Collectives between ranks, and a step of training on them."""
    where = f"{ranks} ranks over {'NCCL' if devices else 'gloo'}"
    failure = attempt_ranks(ranks, "collectives")
    use = "every layout of more than one process"
    if failure is not None:
        way = "NCCL_DEBUG=INFO tells more; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 may go round it"
        way = way if devices else "GLOO_SOCKET_IFNAME names the network interface to take (lo on one machine)"
        yield Finding("collectives", "broken", f"{where}: {failure}", use, way, needed=True)
        return
    yield Finding("collectives", "ok", where, use, needed=True)
    use = "a run: data, model, optimizer, checkpoint"
    with scratch_folder() as folder:
        failure = attempt_ranks(ranks, "step", str(folder))
        if failure is not None:
            way = "mend what is broken above; if nothing is, the message is all there is"
            yield Finding("one step", "broken", failure, use, way, needed=True)
            return
        record = json.loads((folder / "run" / METRICS).read_text().splitlines()[-1])
    yield Finding("one step", "ok", f"loss {record['loss']:.3f}, {where}", use, needed=True)


def attempt(*words: str, seconds: float = PATIENCE_SECONDS) -> Trial:
    """Run a part of `probe.py` in a process of its own."""
    command = [sys.executable, "-m", "megatron_md.run.probe", *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=_environment(), timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Trial("", _hung(seconds))
    return Trial(done.stdout, None) if done.returncode == 0 else Trial("", _reason(done.returncode, done.stderr))


def attempt_ranks(size: int, *words: str, seconds: float = PATIENCE_SECONDS) -> str | None:
    """Run a part of `probe.py` on ranks of a job; why the first one to fail did, or None.

    All of them are gone afterwards.
    """
    for _ in range(3):
        failure = _attempt_ranks_once(size, *words, seconds=seconds)
        # Another process may take the free port before they do.
        if failure is None or "EADDRINUSE" not in failure:
            break
    return failure


def _attempt_ranks_once(size: int, *words: str, seconds: float) -> str | None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "megatron_md.run.probe", *words]
    with scratch_folder() as folder:
        logs = [folder / f"{rank}.log" for rank in range(size)]
        ranks = []
        for rank, log in enumerate(logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), PARENT_VARIABLE: str(os.getpid())}
            with log.open("wb") as file:
                ranks.append(subprocess.Popen(command, env=_environment() | job | place, stdout=file, stderr=file))
        try:
            deadline = time.monotonic() + seconds
            while any(rank.poll() is None for rank in ranks):
                if any(rank.poll() for rank in ranks) or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            failed = [number for number, rank in enumerate(ranks) if rank.poll()]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if failed:
            # What a peer says of a lost connection comes after what the first one has to say.
            first = min(failed, key=lambda number: logs[number].stat().st_mtime)
            return f"rank {first}: {_reason(ranks[first].returncode, logs[first].read_text(errors='replace'))}"
        return _hung(seconds) if any(rank.returncode for rank in ranks) else None


def _environment() -> dict[str, str]:
    """This process's environment without its place in a job, if it has one."""
    job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "MEGATRON_MD_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(job)}
    return {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **kept}


def _reason(code: int, stderr: str) -> str:
    """The last line of a traceback, which names the error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or [f"ended with exit code {code}"])[-1]


def _hung(seconds: float) -> str:
    return f"no answer within {seconds:.0f} s"
