"""Where `imports` is looked for: a dry run of a foreign config does not run what lies in the working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENTRIES = {
    "module": ["-m", "megatron_md"],
    "script": ["-c", "import sys; sys.path[0] = '/'; from megatron_md.cli import main; sys.exit(main())"],
}
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config, and beside it the module that it imports."""
    (tmp_path / "foreign_plugin.py").write_text("open('ran', 'w')\n")
    text = f"model: {{preset: tiny, vocab: 300}}\nrun_dir: {tmp_path}/run\nimports: [foreign_plugin]\n"
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path


def dry_run(folder: Path, entry: str, *words: str, path: str = "") -> tuple[int, str, bool]:
    """Exit code and stderr of a dry run in the config's folder, and whether the module ran."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{path}"}
    command = [sys.executable, *ENTRIES[entry], "train", "config.yaml", "--dry-run", *words]
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    return done.returncode, done.stderr, (folder / "ran").exists()


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_dry_run_imports_nothing_from_the_working_directory(folder: Path, entry: str) -> None:
    code, said, ran = dry_run(folder, entry, path=":")  # an empty entry stands for it too
    assert (code, ran) == (2, False)
    assert said.count("\n") == 1 and "only --trust imports from the working directory" in said


@pytest.mark.parametrize("entry", ENTRIES)
def test_with_trust_it_does(folder: Path, entry: str) -> None:
    assert dry_run(folder, entry, "--trust") == (
        0,
        "megatron-md: note: training would stop here: data.train is not set: "
        "give the manifest.json of the training shards\nmegatron-md: note: training would stop here: data.valid is not "
        "set, and validation needs it (or set validation.sequences=0)\n",
        True,
    )


@pytest.mark.parametrize("path", [":{folder}", ":."])
def test_pythonpath_is_trusted(folder: Path, path: str) -> None:
    code, _, ran = dry_run(folder, "module", path=path.format(folder=folder))
    assert (code, ran) == (0, True)
