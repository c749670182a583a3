"""A study: a sweep of training runs that are compared by their validation NELBO; its table is results.csv."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from megatron_md import run_files
from megatron_md.config import Config, config_from_mapping, load_config, to_yaml
from megatron_md.config import loader as config_loader
from megatron_md.config.loader import ConfigError
from megatron_md.config.schema import STRICT, Doc
from megatron_md.data.shards import load_manifest
from megatron_md.errors import UserError
from megatron_md.files import replace_file
from megatron_md.json_file import read_json
from megatron_md.run.check import check_config
from megatron_md.run.epochs import count_steps
from megatron_md.run.estimate import training_flops_per_token
from megatron_md.sweep.plan import SweepConfig, SweepRun, expand
from megatron_md.sweep.runner import Sweep
from megatron_md.sweep.table import write_table
from megatron_md.train.progress import Progress

TABLE_NAME = "results.csv"
REQUEST_NAME = "arm.yaml"  # in each run: its config as the study gave it
# What two runs must share for their NELBO to be comparable: the tokens that are scored, and how they are cut.
COMPARABLE = ("data.valid", "data.tokenizer", "data.seq_length", "validation.sequences")


class Study:
    """The runs of a study file: a training config with a section `sweep`.

    Attributes:
        directory: the file's `run_dir`, which holds the runs and the table.
        runs: all of them.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()) -> None:
        """Read and check all of it.

        Args:
            path: YAML file.
            overrides: `section.key=value`, for every run, and for `sweep` itself.

        Raises:
            ConfigError: a line for everything that is wrong, an arm that cannot be run or compared included.
        """
        self._mapping, self._source = config_loader.read_yaml(path), str(path)
        overridden = config_loader.apply_overrides(self._mapping, overrides)
        sections = {"sweep": self._mapping.pop("sweep", None) or {}}
        sweep = config_loader.validate(_Sections, sections, str(path), overridden).sweep
        base = self._config([])
        self.directory = Path(base.run_dir)
        self.runs = expand(sweep, self.directory, base.seed, self._config, lambda config: check_config(config, 1))
        lines = [line for run in self.runs for line in _differences(base, run)]
        if lines:
            raise ConfigError(list(dict.fromkeys(lines)))

    def _config(self, words: Sequence[str]) -> Config:
        return config_from_mapping(self._mapping, words, source=self._source)

    def run(self, workers: int = 1, *, only: int | None = None) -> tuple[list[dict[str, Any]], int]:
        """Run what is not done yet; see `Sweep.run`.

        Args:
            workers: runs at a time.
            only: the number of the one run to look at; the table is left to a call without it.
        """
        runs, path = (self.runs, self.directory / TABLE_NAME) if only is None else ([self.runs[only]], None)
        return Sweep(runs, path, start=train, row=self.row, verdict=_verdict, cost=flops).run(workers)

    def collect(self) -> list[dict[str, Any]]:
        """The lines of the runs that are done, which become the table; where there is none, it is left alone."""
        rows = [row for run in self.runs if (row := self.row(run)) is not None]
        if rows:
            write_table(self.directory / TABLE_NAME, rows)
        return rows

    def row(self, run: SweepRun[Config]) -> dict[str, Any] | None:
        """A run's line of the table, if it has been trained to its end as configured."""
        summary = summary_of(run)
        if summary is None:
            return None
        schedule = run.config.objective.mask_schedule
        return {
            "arm": run.arm,
            "point": run.point,
            "seed": run.seed,
            "objective": run.config.objective.name,
            "mask_schedule": schedule if isinstance(schedule, str) else json.dumps(schedule),
            "steps": summary["step"],
            "tokens": summary["tokens"],
            "flops": float(f"{flops(run.config):.4g}"),
            "val_nelbo": summary["val_nelbo"],
            "val_nelbo_stderr": summary["val_nelbo_stderr"],
            "seconds": round(summary["seconds"], 1),
            "run": str(run.directory.relative_to(self.directory)),
        }


def summary_of(run: SweepRun[Config]) -> dict[str, Any] | None:
    """What came of a run; None if it is not there or not at its end.

    Raises:
        ConfigError: what lies there was configured otherwise.
    """
    if not (run.directory / REQUEST_NAME).is_file():
        return None
    # Parsed, as keys that came later have their defaults there.
    if load_config(run.directory / REQUEST_NAME) != run.config:
        raise ConfigError(f"{run.directory}: was run with another config; move it away, or give the arm another name")
    try:
        summary = read_json(run.directory / run_files.SUMMARY, "the run goes on")
    except UserError:
        return None
    is_done = summary.get("status") == "finished" and isinstance(summary.get("val_nelbo"), float)
    return summary if is_done else None


def train(config: Config) -> None:
    """Train one run, or go on with it, in this process alone.

    Raises:
        RuntimeError: it was stopped.
    """
    from megatron_md.run.pretrain import pretrain

    replace_file(Path(config.run_dir) / REQUEST_NAME, to_yaml(config))
    if pretrain(config):
        raise RuntimeError("stopped on request; the same sweep goes on with it")


def flops(config: Config) -> float:
    """Of the whole training run, as executed; see `training_flops_per_token`."""
    manifest = load_manifest(config.data.corpora()[0].manifest)
    counted = count_steps(config)
    tokens = Progress.start(counted).total_tokens
    return tokens * training_flops_per_token(counted, config.model.vocab or manifest.vocab_size)


def _differences(base: Config, run: SweepRun[Config]) -> Iterator[str]:
    """Why a run's NELBO could not be compared with that of the others."""
    for key in COMPARABLE:
        section, _, name = key.partition(".")
        wanted, found = (getattr(getattr(config, section), name) for config in (base, run.config))
        if wanted != found:
            yield (
                f"sweep.arms[{run.arm}]: {key} is {found}, and {wanted} in the study: figures of different corpora, "
                "tokenizers or rows do not compare; make two studies"
            )
    if run.config.data.valid is None or not run.config.validation.sequences:
        yield f"sweep.arms[{run.arm}]: nothing is validated: set data.valid and validation.sequences"


def _verdict(row: dict[str, Any]) -> str:
    return f"NELBO {row['val_nelbo']:.4f} +- {row['val_nelbo_stderr']:.4f}, {row['seconds']:.0f} s"


@dataclass(frozen=True)
class _Sections:
    """The part of a study file that no single run has."""

    __pydantic_config__ = STRICT

    sweep: Annotated[SweepConfig, Doc("arms, seeds and grid of a sweep")] = field(default_factory=SweepConfig)
