"""`megatron-md simulate`: one line for bad input, and figures of a real simulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_md import cli
from megatron_md.simulate.guard import compiler

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples/tiny/demo.yaml"


def main(*words: object) -> int:
    try:
        return cli.main(["simulate", *map(str, words)])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["none.yaml"], "none.yaml: no such file"),
        ([DEMO, "--hardware", "h300"], "--hardware h300: unknown; did you mean"),
        ([DEMO, "parallel.tensor=2", "--world-size", "3"], "3 processes are more than the layout needs"),
        ([DEMO, "--world-size", "0"], "0 is below 1"),
        ([DEMO, "data.tokenizer=none.model"], "or set model.vocab"),
        (
            [DEMO, "model.vocab=512", "--json", "/nowhere/x.json"],
            "--json /nowhere/x.json: the folder /nowhere does not",
        ),
        ([DEMO, "model.vocab=512", "train.global_batch_size=7"], "train.global_batch_size 7 is no multiple"),
        (
            [DEMO, "model.vocab=512", "--world-size", "2", "--sweep", "--hardware", "small.yaml"],
            "no layout of 2 processes",
        ),
    ],
)
def test_bad_input_gets_one_line(
    words: list[object],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    h100 = (ROOT / "megatron_md/simulate/devices/h100.yaml").read_text()
    (tmp_path / "small.yaml").write_text(h100.replace("memory_bytes: 80e9", "memory_bytes: 1e9"))
    assert main(*words) == 2
    output = capsys.readouterr()
    assert expected in output.err
    assert output.err.count("\n") == 1 and output.out == ""


def test_a_core_that_refuses_the_model_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    assert main(DEMO, "model.vocab=512", "megatron.transformer={num_moe_experts: 4}") == 2
    output = capsys.readouterr()
    assert "megatron.transformer.num_moe_experts: such layers are not built here" in output.err
    assert output.err.count("\n") == 1


def test_a_sweep_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    words = [
        "model.vocab=512",
        "train.precision=bf16",
        "--world-size",
        2,
        "--sweep",
        2,
        "--json",
        tmp_path / "sweep.json",
    ]
    assert main(DEMO, *words) == 0
    output = capsys.readouterr()
    assert "more layouts fit and were not simulated" in output.err
    table = output.out.splitlines()
    assert len(table) == 4 and table[1].split()[:2] == ["tensor", "pipeline"]
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert len(found) == 2
    assert found[0]["stages"][0]["peak"] == sum(found[0]["stages"][0]["memory"].values())
    assert all(entry["forecast"]["fits"] for entry in found)
