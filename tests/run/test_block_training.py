"""Whole runs in blocks: exact resumes over a change of the block size, dialogues, bounds, texts, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.cli import main
from megatron_md.config import ChatConfig, Config
from megatron_md.config.objective import BlockStage, MaskNoiseConfig
from tests.ranks import run_ranks
from tests.run.test_chat_training import PACKED, PADDED, chat_config, figures
from tests.run.test_chat_training import corpora as corpora  # a fixture
from tests.small_run import LENGTH, variant
from tests.train.test_trainer import metrics, pretrain, pretrain_and_die_after, without_times
from tests.trained_run import run_config

GROWING = {
    "name": "block_diffusion",
    "block_size": [BlockStage(1, 0.3), BlockStage(4, 0.6), BlockStage(8)],
    "autoregressive_weight": 0.5,
    "mask_noise": MaskNoiseConfig(std=0.1, until=0.7),
}


@pytest.mark.distributed
def test_a_run_whose_blocks_grow_resumes_to_the_bit(tmp_path: Path, trained: Path) -> None:
    def config(name: str, **checkpoint: Any) -> Config:
        base = run_config(trained, name, objective=GROWING, validation={"every_steps": 2}, checkpoint=checkpoint)
        return variant(base, train={"steps": 8})  # type: ignore[type-var]

    run_ranks(pretrain, 1, config("blocks-whole"))
    parts = config("blocks-parts", every_steps=3)
    run_ranks(pretrain_and_die_after, 1, parts, 4, timeout=60)
    run_ranks(pretrain, 1, parts)
    records = metrics(trained / "blocks-parts")
    assert without_times(records) == without_times(metrics(trained / "blocks-whole"))
    assert all(record["autoregressive_ce"] > 0 for record in records)


@pytest.mark.distributed
@pytest.mark.parametrize("data", [PADDED, PACKED], ids=["padded", "packed"])
def test_answers_are_written_in_blocks_on_every_layout(
    tmp_path: Path, corpora: dict[str, str], data: dict[str, Any]
) -> None:
    objective = {"name": "block_diffusion", "block_size": 8, "normalise": "sequences"}
    found = []
    for size, layout in ((1, {}), (2, {"tensor": 2, "sequence_parallel": True})):
        config = chat_config(tmp_path / str(size), corpora, data, objective=objective, parallel=layout)
        run_ranks(pretrain, size, config)
        found.append(figures(tmp_path / str(size)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_rows_of_dialogues_are_whole_blocks(corpora: dict[str, str], tmp_path: Path) -> None:
    data = {"chat": ChatConfig(length_multiple=2), "document_attention": "full"}
    config = chat_config(tmp_path, corpora, data, objective={"name": "block_diffusion", "block_size": 8})
    assert config.row_unit == 8


@pytest.fixture(scope="module")
def block_run(trained: Path) -> Path:
    objective = {"name": "block_diffusion", "block_size": 8}
    run_ranks(pretrain, 1, run_config(trained, "blocks", objective=objective))
    return trained / "blocks"


def call(*calls: list[str]) -> list[int]:
    return [main(words) for words in calls]


@pytest.mark.distributed
def test_evaluate_tells_the_bound_that_validation_told(trained: Path, block_run: Path) -> None:
    output = trained / "blocks.json"
    words = ["evaluate", str(block_run), "--nelbo", str(trained / "valid"), "--rows", "12", "--passes", "1"]
    assert run_ranks(call, 1, [*words, "--json", str(output), "--device", "cpu"]) == [[0]]
    found = json.loads(output.read_text())
    told = json.loads((block_run / "summary.json").read_text())
    (model,) = found.get("models", (found,))
    assert abs(model["nelbo"] - told["val_nelbo"]) < 1.0 and np.isfinite(model["nelbo"])


@pytest.mark.distributed
def test_prompts_of_different_lengths_are_continued_together(trained: Path, block_run: Path) -> None:
    prompts, output = trained / "block_prompts.txt", trained / "block_texts.jsonl"
    prompts.write_text("def f(\nvalue = alpha\nx\n")
    words = [
        "generate",
        str(block_run),
        "--prompts-file",
        str(prompts),
        "--length",
        "12",
        "--device",
        "cpu",
        "--output",
    ]
    texts = {}
    for name, size, more in (
        ("kept", 1, []),
        ("anew", 1, ["--cache", "none"]),
        ("alone", 1, ["--batch-size", "1"]),
        ("tensor", 2, []),
    ):
        assert run_ranks(call, size, [*words, str(output), *more]) == [[0]] * size
        texts[name] = [json.loads(line) for line in output.read_text().splitlines()]
    for name, found in texts.items():
        assert [text["tokens"] for text in found] == [text["tokens"] for text in texts["kept"]], name
        assert all(len(text["tokens"]) == 12 for text in found)
    assert len({text["forward_passes"] for text in texts["kept"]}) == 1, "one batch"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["generate", "RUN", "--prompt", "x = [[3]]", "--infill"], "--infill: a block model sees nothing behind"),
        (["generate", "RUN", "--length", "12", "--block", "4"], "block 4: the model's own blocks are of 8 tokens"),
        (["generate", "RUN", "--prompt", "x", "--length", "12", "--guidance", "1"], "guidance needs logits"),
        (["generate", "RUN", "--length", "12", "--cache", "dual"], "cache dual: a block model keeps all exactly"),
    ],
)  # fmt: skip
def test_generate_refuses_in_one_line(
    block_run: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(block_run) if word == "RUN" else word for word in words]) == 2
    (told,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("megatron-md:")]
    assert line in told


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["objective.block_size=12"], "objective.block_size 12 does not divide data.seq_length 32"),
        ([], "objective.name block_diffusion needs objective.block_size"),
        (["objective.block_size=[{size: 8, until: 0.5}, {size: 4, until: 0.5}]"], "its stages end at [0.5, 0.5]"),
        (["objective.block_size=[{size: 8, until: 0.5}]"], "its stages end at [0.5]"),
        (["objective.block_size=8", "objective.right_shift=true"], "does not go with right_shift"),
        (["objective.block_size=8", "objective.token_rate={name: position, strength: 1}"], "does not go with"),
        (["objective.block_size=8", "data.random_length_fraction=0.1"], "data.random_length_fraction"),
        (["objective.block_size=8", "objective.pairs=antithetic"], "or pairs: set them back"),
        (["objective.block_size=8", "objective.mask_schedule=point:0"], "has a rate of exactly 0"),
        (["objective.block_size=8", "parallel.context=3"], "parallel.context 3 does not divide"),
        (["objective.block_size=0"], "block_size"),
        (["objective.name=masked_diffusion", "objective.block_size=8"], "are of block_diffusion, and name is masked"),
        (["objective.name=masked_diffusion", "objective.autoregressive_weight=1"], "are of block_diffusion"),
        (["objective.block_size=8", "objective.autoregressive_weight=1", "objective.normalise=masked",
          "objective.weight=none"], "normalise masked does not count"),
    ],
    ids=str,
)  # fmt: skip
def test_train_refuses_in_one_line(
    tmp_path: Path, trained: Path, keys: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(
        f"run_dir: {tmp_path / 'run'}\ndata: {{train: {trained / 'train'}, seq_length: {LENGTH}}}\n"
        "objective: {name: block_diffusion}\ntrain: {device: cpu}\n"
    )
    assert main(["train", str(tmp_path / "a.yaml"), "--dry-run", *keys]) == 2
    told = capsys.readouterr().err
    assert line in told and "Traceback" not in told and not (tmp_path / "run").exists()
