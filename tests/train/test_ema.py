"""The average of the weights: closed forms, every layout, saved and resumed to the bit, and in the model and back."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.config import Config
from megatron_md.diffusion.scoring import ScoredRows
from megatron_md.train.ema import decay_at
from tests.checkpoint.legs import ONE, OVERLAP, PIPELINE2, SHARDED, TENSOR2, build_manager, legs_config, progress_at
from tests.ranks import run_ranks
from tests.small_run import LENGTH, MASK, VOCAB, Curve, small_run, variant
from tests.train.test_trainer import config_for, metrics, pretrain, pretrain_and_die_after, without_times
from tests.train.test_trainer import corpora as corpora

DECAY = 0.6
ROWS = ScoredRows(np.random.default_rng(0).integers(4, VOCAB, (6, LENGTH)), np.ones((6, LENGTH), dtype=bool))
Tensors = dict[str, torch.Tensor]


def averaged(layout: dict[str, Any], *, decay: float | None = DECAY, precision: str = "fp32") -> Config:
    return variant(legs_config(layout, tied=True, precision=precision), train={"ema_decay": decay})


def pieces(run: Any, kind: str) -> dict[str, Any]:
    """This rank's parts of one kind of the optimizer's tensors, flat, with the parameters that they are of."""
    from megatron_md.checkpoint.state import named_parameters, optimizer_slices

    names = {id(parameter): name for name, parameter in named_parameters(run.chunks)}
    return {
        f"{names[id(piece.parameter)]} {piece.start}": (
            piece.tensors[kind].clone(),
            piece.parameter.detach().flatten()[piece.start :][: piece.tensors[kind].numel()].clone(),
        )
        for piece in optimizer_slices(run.optimizer)
    }


def test_the_decay_warms_up() -> None:
    assert [decay_at(0.999, n) for n in (1, 8, 90)] == [2 / 11, 0.5, 0.91]
    assert decay_at(0.999, 8989) < 0.999 == decay_at(0.999, 8990) == decay_at(0.999, 10**9)


def followed(config: Config) -> float:
    """Largest difference between the average and sum_k w_k theta_k over the weights that were there, as a share."""
    with small_run(config) as run:
        kind = "fp32_param" if config.train.precision == "bf16" else None

        def weights() -> Tensors:
            return {name: values.double() for name, values in own(run, kind).items()}

        seen = [weights()]
        for step in range(6):
            run.train(step, step + 1)
            seen.append(weights())
        shares = [1.0]
        for update in range(1, 7):
            decay = min(DECAY, (1 + update) / (10 + update))
            shares = [share * decay for share in shares] + [1.0 - decay]
        assert math.isclose(sum(shares), 1.0)
        worst = 0.0
        for name, (average, _) in pieces(run, "ema").items():
            expected = sum(share * there[name] for share, there in zip(shares, seen, strict=True))
            assert not torch.equal(average.double(), seen[-1][name])
            worst = max(worst, float((average - expected).abs().max() / expected.abs().max()))
        return worst


def own(run: Any, kind: str | None) -> Tensors:
    """The weights that the optimizer changes, of this rank's part: the model's, or its own fp32 ones."""
    return {name: pair[0] if kind else pair[1] for name, pair in pieces(run, kind or "ema").items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout", "precision"),
    [
        (2, SHARDED, "bf16"),
        pytest.param(1, ONE, "fp32", marks=pytest.mark.slow),
        pytest.param(2, ONE, "bf16", marks=pytest.mark.slow),
    ],
)
def test_the_average_is_the_weighted_sum_of_all_weights_so_far(
    size: int, layout: dict[str, Any], precision: str
) -> None:
    assert max(run_ranks(followed, size, averaged(layout, precision=precision))) < 1e-6


def left_out(config: Config) -> bool:
    with small_run(config) as run:
        run.train(0, 2)
        before = pieces(run, "ema")
        run.stepper.train(run.stepper.corrupt(run.batches(2)), lambda loss, grad_norm: "left out")
        after = pieces(run, "ema")
        return all(torch.equal(after[name][0], before[name][0]) for name in before)


@pytest.mark.distributed
def test_an_update_that_is_left_out_leaves_the_average_alone() -> None:
    assert run_ranks(left_out, 1, averaged(ONE)) == [True]


def nelbo_of_average(run: Any) -> float:
    from megatron_md.train import ema
    from megatron_md.train.callbacks.validation import Validation

    with ema.in_model(run.optimizer, run.chunks):
        return Validation(run.config, run.inference, ROWS, mask_token_id=MASK).validate().report().nelbo


def two_legs(config: Config, run_dir: Path, first: int, stop: int) -> float:
    """Load what is there, save it unchanged beside it, train, save; the NELBO of the average in the end."""
    with small_run(config) as run:
        manager = build_manager(run_dir)
        if manager.load_newest(run.chunks, run.optimizer):
            build_manager(run_dir / "again").save(run.chunks, run.optimizer, progress_at(first))
        run.train(first, stop)
        manager.save(run.chunks, run.optimizer, progress_at(stop))
        return nelbo_of_average(run)


def averages(checkpoint: Path, prefix: str = "optimizer.state.ema.") -> Tensors:
    """The average in a checkpoint, or its weights, by the names of the weights."""
    from megatron_md.checkpoint.storage import TensorReader

    reader = TensorReader(checkpoint)
    shapes = {name: shape for name, (shape, _) in reader.tensors.items() if not name.startswith("optimizer.")}
    return {
        name: reader.read(prefix + name, [0] * len(shape), shape)
        for name, shape in shapes.items()
        if prefix + name in reader.tensors
    }


ACROSS = [
    ((2, TENSOR2), (2, SHARDED)),
    pytest.param((2, SHARDED), (2, TENSOR2), marks=pytest.mark.slow),
    pytest.param((4, {**PIPELINE2, **OVERLAP}), (3, OVERLAP), marks=pytest.mark.slow),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("first", "then"), ACROSS)
@pytest.mark.slow
def test_another_layout_goes_on_with_the_same_average(first: Any, then: Any, tmp_path: Path) -> None:
    run_ranks(two_legs, first[0], averaged(first[1]), tmp_path, 0, 3)
    (found, *_) = run_ranks(two_legs, then[0], averaged(then[1]), tmp_path, 3, 6)
    before, after = (averages(tmp_path / name / "checkpoints/step_00000003") for name in ("", "again"))
    assert before.keys() == after.keys()
    for name, values in before.items():
        rows = VOCAB if "embeddings" in name else len(values)  # what pads the vocabulary belongs to a layout
        assert torch.equal(after[name][:rows], values[:rows]), name
    (whole,) = run_ranks(two_legs, 1, averaged(ONE), tmp_path / "whole", 0, 6)
    assert found == pytest.approx(whole, rel=1e-5)


def exchanged(config: Config) -> tuple[float, float, bool, Curve]:
    """NELBO of the weights and of the average, whether all is as before to the bit, and how training goes on."""
    from megatron_md.checkpoint.state import named_parameters
    from megatron_md.train import ema
    from megatron_md.train.callbacks.validation import Validation

    with small_run(config) as run:
        run.train(0, 4)

        def nelbo() -> float:
            return Validation(config, run.inference, ROWS, mask_token_id=MASK).validate().report().nelbo

        def state() -> list[torch.Tensor]:
            held = [parameter.detach().clone() for _, parameter in named_parameters(run.chunks)]
            return held + [pair[0] for pair in pieces(run, "ema").values()]

        of_weights, before, of_average = nelbo(), state(), nelbo_of_average(run)
        with pytest.raises(RuntimeError, match="out of memory"), ema.in_model(run.optimizer, run.chunks):
            raise RuntimeError("out of memory")
        is_back = all(map(torch.equal, state(), before)) and nelbo() == of_weights
        return of_weights, of_average, is_back, run.train(4, 6)


def not_looked_at(config: Config) -> Curve:
    with small_run(config) as run:
        run.train(0, 4)
        return run.train(4, 6)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout", "precision"),
    [
        (2, OVERLAP, "bf16"),
        pytest.param(1, ONE, "fp32", marks=pytest.mark.slow),
        pytest.param(2, {**PIPELINE2, **OVERLAP}, "fp32", marks=pytest.mark.slow),
        pytest.param(2, SHARDED, "fp32", marks=pytest.mark.slow),
        pytest.param(2, TENSOR2, "bf16", marks=pytest.mark.slow),
    ],
)
def test_the_model_takes_the_average_and_gets_its_weights_back(
    size: int, layout: dict[str, Any], precision: str
) -> None:
    config = averaged(layout, precision=precision)
    of_weights, of_average, is_back, curve = run_ranks(exchanged, size, config)[0]
    assert is_back and curve == run_ranks(not_looked_at, size, config)[0]
    assert abs(of_average / of_weights - 1.0) > 1e-5


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_run_validates_the_average_as_one_that_was_not(tmp_path: Path, corpora: dict[str, str]) -> None:
    keys = {"train": {"ema_decay": DECAY}, "validation": {"every_steps": 2, "weights": "ema"}}
    whole, parts = (config_for(tmp_path / name, corpora, checkpoint={"every_steps": 3}, **keys) for name in "ab")
    run_ranks(pretrain, 1, whole)
    run_ranks(pretrain_and_die_after, 1, parts, 4, timeout=60)
    run_ranks(pretrain, 1, parts)
    assert without_times(metrics(tmp_path / "b")) == without_times(metrics(tmp_path / "a"))
    found, expected = (averages(tmp_path / name / "checkpoints/step_00000008") for name in "ba")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Training does not depend on it; what is validated does.
    run_ranks(pretrain, 1, config_for(tmp_path / "c", corpora, validation={"every_steps": 2}))
    records = list(zip(metrics(tmp_path / "a"), metrics(tmp_path / "c"), strict=True))
    assert all((a["loss"], a["grad_norm"]) == (c["loss"], c["grad_norm"]) for a, c in records)
    assert [a["val_nelbo"] != c["val_nelbo"] for a, c in records if "val_nelbo" in a] == [True] * 4


@pytest.mark.slow
@pytest.mark.distributed
def test_the_average_returns_with_the_weights(tmp_path: Path, corpora: dict[str, str]) -> None:
    from tests.train.test_bad_numbers import pretrain_with, pretrain_without_rows, rolling, same_tensors

    run, plain = (variant(rolling(tmp_path / name, corpora), train={"ema_decay": DECAY}) for name in ("run", "plain"))
    (returned,) = run_ranks(pretrain_with, 1, run, dict.fromkeys(range(40, 64), math.nan))
    (undisturbed,) = run_ranks(pretrain_without_rows, 1, plain, ((40, 64),))
    assert same_tensors(returned, undisturbed)


def told(config: Config) -> str:
    """What a run says on its way."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        pretrain(config)
    return said.getvalue()


@pytest.mark.distributed
def test_an_average_begins_with_the_weights_of_a_checkpoint_without_one(
    tmp_path: Path, corpora: dict[str, str]
) -> None:
    base = config_for(tmp_path / "run", corpora, train={"steps": 2}, validation={"sequences": 0})
    run_ranks(pretrain, 1, base)
    still = {"optimizer": {"lr": 1e-30, "weight_decay": 0.0}}
    (said,) = run_ranks(told, 1, variant(base, train={"steps": 4, "ema_decay": DECAY}, **still))
    assert "step_00000002: has no average of the weights: the run's (train.ema_decay) begins with its weights\n" in said
    load = {"checkpoint": {"load": str(tmp_path / "run/checkpoints/step_00000002"), "load_only": "model"}}
    other = variant(base, train={"ema_decay": DECAY}, **still, **load)
    run_ranks(pretrain, 1, replace(other, run_dir=str(tmp_path / "other")))
    for checkpoint in ("run/checkpoints/step_00000004", "other/checkpoints/step_00000002"):
        found, weights = averages(tmp_path / checkpoint), averages(tmp_path / checkpoint, "")
        assert weights and all(torch.equal(found[name], weights[name]) for name in weights), checkpoint
    (said,) = run_ranks(told, 1, variant(base, train={"steps": 5}))
    assert "step_00000004: its average of the weights is not taken along: train.ema_decay is null\n" in said
    assert not averages(tmp_path / "run/checkpoints/step_00000005")
