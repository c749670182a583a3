"""Packages that only some inputs need."""

from __future__ import annotations

import importlib
from typing import Any


def optional_package(module: str, wanted_by: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ValueError: it is not installed; names what wants it and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(f"{wanted_by}: reading it needs {package}: pip install 'megatron-md[data]'") from None
