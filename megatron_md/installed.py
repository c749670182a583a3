"""What is installed of the packages that megatron-core takes where it finds them; none of them is imported here.

megatron-core imports Transformer Engine and apex when it is imported itself, and lets pass only an ImportError. A wheel
that does not fit torch or CUDA raises others too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb

from megatron_md.errors import UserError

# Import name: distributions, of which the first one that is there tells the version.
OPTIONAL = {
    "transformer_engine": ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"),
    "apex": ("apex",),
}


def version(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed; None where none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return None


def is_foreign_apex() -> bool:
    """True where `apex` is not NVIDIA's: a package index has another one under that name."""
    spec = find_spec("apex")
    if spec is None:
        return False
    folders = spec.submodule_search_locations or []
    return not any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders)


def removal(module: str) -> str:
    """How to get rid of an installed module."""
    distributions = sorted(set(metadata.packages_distributions().get(module, ())))
    if distributions:
        return f"pip uninstall {' '.join(distributions)}"
    spec = find_spec(module)
    return f"take {spec.origin if spec else module} off PYTHONPATH"


def way_out(module: str) -> str:
    """What to do about one of the optional packages that cannot be imported."""
    return f"install one that fits this torch and its CUDA, or remove it: {removal(module)}"


@contextmanager
def broken_ones_told() -> Iterator[None]:
    """Within it, a package that breaks the import of megatron-core is told in one line.

    Raises:
        UserError: in place of what the package raised.
    """
    try:
        yield
    except Exception as error:
        culprit = _culprit(error)
        if culprit in OPTIONAL:
            said = " ".join(str(error).split())
            raise UserError(
                f"megatron-core imports {culprit}, which is broken here ({type(error).__name__}: {said}); "
                f"{way_out(culprit)}; `megatron-md doctor` says what else is wrong"
            ) from error
        if isinstance(error, ModuleNotFoundError) and culprit == "megatron" and error.name is not None:
            raise UserError(
                f"megatron-core needs {error.name}, which is not installed: pip install {error.name}"
            ) from error
        raise


def _culprit(error: Exception) -> str | None:
    """Which of the optional packages failed while it was imported, else `megatron` where megatron-core did."""
    modules = [
        str(frame.f_globals.get("__name__")).partition(".")
        for frame, _ in walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    names = [head for head, _, _ in modules]
    if isinstance(error, ImportError) and error.name is not None:
        names.append(error.name.partition(".")[0])
    is_core = any(head == "megatron" and rest.startswith("core") for head, _, rest in modules)
    return next((name for name in names if name in OPTIONAL), "megatron" if is_core else None)
