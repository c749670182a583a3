"""The check of a machine: PASS and FAIL, and what may be changed about a recorded run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_md.config.loader import ConfigError
from megatron_md.parity import validate
from megatron_md.parity.config import ParityConfig, load_parity_config
from megatron_md.parity.sweep import runs_of
from megatron_md.parity.validate import Reference, Verdict
from tests.parity.parity_config import small
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reference() -> Reference:
    loss = [0.7 - 0.001 * step for step in range(50)]
    return Reference(config=small(), loss=loss, grad_norm=[1.0] * 50, reached_step=30, largest_gap=0.1, versions={})


def test_the_packages_record_is_the_first_run_of_the_ci_example() -> None:
    reference = validate.read_reference(validate.default_reference())
    first = runs_of(load_parity_config(ROOT / "examples/parity/ci.yaml"))[0].config
    assert replace(reference.config, run_dir="") == replace(first, run_dir="")
    assert len(reference.loss) == len(reference.grad_norm) == validate.CURVE_STEPS
    assert reference.reached_step is not None


def test_a_curve_within_the_tolerance_and_the_same_verdict_pass(reference: Reference) -> None:
    near = [value * (1 + 9e-6) for value in reference.loss]
    assert validate.compare(reference, near, [value * 0.9995 for value in reference.grad_norm], 40).passed
    assert not validate.compare(reference, reference.loss, reference.grad_norm, None).passed


def test_one_step_beyond_the_tolerance_fails_and_is_named(reference: Reference) -> None:
    loss, grad_norm = list(reference.loss), list(reference.grad_norm)
    grad_norm[16] *= 1 + 3e-3
    verdict = validate.compare(reference, loss, grad_norm, 30)
    assert (verdict.passed, verdict.first_step) == (False, 17)
    assert (verdict.loss_difference, verdict.grad_difference) == (0.0, pytest.approx(3e-3, rel=1e-2))
    loss[9] *= 1 + 2e-5
    assert validate.compare(reference, loss, grad_norm, 30).first_step == 10
    loss[3] = float("nan")
    assert validate.compare(reference, loss, grad_norm, 30).first_step == 4


def test_only_layout_and_device_may_be_changed(reference: Reference) -> None:
    config = validate.layout_config(reference, ["parallel.tensor=2", "train.micro_batch_size=2"], 2)
    assert (config.parallel.tensor, config.train.micro_batch_size) == (2, 2)
    config = validate.layout_config(reference, ["parallel.pipeline=2"], 4)
    assert config.train.micro_batch_size == 4, "16 rows, 2 data-parallel ranks, 2 stages"
    for word in ("seed=2", "optimizer.lr=1", "train.steps=3"):
        with pytest.raises(ConfigError, match="the run is recorded"):
            validate.layout_config(reference, [word], 1)
    with pytest.raises(ConfigError, match="the layout needs 2 processes"):
        validate.layout_config(reference, ["parallel.tensor=2"], 1)


def test_files_that_are_no_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        validate.read_reference(tmp_path / "none.json")
    for text in ("{", "{}", '{"config": {}, "loss": []}'):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(ConfigError, match="is no record"):
            validate.read_reference(tmp_path / "record.json")


def test_the_report_names_layout_and_figures(reference: Reference) -> None:
    config = small(parallel={"tensor": 2})
    line = validate.report(config, 4, reference, Verdict(3e-7, 2e-5, None, 40, True))
    assert line.startswith("PASS  tensor 2 x pipeline 1 x data 2 (cpu): 50 steps' losses within 3.0e-07 of the record")
    assert line.endswith("99% validation accuracy at step 40 (record: at step 30)")
    line = validate.report(config, 4, reference, Verdict(1e-3, 0.1, 7, None, False))
    assert line.startswith("FAIL") and "too far from step 7 on" in line and "not reached" in line


def main_in_rank(words: list[str]) -> int:
    from megatron_md.cli import main

    return main(words)


def quick() -> ParityConfig:
    return small(accuracy={"every_steps": 4, "stop_at": 0.9}, train={"steps": 8})


@pytest.fixture(scope="module")
def quick_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "record.json"
    run_ranks(validate.record_reference, 1, quick(), path)
    return path


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_another_layout_passes(layout: str, quick_record: Path) -> None:
    words = ["parity", "validate", "--reference", str(quick_record), layout]
    assert run_ranks(main_in_rank, 2, words) == [0, 0]


@pytest.mark.distributed
def test_other_numbers_fail_on_every_rank(quick_record: Path, tmp_path: Path) -> None:
    record = json.loads(quick_record.read_text())
    record["loss"][5] *= 1.001
    (tmp_path / "record.json").write_text(json.dumps(record))
    words = ["parity", "validate", "--reference", str(tmp_path / "record.json")]
    assert run_ranks(main_in_rank, 2, words) == [1, 1]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, []),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.pipeline=2"]),
        (2, []),
    ],
)
def test_the_recorded_case_passes(world_size: int, layout: list[str]) -> None:
    assert run_ranks(main_in_rank, world_size, ["parity", "validate", *layout], timeout=290) == [0] * world_size
