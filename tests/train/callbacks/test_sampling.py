"""Samples during training: the same on every layout, cut back on a resume, and nothing that training would notice."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_md.config import Config, ConfigError
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.run.check import check_config
from megatron_md.train.callbacks import sampling
from tests.ranks import run_ranks
from tests.train.test_trainer import metrics, pretrain, pretrain_and_die_after, without_times
from tests.trained_run import run_config

PROMPTS = ["def main(", "x = "]


def config_of(folder: Path, name: str, **sections: dict[str, Any]) -> Config:
    # Drawn texts: what so small a model writes greedily is blanks, whatever the weights.
    keys = {"every_steps": 2, "prompts": PROMPTS, "length": 8, "temperature": 1.0, "strategy": "random"}
    config = run_config(folder, name, sampling={**keys, **sections.pop("sampling", {})}, **sections)
    return replace(config, train=replace(config.train, steps=sections.get("train", {}).get("steps", 5)))


def samples(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.run_dir) / "samples.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def texts_and_curves(folder: Path, name: str, ranks: int, layout: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """The samples of a run, and whether it trained as one without samples."""
    curves = []
    for every in (2, 0):
        config = config_of(folder, f"sampling-{name}-{every}", parallel=layout, sampling={"every_steps": every})
        assert run_ranks(pretrain, ranks, config) == [0] * ranks
        curves.append(without_times(metrics(Path(config.run_dir))))
    return samples(config_of(folder, f"sampling-{name}-2")), curves[0] == curves[1]


@pytest.fixture(scope="module")
def on_one(trained: Path) -> list[dict[str, Any]]:
    """The samples of a run in one process."""
    found, is_the_same = texts_and_curves(trained, "one", 1, {})
    assert is_the_same
    return found


@pytest.mark.distributed
def test_texts_are_written_at_their_steps_and_training_does_not_notice(on_one: list[dict[str, Any]]) -> None:
    assert [(line["step"], line["prompt"]) for line in on_one] == [
        (step, prompt) for step in (2, 4, 5) for prompt in PROMPTS
    ]
    assert all(line["forward_passes"] == 8 for line in on_one)
    assert len({line["text"] for line in on_one if line["text"].strip()}) > 1


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
        pytest.param({"pipeline": 2}, marks=pytest.mark.slow),
    ],
    ids=["data", "pipeline"],
)
def test_another_layout_writes_the_same(trained: Path, on_one: list[dict[str, Any]], layout: dict[str, Any]) -> None:
    assert texts_and_curves(trained, "-".join(layout), 2, layout) == (on_one, True)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2, "sequence_parallel": True}, pytest.param({"context": 2}, marks=pytest.mark.slow)],
    ids=["sequence", "context"],
)
@pytest.mark.slow
def test_layouts_that_cut_rows_write_the_same_where_the_canvas_is(
    trained: Path, on_one: list[dict[str, Any]], layout: dict[str, Any]
) -> None:
    found, is_the_same = texts_and_curves(trained, "-".join(layout), 2, layout)
    assert is_the_same
    # The canvas is rounded up, here by at most one token.
    words = Tokenizer(str(trained / "tokenizer.model"))
    for ours, theirs in zip(on_one, found, strict=True):
        longer = (len(words.encode(ours["prompt"])) + 8) % 2
        assert theirs["forward_passes"] == 8 + longer
        assert longer or theirs == ours


@pytest.mark.distributed
def test_a_resumed_run_has_each_sample_once(trained: Path) -> None:
    keys: dict[str, Any] = {"train": {"steps": 6}, "checkpoint": {"every_steps": 3}}
    whole, parts = config_of(trained, "sampling-whole", **keys), config_of(trained, "sampling-parts", **keys)
    assert run_ranks(pretrain, 1, whole) == [0]
    run_ranks(pretrain_and_die_after, 1, parts, 4)
    assert [line["step"] for line in samples(parts)] == [2, 2, 4, 4]  # the checkpoint is of step 3
    path = Path(parts.run_dir) / "samples.jsonl"
    path.write_bytes(b'{"step": 2, "text": "\xff"}\n5\n' + path.read_bytes() + b'{"step"')
    path.with_name("metrics.jsonl").write_bytes(b"null\n" + path.with_name("metrics.jsonl").read_bytes())
    assert run_ranks(pretrain, 1, parts) == [0]
    assert samples(parts) == samples(whole)
    assert path.with_name("samples.jsonl.damaged").read_bytes() == b'{"step": 2, "text": "\xff"}\n5\n{"step"\n'
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == b"null\n"
    assert without_times(metrics(path.parent)) == without_times(metrics(Path(whole.run_dir)))


@pytest.mark.distributed
def test_a_causal_run_writes_from_left_to_right(trained: Path) -> None:
    config = config_of(trained, "sampling-causal", objective={"name": "autoregressive"}, train={"steps": 1})
    assert run_ranks(pretrain, 1, config) == [0]
    assert [line["forward_passes"] for line in samples(config)] == [8, 8]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sampling": {"length": 30}}, "sampling.prompts, 'def main(': the prompt's"),
        ({"sampling": {"block": 3}}, "sampling: length 8 is not a multiple of block 3"),
        ({"sampling": {"strategy": "guess"}}, "sampling: unknown sampling strategy 'guess'"),
        ({"sampling": {"prompts": []}}, "sampling.prompts is empty"),
        (
            {"sampling": {"block": 4}, "parallel": {"tensor": 2, "sequence_parallel": True}},
            "parallel.sequence_parallel cuts rows into 2 slices, which prompt and text must be a multiple of, and "
            "sampling.length 8 cannot become 9 with these sampling.steps and sampling.block",
        ),
        ({"sampling": {"block": 4}, "parallel": {"context": 2}}, "parallel.context cuts rows into 2 slices"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_starts(
    trained: Path, sections: dict[str, Any], message: str
) -> None:
    config = config_of(trained, "sampling-refused", **sections)
    with pytest.raises(ConfigError) as caught:
        check_config(config, config.parallel.replica)
    assert len(caught.value.lines) == 1 and message in caught.value.lines[0]


def test_a_full_disk_loses_samples_only_if_told(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sampling, "append", full)
    for on_error in ("continue", "stop"):
        config = config_of(trained, "sampling-full", checkpoint={"on_error": on_error})
        words: Any = Tokenizer(str(trained / "tokenizer.model"))
        callback = sampling.Sampling(config, None, words, None, None)  # type: ignore[arg-type]
        if on_error == "stop":
            with pytest.raises(OSError, match="No space left"):
                callback._write("line")
        else:
            callback._write("line")
            assert "a sample is lost" in capsys.readouterr().err
