"""What a run with adapters, the weights that they are trained on and what it starts from contradict; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_md.checkpoint.base import open_base
from megatron_md.checkpoint.directory import latest_checkpoint, read_record
from megatron_md.checkpoint.hf.peft_config import check_folder
from megatron_md.config import Config


def lora_problems(config: Config) -> Iterator[str]:
    """One line for a base that is not there, or not the run's own, and for a PEFT folder that is not of the run."""
    if config.checkpoint.load is None or config.checkpoint.load_only != "model":
        return
    try:
        base, newest = open_base(Path(config.checkpoint.load)), latest_checkpoint(Path(config.run_dir))
        there = read_record(newest)["base"] if newest is not None else None
        if config.lora is not None and there is not None and there.get("sha256") != base.sha256:
            yield (
                f"checkpoint.load: the weights of {base.path} are not those that the adapters of {config.run_dir} are "
                f"trained on (sha256 {base.sha256[:12]}, not {str(there.get('sha256'))[:12]}): "
                f"name {there.get('path')}, or choose another run_dir"
            )
        if config.lora is not None and newest is None and config.lora.load is not None:
            check_folder(Path(config.lora.load), config.lora)
    except ValueError as error:
        yield str(error)
