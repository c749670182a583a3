"""The command line: exit codes, one-line refusals, who prints them, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_md import __version__, cli
from megatron_md.config import Config
from megatron_md.errors import UserError

TINY = "model: {preset: tiny, vocab: 300}\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"{TINY}run_dir: {tmp_path}/run\n")
    return path


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MEGATRON_MD_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def main(*words: object) -> int:
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
def test_every_command_has_help_with_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*command, "--help") == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "megatron-md" in text.split("examples:")[1]


def test_train_help_explains_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", "--help") == 0
    text = capsys.readouterr().out
    assert "objective.mask_schedule: text or mapping = uniform:0,1" in text
    assert "train.batch_ramp.increment: whole number > 0 (required)" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--version") == 0
    assert capsys.readouterr().out == f"megatron-md {__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "required: CONFIG.yaml"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "none.yaml", "--dry"], "none.yaml: no such file"),
        (["train", "none.yaml", "--nproc", "0"], "0 is below 1"),
        (["train", "none.yaml", "--unknown"], "unknown argument(s) --unknown"),
        (["plot", "none"], "none/metrics.jsonl: no such file"),
    ],
)
def test_bad_words_get_one_line_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("megatron-md")
    assert expected in output.err


def test_bad_config_lines_name_the_file(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", config_file, "--dry-run", "parallel.tensor=3", "objective.mask_schedule=uniform:1,0"]
    assert main(*words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # heads, kv_heads and ffn are not divided by 3; the window is empty
    assert all(line.startswith(f"megatron-md: {config_file}: ") for line in lines)


def test_overrides_may_come_before_and_after_options(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", config_file, "seed=1", "--dry-run", "train.steps=7", "--world-size", "2", "log.every_steps=3"]
    assert main(*words) == 0
    text = capsys.readouterr().out
    for expected in ("seed: 1\n", "steps: 7\n", "every_steps: 3\n", "2 = tensor 1 x pipeline 1 x context 1 x data 2"):
        assert expected in text


def test_dry_run_reports_and_mentions_missing_corpora(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", config_file, "--dry-run", "parallel.tensor=2", "data.train=none.json") == 0
    output = capsys.readouterr()
    assert "2 = tensor 2 x" in output.out  # the smallest job that fits, where no size is given
    assert "830,080" in output.out
    assert "note: training would stop here: data.train: none.json: no such file" in output.err
    assert not (config_file.parent / "run").exists()


def test_dry_run_without_a_vocabulary_says_what_to_set(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", config_file, "--dry-run", "model.vocab=null") == 2
    assert "model.vocab is null" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--world-size", "4"], "--world-size belongs to --dry-run"),
        (["--nnodes", "2"], "--nnodes above 1 needs --rdzv-endpoint"),
        (["--nproc-per-node", "3"], "no multiple of 24"),
        (["parallel.tensor=2"], "the layout needs 2 processes"),
        ([], "data.train is not set"),
    ],
)
def test_training_is_refused_before_anything_starts(
    config_file: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("train", config_file, *words) == 2
    assert expected in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts recorders in place of the training itself, and takes the corpora for granted."""
    calls: dict[str, Any] = {}

    def pretrain(config: Config) -> int:
        calls["pretrain"] = config
        return 75

    def launch(*args: Any, **keys: Any) -> int:
        calls["launch"] = (args, keys)
        return 0

    monkeypatch.setitem(sys.modules, "megatron_md.run.pretrain", types.SimpleNamespace(pretrain=pretrain))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "megatron_md.train.launch", types.SimpleNamespace(launch=launch))  # type: ignore[arg-type]
    monkeypatch.setattr("megatron_md.run.check.missing_files", lambda config: [])
    return calls


def test_one_process_trains_here_and_its_exit_code_is_ours(config_file: Path, started: dict[str, Any]) -> None:
    assert main("train", config_file, "train.steps=3") == 75
    assert started["pretrain"].train.steps == 3
    assert "launch" not in started


def test_several_processes_are_launched(config_file: Path, started: dict[str, Any]) -> None:
    words = ["--nproc-per-node", 2, "--nnodes", 2, "--rdzv-endpoint", "a:1", "seed=3", "parallel.tensor=2"]
    assert main("train", config_file, *words) == 0
    (path, overrides), keys = started["launch"]
    assert (path, overrides) == (str(config_file), ["seed=3", "parallel.tensor=2"])
    assert keys == {
        "nproc_per_node": 2,
        "nnodes": 2,
        "rdzv_endpoint": "a:1",
        "max_restarts": 0,
        "hang_timeout": 600.0,
    }


def test_inside_a_job_it_is_a_worker(
    config_file: Path, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main("train", config_file, "parallel.tensor=2") == 75
    assert started["pretrain"].parallel.tensor == 2


@pytest.mark.parametrize(
    ("rank", "local_rank", "printed"), [("0", "0", True), ("1", "1", False), ("8", "0", True), ("9", "1", False)]
)
def test_one_process_per_machine_prints_the_refusal(
    rank: str,
    local_rank: str,
    printed: bool,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", "16")):
        monkeypatch.setenv(name, value)
    assert main("train", config_file, "parallel.tensor=3") == 2
    assert bool(capsys.readouterr().err) == printed


def test_faults_keep_their_traceback(
    config_file: Path, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretrain(config: Config) -> int:
        return int("no number")

    monkeypatch.setattr(sys.modules["megatron_md.run.pretrain"], "pretrain", pretrain)
    with pytest.raises(ValueError, match="invalid literal"):
        main("train", config_file)


def test_a_missing_file_is_bad_input_and_a_slip_of_the_code_is_not(config_file: Path, tmp_path: Path) -> None:
    from megatron_md.config.loader import read_yaml

    with pytest.raises(UserError, match="no such file"):
        read_yaml(str(tmp_path / "none.yaml"))
    assert not issubclass(json.JSONDecodeError, UserError)


def test_a_dry_run_takes_no_torch(config_file: Path, tmp_path: Path) -> None:
    words = ["train", str(config_file), "--dry-run", "data.tokenizer=none.model", "sampling.every_steps=5"]
    code = "import sys\nfrom megatron_md.cli import main\nsys.modules['torch'] = None\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "# layout and estimates" in done.stdout and "no such file" in done.stderr
    words[-1:] = ["sampling.every_steps=5", "sampling.strategy=guess", "objective.name=guess"]
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "objective.name 'guess' is unknown (known: masked_diffusion," in done.stderr
    assert "sampling: unknown sampling strategy 'guess' (known: ancestral, entropy," in done.stderr


def test_refusal_takes_no_torch(config_file: Path) -> None:
    code = (
        "import sys\nfrom megatron_md.cli import main\n"
        f"code = main(['train', {str(config_file)!r}, 'train.step=3'])\n"
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megatron-md: command line: unknown key train.step; did you mean train.steps?\n"


def test_no_command_imports_torch_to_refuse_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    none, hf = str(tmp_path / "none"), str(tmp_path / "hf")
    expected = {
        f"generate {none} --prompt x": "none: neither a run directory",
        f"generate {hf} --prompt x": "hf: a folder of Hugging Face; convert it first",
        f"generate {none} --length 64 --block 24": "length 64 is not a multiple of block 24",
        f"generate {none} --length 64 --strategy first_hitting --steps 3": "steps must be the length 64, got 3",
        f"generate {none} --top-p 0.5": "top_p 0.5 changes nothing at temperature 0",
        f"generate {none} --chat": "--chat needs a message",
        f"chat {none}": "none: neither a run directory",
        f"chat {none} --length 8 --block 16": "block 16 is longer than length 8",
        f"evaluate {none} --nelbo {none}": "none: neither a run directory",
        f"evaluate {none} --tasks boolq": "none: neither a run directory",
        f"evaluate {none} --generative": "--generative needs --judge",
        f"evaluate {none} --generative --judge {none}": "none: neither a run directory",
        f"convert {none} {none}2 --family llada --to hf": "none: no such file or folder",
        f"convert {none} {none}2 --family llada --to megatron": "none: no such file or folder",
        f"inspect {none}": "none: no such directory",
        f"plot {none}": "none",
        f"compare {none} {none}": "none",
        f"parity plot {none}": "none",
        f"window {none}": "none",
        f"data verify {none}": "none",
    }
    code = (
        "import sys\nfrom megatron_md.cli import main\nsys.modules['torch'] = None\n"
        "for line in sys.argv[1:]: print(line, file=sys.stderr); assert main(line.split()) == 2, line"
    )
    done = subprocess.run([sys.executable, "-c", code, *expected], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[::2] == list(expected)
    for line, command in zip(lines[1::2], expected, strict=True):
        assert line.startswith("megatron-md: ") and expected[command] in line


def test_module_entry_point_returns_the_exit_code(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "megatron_md", "train", "none.yaml"], check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (2, b"megatron-md: none.yaml: no such file\n")
