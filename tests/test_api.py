"""The API in a notebook's place: all examples of docstrings and README, one after the other in one process."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import megatron_md as md
from megatron_md.cli import main
from megatron_md.data.chat_template import ChatTemplate
from megatron_md.data.dialogues import ChatSettings
from megatron_md.data.shards import load_manifest
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.errors import UserError
from megatron_md.train.resilience import SIGNALS
from tests.data.small_corpus import made_up_code
from tests.ranks import run_ranks

README = Path(__file__).parent.parent / "README.md"
ORDER = ("train_tokenizer", "build_data", "train", "evaluate", "generate", "load", "convert", "compare", "plot")
CONFIG = {
    "run_dir": "runs/unused",
    "model": {"vocab": 320, "layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 32, "max_length": 32},
    "data": {
        "train": "corpus/train", "valid": "corpus/valid", "tokenizer": "corpus/tokenizer.model", "seq_length": 32,
    },
    "train": {"steps": 500, "global_batch_size": 4, "micro_batch_size": 4, "device": "cpu"},
    "validation": {"sequences": 4},
    "log": {"every_steps": 1, "tensorboard": False},
}  # fmt: skip


def run_examples(folder: Path) -> str:
    """On a rank: what is wrong with the examples."""
    os.chdir(folder)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    failures: list[str] = []
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    names: dict[str, Any] = {"md": md, "torch": torch}
    for name in ORDER:
        function = inspect.unwrap(getattr(md, name))
        test = parser.get_doctest(inspect.getdoc(function) or "", names, name, None, None)
        assert test.examples, name
        runner.run(test, out=failures.append, clear_globs=False)
    md.train("books.yaml", steps=4, run_dir="runs/books", optimizer={"lr": 1e-3})  # the run goes on
    assert (folder / "runs/books/checkpoints/step_00000004").is_dir()
    (readme,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    exec(readme, {})
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    return "".join(failures)


@pytest.mark.distributed
def test_the_examples_of_all_functions_run_in_one_process(tmp_path: Path) -> None:
    assert sorted(ORDER) == sorted(md.__all__)
    (tmp_path / "books").mkdir()
    for number in range(60):
        (tmp_path / "books" / f"{number}.txt").write_text(made_up_code(number), encoding="utf-8")
    (tmp_path / "books.yaml").write_text(yaml.safe_dump(CONFIG))
    assert run_ranks(run_examples, 1, tmp_path) == [""]


def test_dialogues_are_built_as_by_the_command(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = tmp_path / "dialogues.jsonl"
    lines.write_text('{"prompt": "def alpha(", "completion": "self):"}\n' * 3)
    chat = ChatSettings(ChatTemplate.of(tokenizer, "plain"))
    found = md.build_data(lines, tmp_path / "api", tokenizer=tokenizer.path, chat=chat)
    words = ["--chat", "--template", "plain", "--input", str(lines), "--tokenizer", str(tokenizer.path)]
    assert main(["data", "build", *words, "--output", str(tmp_path / "command")]) == 0
    assert found.sha256 == load_manifest(tmp_path / "command").sha256 and found.kind == "chat"


def test_the_package_is_imported_without_torch_and_called_after_its_parts() -> None:
    code = (
        "import sys, megatron_md as md\n"
        "assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "from megatron_md.evaluate.compare import compare_runs\n"
        "import megatron_md.train.records\n"
        "md.evaluate('nowhere', 'corpus')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("megatron_md.errors.UserError: nowhere: neither a run directory")


def test_keys_are_those_of_the_train_section_or_whole_sections() -> None:
    with pytest.raises(UserError) as error:
        md.train(dict(CONFIG), step=1, model={"layer": 2}, run_dir="runs/x")
    assert "train.step; did you mean train.steps?" in str(error.value) and "model.layer;" in str(error.value)
