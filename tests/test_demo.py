"""What the demo says of its model: costs in bits per byte, a function with gaps, texts; on a run of a few steps."""

from __future__ import annotations

import gzip
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import megatron_md as md

SCRIPT = Path(__file__).parent.parent / "examples/tiny/judge.py"
HELD_OUT = ["import os\n\n\ndef f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        pass\n"]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("judge", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHORTEST", 8)
    monkeypatch.setattr(module, "LENGTH", 8)
    monkeypatch.setattr(module, "PROMPT", "x = ")
    return module


def test_costs_are_those_of_gzip_and_of_evaluate(
    demo: ModuleType, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.judge(trained / "run", trained / "valid", HELD_OUT)
    lines = capsys.readouterr().out.splitlines()
    text = HELD_OUT[0].encode()
    assert lines[-2].split()[-1] == f"{8 * len(gzip.compress(text, 9)) / len(text):.2f}"
    assert f" {md.evaluate(trained / 'run', trained / 'valid').bits_per_byte:.2f} ± " in lines[-1]


def test_a_function_keeps_what_is_not_masked(
    demo: ModuleType, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.fill_in(trained / "run", HELD_OUT)
    masked, filled = re.split(r"filled in.*\n", capsys.readouterr().out)
    found = re.search(r"(\d+) of (\d+) tokens masked", masked)
    assert found is not None and round(demo.MASKED * int(found[2])) == int(found[1])
    canvas = masked.split("\n", 1)[1].rstrip("\n")
    assert canvas.count(demo.OPEN) == int(found[1])
    parts = [re.escape(part) for part in canvas.split(demo.OPEN)]
    assert re.match(".*?".join(parts), filled, re.DOTALL)


def test_functions_end_where_the_next_statement_begins(demo: ModuleType) -> None:
    assert [found[0] for found in demo.FUNCTION.finditer(HELD_OUT[0] + "x = 1\n")] == [
        "def f(x):\n    return x + 1\n",
        "    def g(self):\n        pass\n",
    ]


def test_a_text_for_each_strategy(
    demo: ModuleType, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "STRATEGIES", tuple(options | {"block": 8} for options in demo.STRATEGIES))
    demo.sample(trained / "run")
    told = capsys.readouterr().out
    assert re.findall(r"^(\w+), .* passes ", told, re.MULTILINE) == ["ancestral", "entropy", "threshold"]
    assert told.count("x = ") == 3
