"""Two trained runs, a denoiser and a causal one, for every test of what is done with runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_md.cli import main
from tests.data.small_corpus import made_up_code
from tests.evaluate.trained_run import run_config
from tests.ranks import run_ranks
from tests.train.test_trainer import pretrain


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a tokenizer, two corpora, and the runs `run` (a denoiser) and `causal` of a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.py").write_text(made_up_code(number), encoding="utf-8")
    words = ["--input", str(folder / "text"), "--output"]
    assert main(["tokenizer", "train", *words, str(folder / "tokenizer.model"), "--vocab", "340"]) == 0
    tokenizer = ["--tokenizer", str(folder / "tokenizer.model")]
    for split in ("train", "valid"):
        assert main(["data", "build", *words, str(folder / split), *tokenizer, "--split", split]) == 0
    run_ranks(pretrain, 1, run_config(folder, "run"))
    run_ranks(pretrain, 1, run_config(folder, "causal", objective={"name": "autoregressive"}))
    return folder
