"""Values that other projects' own functions gave (vectors.json names each one's source)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())["vectors"]


def vector(name: str) -> dict[str, Any]:
    """The vector called `name`: inputs, expected, tol."""
    (found,) = (entry for entry in _VECTORS if entry["id"] == name)
    return found
