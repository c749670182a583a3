"""The mean of checkpoints: of the optimizer's own weights, rounded once, whatever wrote them; whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.checkpoint import mean
from megatron_md.checkpoint.directory import AVERAGE, FP32_WEIGHTS, find_checkpoint
from megatron_md.checkpoint.integrity import CheckpointError, verify
from megatron_md.checkpoint.mean import parts, write_mean
from megatron_md.checkpoint.storage import TensorReader
from megatron_md.config import Config, to_yaml
from megatron_md.errors import UserError
from tests.checkpoint.legs import ONE, SHARDED, TENSOR2, build_manager, legs_config, progress_at
from tests.ranks import run_ranks
from tests.small_run import VOCAB, small_run, variant

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 4, 5), (2, 3, 1, 4)])
@pytest.mark.parametrize("largest", [1, 3, 4, 20, 1000])
@pytest.mark.parametrize("by_layer", [False, True])
def test_parts_hold_every_number_once(shape: tuple[int, ...], largest: int, by_layer: bool) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    found = []
    for offset, size in parts(shape, largest, by_layer=by_layer):
        block = numbers[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        assert block.shape == size and block.size <= largest
        assert not by_layer or size[0] == 1
        found += block.ravel().tolist()
    assert sorted(found) == numbers.ravel().tolist()


def train_on(config: Config, run_dir: Path, first: int, stop: int) -> None:
    """Train from the newest checkpoint, and save after each step."""
    with small_run(config) as run:
        manager = build_manager(
            run_dir,
            keep_last=9,
            resolved_config=to_yaml(config),
            identity=lambda rows: {"model.hidden": config.model.hidden, "seed": 1},
        )
        manager.load_newest(run.chunks, run.optimizer)
        for step in range(first, stop):
            run.train(step, step + 1)
            manager.save(run.chunks, run.optimizer, progress_at(step + 1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints in bf16 with an average of the weights; the first is of a layout that pads the vocabulary."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    for size, layout, steps in ((2, TENSOR2, (0, 1)), (2, SHARDED, (1, 3))):
        config = variant(legs_config(layout, tied=True, precision="bf16"), train={"ema_decay": 0.6})
        run_ranks(train_on, size, config, run_dir, *steps)
    (run_dir / "tokenizer.model").write_text("words")
    return run_dir


def of(run: Path, *steps: int) -> list[Path]:
    return [run / "checkpoints" / f"step_{step:08d}" for step in steps]


def tensors(checkpoint: Path, prefix: str = "") -> Tensors:
    reader = TensorReader(checkpoint)
    names = [name for name in reader if not name.startswith("optimizer.")]
    stored = {name: reader.tensors[prefix + name][0] for name in names}
    return {name: reader.read(prefix + name, [0] * len(shape), shape) for name, shape in stored.items()}


def expected(run: Path, prefix: str, *steps: int) -> Tensors:
    found = [tensors(path, prefix) for path in of(run, *steps)]
    means = {}
    for name in found[0]:
        rows = min(len(each[name]) for each in found)
        means[name] = torch.stack([each[name][:rows].double() for each in found]).mean(0).bfloat16()
    return means


@pytest.mark.distributed
@pytest.mark.parametrize(("weights", "prefix"), [("model", FP32_WEIGHTS), ("ema", AVERAGE)])
def test_it_is_the_mean_in_fp64_rounded_once(
    weights: Any, prefix: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mean(of(run, 1, 2, 3), tmp_path / "mean", weights=weights)
    found = tensors(find_checkpoint(tmp_path / "mean"))
    means = expected(run, prefix, 1, 2, 3)
    assert found.keys() == means.keys() and "embedding.word_embeddings.weight" in found
    for name, values in means.items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], values), name
    # A part at a time or all at once: the same bits.
    monkeypatch.setattr(mean, "_LARGEST", 5000)
    write_mean(of(run, 1, 2, 3), tmp_path / "pieces", weights=weights)
    pieces = tensors(find_checkpoint(tmp_path / "pieces"))
    assert all(torch.equal(pieces[name], values) for name, values in found.items())


@pytest.mark.distributed
def test_one_checkpoint_is_its_own_mean_and_knows_where_it_comes_from(run: Path, tmp_path: Path) -> None:
    write_mean(of(run, 3), tmp_path / "mean")
    (checkpoint,) = of(tmp_path / "mean", 3)
    verify(checkpoint)
    before, after = tensors(*of(run, 3)), tensors(checkpoint)
    assert all(torch.equal(after[name], values) for name, values in before.items())
    record = json.loads((checkpoint / "progress.json").read_text())
    (source,) = record["merged"]["checkpoints"]
    assert (
        record["merged"]["weights"] == "model" and source["path"] == str(of(run, 3)[0]) and len(source["sha256"]) == 64
    )
    assert record["optimizer"] == [] and record["identity"] == {"model.hidden": 64}
    assert (tmp_path / "mean/tokenizer.model").read_text() == "words"


def loaded(config: Config, checkpoint: Path, full: bool) -> list[torch.Tensor]:
    """This rank's parameters after `load_only: model`, or after an attempt to resume."""
    with small_run(config) as run:
        manager = build_manager(checkpoint)
        if full:
            with pytest.raises(UserError, match=r"holds weights and no optimizer state: .*checkpoint.load_only=model"):
                manager.load(run.chunks, run.optimizer, checkpoint)
            return []
        manager.load_model_only(run.chunks, run.optimizer, checkpoint)
        return [parameter.detach().clone() for chunk in run.chunks for parameter in chunk.parameters()]


@pytest.mark.distributed
def test_training_starts_from_its_weights_only(run: Path, tmp_path: Path) -> None:
    write_mean(of(run, 1, 2, 3), tmp_path / "mean")
    config = legs_config(ONE, tied=True, precision="bf16")
    (parameters,) = run_ranks(loaded, 1, config, find_checkpoint(tmp_path / "mean"), False)
    means = expected(run, FP32_WEIGHTS, 1, 2, 3)
    assert torch.equal(parameters[0][:VOCAB], means["embedding.word_embeddings.weight"][:VOCAB])
    assert run_ranks(loaded, 1, config, find_checkpoint(tmp_path / "mean"), True) == [[]]


def flip(path: Path) -> None:
    (file,) = sorted(path.glob("__0_0.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def rename_model(path: Path) -> None:
    record = json.loads((path / "progress.json").read_text())
    record["identity"]["model.hidden"] = 128
    (path / "progress.json").write_text(json.dumps(record))


def forget_average(path: Path) -> None:
    record = json.loads((path / "progress.json").read_text())
    record["optimizer"].remove("ema")
    (path / "progress.json").write_text(json.dumps(record))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (flip, CheckpointError, "step_00000002: __0_0.distcp is damaged"),
        (rename_model, UserError, "step_00000002: has another model than .*model.hidden: 128 there, 64 here"),
        (forget_average, UserError, r"step_00000002: has no average of the weights \(train.ema_decay"),
    ],
)
def test_what_cannot_be_merged_is_named_and_nothing_written(
    change: Callable[[Path], None], error: type[Exception], said: str, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    change(of(tmp_path / "run", 2)[0])
    with pytest.raises(error, match=said):
        write_mean(of(tmp_path / "run", 2, 3), tmp_path / "mean", weights="ema")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.distributed
def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def full(readers: Any, name: str, *rest: Any, original: Any = mean._mean) -> torch.Tensor:
        made.append(name)
        if len(made) == 5:
            raise OSError(28, "No space left on device")
        return original(readers, name, *rest)

    monkeypatch.setattr(mean, "_mean", full)
    with pytest.raises(UserError, match=r"mean: cannot be written \(No space left on device\)"):
        write_mean(of(run, 2, 3), tmp_path / "mean")
    assert list(tmp_path.iterdir()) == []
