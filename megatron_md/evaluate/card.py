"""What an evaluation was: of which weights, with which settings and versions; beside its figures, as JSON and as text.

A figure that lacks these cannot be compared with another one, not even with its own repetition.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_md import __version__
from megatron_md.checkpoint.directory import read_record
from megatron_md.checkpoint.integrity import MANIFEST_NAME
from megatron_md.files import replace_file
from megatron_md.installed import version
from megatron_md.messages import printable, redacted
from megatron_md.run.saved import SavedRun
from megatron_md.train.callbacks.metrics import environment, without_nan

FORMAT = 1


def identity_of(saved: SavedRun) -> dict[str, Any]:
    """What tells a run's weights from all others: its step, and the sha256 of its checkpoint's manifest.

    The manifest holds the sha256 of all other files, which are verified against it before they are opened. It is None
    of a checkpoint that has no manifest. `base` is what adapters were trained upon.
    """
    manifest = saved.checkpoint / MANIFEST_NAME
    return {
        "step": saved.step,
        "checkpoint_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None,
        "weights": saved.weights,
        "base": read_record(saved.checkpoint)["base"],
        "tokenizer_sha256": hashlib.sha256(saved.tokenizer.read_bytes()).hexdigest(),
    }


def card(
    mode: str, runs: Mapping[str, SavedRun], settings: Mapping[str, Any], results: Mapping[str, Any]
) -> dict[str, Any]:
    """An evaluation card, as JSON values.

    Args:
        mode: `nelbo`, `tasks` or `generative`.
        runs: the runs that took part, by their part: `run`, `against`, `judge`.
        settings: every option of the mode, seeds included.
        results: its figures.
    """
    layout = next(iter(runs.values())).config.parallel
    machine = environment(int(os.environ.get("WORLD_SIZE", "1")))
    versions = {"megatron-md": __version__, **machine.pop("versions")}
    if mode == "tasks":
        versions["lm-eval"] = version("lm-eval")
    return _plain(
        {
            "card": FORMAT,
            "evaluation": mode,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "runs": {part: {"checkpoint": str(saved.checkpoint), **identity_of(saved)} for part, saved in runs.items()},
            "settings": redacted(dict(settings)),
            "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline},
            "versions": versions,
            "machine": machine,
            "results": dict(results),
        }
    )


def write_card(path: Path, content: Mapping[str, Any]) -> None:
    """Write FILE.card.json and FILE.card.txt beside the figures in FILE.json."""
    base = path.with_suffix("") if path.suffix == ".json" else path
    replace_file(base.with_name(f"{base.name}.card.json"), json.dumps(content, indent=1) + "\n")
    lines = (printable(f"{name:<44s} {value}".rstrip()) for name, value in _flat(content))
    replace_file(base.with_name(f"{base.name}.card.txt"), "\n".join(lines) + "\n")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(without_nan(values), default=str))
    return plain


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every value under its path, such as `settings.draws`."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
