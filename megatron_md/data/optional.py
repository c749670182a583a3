"""Packages that only some inputs need."""

from __future__ import annotations

import importlib
from typing import Any

from megatron_md.errors import UserError


def optional_package(module: str, wanted_by: str, extra: str = "data") -> Any:
    """Import a module of a package that belongs to one of our extras.

    Raises:
        UserError: it is not installed; names what wants it and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{wanted_by}: needs {package}: pip install 'megatron-md[{extra}]'") from None
