"""What ships: package data, examples, pins, and the one file that may name megatron-core's model class."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from megatron_md.config import load_config, preset_names
from megatron_md.run.check import check_config

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# World sizes that the examples are written for; 1 where nothing is said.
WORLDS = {
    "tiny/demo": [2],
    "50m/window": [8],
    "1b/pretrain": [1, 8],
    "8b/pretrain": [8, 64],
    "8b/tp1": [64],
    "8b/pipeline": [64],
    "continue_llada_8b": [8, 64],
    "sft/llada_8b": [8, 64],
}
# Those of parity and studies have tests of their own.
EXAMPLES = sorted(path for path in ROOT.glob("examples/**/*.yaml") if path.parent.name not in ("parity", "studies"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_is_a_sound_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))
    config = load_config(path)
    name = path.relative_to(ROOT / "examples").with_suffix("").as_posix()
    for world in WORLDS.get(name, [1]):
        assert check_config(config, world, corpora=False).world == world


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/parity/*.yaml")), ids=lambda path: path.stem)
def test_every_parity_example_is_a_sound_config(path: Path) -> None:
    from megatron_md.parity.config import check_parity, load_parity_config

    check_parity(load_parity_config(path, []))


def test_every_world_size_belongs_to_an_example() -> None:
    assert all((ROOT / "examples" / f"{name}.yaml").is_file() for name in WORLDS)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_a_sound_model(preset: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {{preset: {preset}}}")
    config = load_config(tmp_path / "run.yaml")
    assert config.model.preset == preset
    check_config(config, 1, corpora=False)


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("examples/**/*.s*"), ROOT / ".ci/run"]), ids=lambda path: path.name
)
def test_every_script_parses(script: Path) -> None:
    assert script.stat().st_mode & 0o100, "not executable"
    subprocess.run(["bash", "-n", str(script)], check=True)


def _requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[; ]", text)[0].lower().replace("_", "-") for text in requirements}


def test_everything_we_depend_on_is_pinned_but_torch() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = _requirement_names(lines)
    declared = _requirement_names(PROJECT["project"]["dependencies"])
    development = _requirement_names(PROJECT["project"]["optional-dependencies"]["dev"])
    assert (declared | development) - pinned == {"torch"}
    assert "megatron-core==0.16.1" in lines
    assert "apex" not in declared | development | pinned


def test_only_one_file_names_the_model_class() -> None:
    naming = []
    for path in sorted((ROOT / "megatron_md").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom | ast.Import) else []
            if {"GPTModel", "megatron.core.models.gpt.gpt_model"} & set(names):
                naming.append(path.relative_to(ROOT).as_posix())
    assert naming == ["megatron_md/model/build.py"]


def test_no_source_file_is_overlong_or_without_docstring() -> None:
    for path in (ROOT / "megatron_md").rglob("*.py"):
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        assert len(text.splitlines()) <= 420, f"{path} is too long"


@pytest.mark.slow
def test_wheel_holds_the_presets_and_nothing_of_the_tests(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "megatron_md", source / "megatron_md", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for preset in preset_names():
        assert f"megatron_md/presets/{preset}.yaml" in names
    assert {"megatron_md/evaluate/trace.html", "megatron_md/report/page.html"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"megatron_md"}
    assert any(name.endswith("entry_points.txt") for name in names)
