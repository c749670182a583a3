"""A run's directory as training leaves it, as far as its text files go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_md.config import config_from_mapping, to_yaml

CONFIG: dict[str, Any] = {
    "model": {"preset": "tiny", "vocab": 300},
    "objective": {"mask_schedule": "window-uniform"},
    "optimizer": {"lr": 0.004},
    "train": {"steps": 8},
}


def records(steps: int = 8) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"step": n, "tokens": 1000 * n, "loss": 9.0 - n / 10, "masked_ce": 8.5 - n / 10, "grad_norm": 1.0 + n % 3,
         "lr": 1e-3, "tokens_per_second": 500.0, "memory_gib": 1.5, "skipped": 0, "skipped_total": n // 6,
         "time": 10_000.0 + 10 * n}
        for n in range(1, steps + 1)
    ]  # fmt: skip
    for record in made[3::4]:
        record |= {"val_nelbo": 5 - record["step"] / 100, "val_nelbo_stderr": 0.02, "val_ppl_bound": 140.0}
        record["val_ce_by_rate"] = [4.0, None, 4.5, 5.0]
    return made


EVENTS: list[dict[str, Any]] = [
    {"time": 10_000.0, "event": "started", "step": 0, "world_size": 4, "restart": 0},
    {"time": 10_060.0, "event": "skipped", "step": 6, "reason": "loss spike", "rows": [40, 47]},
    {"time": 10_090.0, "event": "finished", "step": 8},
]
SAMPLES = [
    {"step": 4, "prompt": "Once", "text": " upon"},
    {"step": 8, "prompt": "Once", "text": " upon a time"},
    {"step": 8, "prompt": "", "text": "the"},
]
SUMMARY: dict[str, Any] = {"status": "finished", "step": 8, "tokens_per_second": 512.5, "unigram_entropy": 5.1}
ENVIRONMENT = {"python": "3.11", "versions": {"torch": "2.9", "apex": None}, "world_size": 4}


def lines(made: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in made)


def write_recorded_run(run: Path, **sections: dict[str, Any]) -> Path:
    """A finished run; sections replace those of its config."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config_from_mapping({**CONFIG, **sections})))
    (run / "metrics.jsonl").write_text(lines(records()))
    (run / "events.jsonl").write_text(lines(EVENTS))
    (run / "samples.jsonl").write_text(lines(SAMPLES))
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "env.json").write_text(json.dumps(ENVIRONMENT))
    return run
