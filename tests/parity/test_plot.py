"""The picture of a sweep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_md.parity.plot import arm_curves, plot_sweep
from megatron_md.parity.sweep import csv_row, runs_of
from megatron_md.sweep.table import write_table
from tests.evaluate.test_plot import texts
from tests.parity.test_sweep import config_for, pretend


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    runs = runs_of(config_for(tmp_path))
    for run in runs:
        pretend(run, signal_probability=None if run.arm == "direct" else 0.4)
    # One seed measured once more, and later.
    with (runs[2].directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "signal_share": 0.3, "train_accuracy": 1.0, "valid_accuracy": 1.0}\n')
    write_table(tmp_path / "parity.csv", [row for run in runs if (row := csv_row(tmp_path, run)) is not None])
    return tmp_path


def test_a_run_that_has_ended_keeps_its_last_accuracy(directory: Path) -> None:
    low, direct = arm_curves(directory)
    assert (low.name, low.signal_probability) == ("low", 0.4) and direct.signal_probability is None
    np.testing.assert_array_equal(low.steps, [2, 4, 6])
    np.testing.assert_array_equal(low.valid, [[0.5, 0.9, 0.9], [0.5, 0.9, 1.0]])
    np.testing.assert_array_equal(direct.train, [[0.75, 1.0], [0.75, 1.0]])


def test_picture_names_arms_and_theory(directory: Path) -> None:
    plot_sweep(directory, directory / "parity.svg")
    text = texts(directory / "parity.svg")
    for label in (
        "low (2 seeds)",
        "direct (2 seeds)",
        "0.400",
        "no schedule",
        "validation accuracy",
        "training accuracy",
    ):
        assert label in text, label


def test_unknown_formats_are_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"parity\.xyz: no picture format 'xyz'"):
        plot_sweep(directory, directory / "parity.xyz")
    assert not (directory / "parity.xyz").exists()
