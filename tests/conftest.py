"""Fixtures that several packages' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_md import parallel
from megatron_md.cli import main
from megatron_md.config import Config, DataConfig, ModelConfig, ResolvedConfig, resolve
from megatron_md.data.entries import Document
from megatron_md.data.tokenizer import Tokenizer, train_tokenizer
from tests.data.small_corpus import made_up_code
from tests.ranks import run_ranks
from tests.train.test_trainer import pretrain
from tests.trained_run import run_config


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need CUDA say so where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def small_config() -> ResolvedConfig:
    """A model small enough for milliseconds, with every dimension different."""
    shape = ModelConfig(vocab=101, layers=2, hidden=32, heads=4, kv_heads=2, ffn=48)
    return resolve(Config(model=shape, data=DataConfig(seq_length=16)))


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """A test that leaves this process in a job breaks the tests after it: it fails itself instead."""
    yield
    if dist.is_initialized() and not _shared_world:
        parallel.shutdown()
        pytest.fail("left torch.distributed initialised: start groups through run_ranks, or end them")


_shared_world: list[parallel.World] = []


@pytest.fixture(scope="session")
def world(small_config: ResolvedConfig) -> Iterator[parallel.World]:
    """This process as a job of one, for tests that build modules without starting ranks."""
    _shared_world.append(parallel.initialize(small_config))
    yield _shared_world[0]
    parallel.shutdown()
    _shared_world.clear()


@pytest.fixture(scope="session")
def code() -> list[Document]:
    return [Document(f"code/{number:03d}.py", made_up_code(number)) for number in range(150)]


@pytest.fixture(scope="session")
def tokenizer(code: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(code, 330, tmp_path_factory.mktemp("tokenizer") / "small.model")


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
