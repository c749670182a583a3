"""What ships: package data, examples, pins, and the one file that may name megatron-core's model class."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from megatron_md import __version__
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


def test_the_version_is_the_same_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited["version"] == __version__
    assert headings[:2] == ["[Unreleased]", f"[{__version__}] - {cited['date-released']}"]
    assert cited["license"] == PROJECT["project"]["license"]


def test_the_workflow_runs_what_a_merge_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["run"]["steps"] if "run" in step] == [".ci/run"]
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"):
        assert {"name", "description", "body"} <= yaml.safe_load(form.read_text()).keys()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy with tests beside the package."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "megatron_md", source / "megatron_md", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_md").rglob("*") if path.is_file()}
    assert {name for name in names if ".dist-info/" not in name} == {
        name for name in files if "__pycache__" not in name
    }
    assert f"megatron_md-{__version__}.dist-info/entry_points.txt" in names
    assert f"megatron_md-{__version__}.dist-info/licenses/LICENSE" in names


INSTALLED = """
import sys
import megatron_md
from megatron_md import cli
assert megatron_md.__file__.startswith(sys.argv[1]), megatron_md.__file__
for words in sys.argv[2:]:
    assert cli.main(words.split()) == 0, words
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # trains a tokenizer and a model on a busy machine
def test_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """Every file that is no code is read: presets, devices, the record, the pages that `report` and a trace fill."""
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(command, check=True)
    presets = [f"train shape.yaml --dry-run model.preset={name}" for name in preset_names()]
    (tmp_path / "shape.yaml").write_text("model: {vocab: 320}")
    (tmp_path / "run.yaml").write_text(
        "run_dir: run\nmodel: {preset: tiny, layers: 1, hidden: 32, heads: 2, ffn: 64}\n"
        "data: {train: corpus, valid: corpus, tokenizer: t.model, seq_length: 32}\n"
        "train: {steps: 2, global_batch_size: 4, micro_batch_size: 4, device: cpu}\n"
        "validation: {sequences: 4}\nlog: {tensorboard: false}\n"
    )
    commands = [
        *presets,
        "tokenizer train --input embedded --vocab 512 --sample-bytes 100000 --output t.model",
        "data build --input embedded --split valid --tokenizer t.model --output corpus",
        "train run.yaml",
        "report run",
        "generate run --length 8 --steps 2 --save-trace trace.html",
    ]
    code = (
        f"{INSTALLED}\nfrom megatron_md.parity.validate import default_reference\nassert default_reference().is_file()"
    )
    code += "\nfrom megatron_md.simulate.hardware import load_hardware\nassert load_hardware('b200')"
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code, str(site), *commands]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/report.html").stat().st_size > 10_000 and (tmp_path / "trace.html").is_file()
