"""Packages that megatron-core imports by itself: found without an import, told in one line where they are broken."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_md import installed
from megatron_md.errors import UserError
from megatron_md.installed import broken_ones_told, is_foreign_apex, removal, version
from tests.train.test_trainer import write_bigram_corpus

ROOT = Path(__file__).parent.parent


def write_package(folder: Path, name: str, code: str = "", **modules: str) -> Path:
    """A package with modules, to be put on the path."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    for module, text in modules.items():
        (folder / name / f"{module}.py").write_text(text)
    return folder


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path of this process; what it holds is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("transformer_engine", "transformer_engine.pytorch", "apex", "some_package"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


BROKEN = {
    "RuntimeError": "raise RuntimeError('no libcudart\\nanywhere')",
    "OSError": "import ctypes; ctypes.CDLL('libnone.so')",
    "FileNotFoundError": "open('/none/libtransformer_engine.so')",
    "ImportError": "raise ImportError('undefined symbol: _ZN3c10')",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_package_that_fails_while_it_is_imported_is_told_in_one_line(name: str, path: Path) -> None:
    write_package(path, "transformer_engine", pytorch=BROKEN[name])
    with pytest.raises(UserError) as error, broken_ones_told():
        importlib.import_module("transformer_engine.pytorch")
    line = str(error.value)
    assert "\n" not in line
    assert f"transformer_engine, which is broken here ({name}: " in line
    assert f"take {path}/transformer_engine/__init__.py off PYTHONPATH" in line


def test_a_part_that_is_not_there_is_told_too(path: Path) -> None:
    write_package(path, "transformer_engine")
    with pytest.raises(UserError, match="ModuleNotFoundError: No module named"), broken_ones_told():
        importlib.import_module("transformer_engine.pytorch")


def test_errors_of_a_working_package_and_of_others_stay_as_they_are(path: Path) -> None:
    write_package(path, "transformer_engine", "def compute(): raise RuntimeError('out of memory')")
    write_package(path, "some_package", "raise RuntimeError('of its own')")
    with pytest.raises(RuntimeError, match="out of memory"), broken_ones_told():
        importlib.import_module("transformer_engine").compute()
    with pytest.raises(RuntimeError, match="of its own"), broken_ones_told():
        importlib.import_module("some_package")
    with pytest.raises(ModuleNotFoundError, match="none_such"), broken_ones_told():
        importlib.import_module("none_such")


def test_nvidias_apex_is_told_from_the_one_of_the_package_index(path: Path) -> None:
    assert not is_foreign_apex()
    write_package(path, "apex", "raise AssertionError('it must not be imported')", models="")
    importlib.invalidate_caches()
    assert is_foreign_apex()
    (path / "apex" / "multi_tensor_apply").mkdir()
    assert not is_foreign_apex()


def test_what_pip_has_installed_pip_removes() -> None:
    assert removal("sentencepiece") == "pip uninstall sentencepiece"
    assert version("none-such", "numpy") == version("numpy") is not None
    assert version("none-such") is None
    assert {"transformer_engine", "apex"} == set(installed.OPTIONAL)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_refuses_in_one_line_instead_of_a_traceback(processes: int, tmp_path: Path) -> None:
    """The real import of megatron-core, on a machine with a wheel that misses its libraries."""
    stub = write_package(tmp_path / "stub", "transformer_engine", BROKEN["RuntimeError"])
    corpus = write_bigram_corpus(tmp_path / "corpus", 8, 0)
    keys = [f"run_dir={tmp_path}/run", f"data.train={corpus}", "train.device=cpu", "train.global_batch_size=8"]
    keys += ["validation.sequences=0", "data.seq_length=32"]
    (tmp_path / "run.yaml").write_text("model: {preset: tiny}\ntrain: {micro_batch_size: 2}\n")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_md", "train", "run.yaml", "--nproc-per-node", str(processes), *keys],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{stub}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "megatron-md: megatron-core imports transformer_engine, which is broken here (RuntimeError: "
    )
