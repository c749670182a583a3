"""`megatron-md schedule fit`: knots that a config takes, the same every time, a picture, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_md.cli import main
from megatron_md.config import config_from_mapping
from megatron_md.diffusion.schedule import parse_schedule
from megatron_md.run.check import check_config
from tests.ranks import run_ranks


def fit(*words: str) -> int:
    return main(["schedule", "fit", *words])


def fitted(trained: Path, output: Path, *words: str) -> None:
    shape = ["--rows", "16", "--group", "2"]
    assert run_ranks(fit, 1, str(trained / "run"), *shape, "--output", str(output), *words) == [0]


def test_its_files_are_schedules_that_a_config_takes(trained: Path, tmp_path: Path) -> None:
    output, record = tmp_path / "fitted.knots", tmp_path / "fit.json"
    fitted(trained, output, "--json", str(record))
    variance, picture = tmp_path / "fitted.variance.knots", tmp_path / "fitted.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(record.read_text())
    for path, name in ((output, "aligned"), (variance, "variance")):
        schedule = parse_schedule(f"knots:{path}")
        assert schedule.has_full_support()
        t = np.array([point[0] for point in found["densities"][name]["knots"]])
        density = np.array([point[1] for point in found["densities"][name]["knots"]])
        np.testing.assert_allclose(schedule.density(t), density / np.trapezoid(density, t), rtol=1e-5)
        assert min(density) >= 0.1 and np.mean(found["densities"][name]["bins"]) == pytest.approx(1.0)
    assert found["rows"] == 16 and found["steps"] == [2] and len(found["signal"]) == 16
    assert found["loss"][8] == pytest.approx(5.8, abs=1.0)  # two steps from log 340
    anneal = {"name": "anneal", "from": f"knots:{output}", "to": "uniform:0,1", "over": [0.7, 1.0]}
    for objective in ({"mask_schedule": anneal}, {"mask_schedule": f"knots:{variance}", "importance": True}):
        check_config(config_from_mapping({"objective": objective}), 1, corpora=False)


@pytest.mark.slow
def test_it_finds_the_same_again_and_averages_checkpoints(trained: Path, tmp_path: Path) -> None:
    fitted(trained, tmp_path / "one.knots")
    fitted(trained, tmp_path / "two.knots", "--checkpoints", "2", "2")
    one, two = ((tmp_path / name).read_text().splitlines()[1:] for name in ("one.knots", "two.knots"))
    assert one == two
    fitted(trained, tmp_path / "other.knots", "--seed", "1")
    assert (tmp_path / "other.knots").read_text().splitlines()[1:] != one


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["{trained}/causal"], "objective.name autoregressive has no mask schedule to fit"),
        (["{trained}/nowhere"], "neither a run directory with a complete checkpoint"),
        (["{trained}/run", "--checkpoints", "7"], "step_00000007"),
        (["{trained}/run", "--rows", "8"], "8 groups of --group 8 rows are needed"),
        (["{trained}/run", "--output", "{trained}/none/a.knots"], "none does not exist"),
        (["{trained}/run", "--output", "{trained}/a.png"], "ends with .png, as its picture does"),
        (["{trained}/run", "--data", "{trained}/missing.txt"], "cannot be read as text"),
    ],
)
def test_bad_input_is_one_line(words: list[str], text: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in trained.iterdir())
    assert fit(*(word.format(trained=trained) for word in words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
    assert sorted(path.name for path in trained.iterdir()) == before


def test_several_processes_are_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fit(str(trained / "run")) == 2
    assert "one process" in capsys.readouterr().err
