"""What the demo says of its model: costs in bits per byte, a function with gaps, texts; on a run of a few steps."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType

import megatron_md as md
from tests.ranks import run_ranks

SCRIPT = Path(__file__).parent.parent / "examples/tiny/judge.py"
HELD_OUT = ["import os\n\n\ndef f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        pass\n"]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("judge", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SHORTEST, module.LENGTH, module.PROMPT = 8, 8, "x = "  # type: ignore[attr-defined]
    module.STRATEGIES = [options | {"block": 8} for options in module.STRATEGIES]  # type: ignore[attr-defined]
    return module


def told(folder: Path) -> tuple[list[str], float]:
    """What its three parts print about a run, and bits per byte by `evaluate`."""
    demo, printed = load(), []
    for part in (
        lambda: demo.judge(folder / "run", folder / "valid", HELD_OUT),
        lambda: demo.fill_in(folder / "run", HELD_OUT),
        lambda: demo.sample(folder / "run"),
    ):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            part()
        printed.append(out.getvalue())
    return printed, md.evaluate(folder / "run", folder / "valid", rows=1024, passes=1).bits_per_byte or 0.0


def test_what_it_tells_of_a_run(trained: Path) -> None:
    (((costs, function, texts), bits),) = run_ranks(told, 1, trained)
    *_, compressed, ours = costs.splitlines()
    text = HELD_OUT[0].encode()
    assert compressed.split()[-1] == f"{8 * len(gzip.compress(text, 9)) / len(text):.2f}"
    assert f" {bits:.2f} ± " in ours

    # What is not masked is kept.
    demo = load()
    masked, filled = re.split(r"filled in.*\n", function)
    found = re.search(r"(\d+) of (\d+) tokens masked", masked)
    assert found is not None and round(demo.MASKED * int(found[2])) == int(found[1])
    canvas = masked.split("\n", 1)[1].rstrip("\n")
    assert canvas.count(demo.OPEN) == int(found[1])
    assert re.match(".*?".join(map(re.escape, canvas.split(demo.OPEN))), filled, re.DOTALL)

    assert re.findall(r"^(\w+), .* passes ", texts, re.MULTILINE) == ["ancestral", "entropy", "threshold"]
    assert texts.count("x = ") >= 3


def test_functions_end_where_the_next_statement_begins() -> None:
    assert [found[0] for found in load().FUNCTION.finditer(HELD_OUT[0] + "x = 1\n")] == [
        "def f(x):\n    return x + 1\n",
        "    def g(self):\n        pass\n",
    ]
