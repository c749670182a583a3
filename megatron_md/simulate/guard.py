"""The compiled part: a device guard without which torch cannot differentiate tensors of a device that is not there.

A build of torch without CUDA aborts the process at the first backward pass (2.13 still does), and one with CUDA but
without a device raises. `guard.cpp` is compiled once for each torch, with nothing but a C++ compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from megatron_md.errors import UserError

COMPILERS = ("c++", "g++", "clang++")
_SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """The C++ compiler: that of CXX, else the first of `COMPILERS` that is installed."""
    named = os.environ.get("CXX")
    return next((path for name in ([named] if named else COMPILERS) if (path := shutil.which(name))), None)


def guard_library() -> Path:
    """The guard for the torch that is installed, compiled if it has not been.

    Raises:
        UserError: there is no compiler, or it fails.
    """
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    key = hashlib.sha256(f"{torch} {version('torch')} {_SOURCE.read_text()}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_md"
    library = folder / f"guard-{key}.so"
    if library.exists():
        return library
    command = compiler()
    if command is None:
        raise UserError(
            f"simulate compiles a small part of itself once, and found no C++ compiler ({', '.join(COMPILERS)}): "
            "install one, or name it in the environment variable CXX"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = _compile(command, torch, Path(scratch) / library.name)
            made.replace(library)  # at once, as others may be doing the same
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; set XDG_CACHE_HOME to a folder of yours"
        ) from None
    return library


def _compile(command: str, torch: Path, output: Path) -> Path:
    includes = [torch / "include", torch / "include/torch/csrc/api/include"]
    words = [command, "-std=c++20", "-shared", "-fPIC", "-O0", *(f"-I{path}" for path in includes), str(_SOURCE)]
    words += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}", "-o", str(output)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"it ended with {done.returncode}"]
        error = next((line for line in lines if "error" in line), lines[-1])
        raise UserError(f"{command} cannot compile {_SOURCE.name}: {' '.join(error.split())}")
    return output


def load(library: Path) -> None:
    """Make this process's torch, which must not have been imported yet, take fake CUDA tensors."""
    guard = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401  (a build with CUDA registers its own guard when it is loaded)

    guard.megatron_md_register_guard()
