"""Replicas: one bit that differs is noticed and named wherever a tensor is held twice; equal ones raise no alarm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_md.checkpoint.replicas import checksum
from megatron_md.config import Config
from tests.checkpoint.legs import ONE, OVERLAP, SHARDED, TENSOR2
from tests.ranks import RankError, run_ranks
from tests.small_run import CONFIG, small_run, variant
from tests.train.test_trainer import config_for, write_bigram_corpus

NORM, SPLIT, TIED = (
    "decoder.layers.2.input_layernorm.weight",
    "decoder.layers.3.mlp.linear_fc2.weight",
    "embedding.word_embeddings.weight",
)
SEQUENCE = {**TENSOR2, "sequence_parallel": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_checksum_adds_up_over_parts_and_sees_every_bit(dtype: torch.dtype) -> None:
    values = torch.randint(0, 255, (3, 1001, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    flat, whole = values.reshape(-1), checksum(values)
    for cut in (0, 1, 2, 3, 5, 7, 8, 64, 9_999, flat.numel()):
        assert checksum(flat[:cut]) + checksum(flat[cut:], cut) == whole
        assert checksum(flat[cut:].clone(), cut) == checksum(flat[cut:], cut)  # however it lies in memory
    for element in (0, 1, 2_047, 2_048, flat.numel() - 1):
        other = flat.clone()
        other.view(torch.uint8)[element * flat.element_size()] ^= 1
        assert checksum(other) != whole
    swapped = flat.flip(0)
    assert checksum(swapped) != whole and checksum(swapped.flip(0)) == whole


def flip(run: Any, name: str) -> None:
    """Flip the lowest bit of an element in this rank's part of a weight, or of its optimizer's `exp_avg`."""
    from megatron_md.checkpoint.state import named_parameters, optimizer_slices

    parameter = dict(named_parameters(run.chunks))[name.removeprefix("optimizer state of ")]
    values: torch.Tensor = parameter.detach()
    if name.startswith("optimizer"):
        slices = [piece for piece in optimizer_slices(run.optimizer) if piece.parameter is parameter]
        values = slices[0].tensors["exp_avg"]
    values.view(-1).view(torch.int16 if values.element_size() == 2 else torch.int32)[5] ^= 1


def diverge(config: Config, changes: list[tuple[int, str]]) -> list[str | None]:
    """What is said of each change, made on one rank and undone again; training before and after raises no alarm."""
    from megatron_md.checkpoint.replicas import ReplicaError, compare

    said: list[str | None] = []
    with small_run(config) as run:
        run.train(0, 3)
        compare(run.chunks, run.optimizer, 3)
        for rank, name in changes:
            if run.world.rank == rank:
                flip(run, name)
            try:
                compare(run.chunks, run.optimizer, 3)
                said.append(None)
            except ReplicaError as error:
                said.append(str(error))
            if run.world.rank == rank:
                flip(run, name)
        run.train(3, 5)
        compare(run.chunks, run.optimizer, 5)
    return said


def expected(name: str, few: str, most: str) -> str:
    return f"replicas differ after step 3: {name} on {few} is not what it is on {most}: "


STATE = "optimizer state of "
TWO = [
    pytest.param(ONE, {}, [(1, SPLIT), (0, NORM), (1, STATE + SPLIT)], id="DP2"),
    pytest.param(SHARDED, {}, [(1, SPLIT)], id="DP2 distributed", marks=pytest.mark.slow),
    pytest.param(SEQUENCE, {"position": "learned", "qk_norm": True}, [(1, NORM), (0, STATE + NORM)], id="TP2 SP"),
    pytest.param({"pipeline": 2}, {"tied": True}, [(1, TIED), (0, STATE + TIED)], id="PP2 tied"),
    pytest.param(
        {**TENSOR2, **SHARDED},
        {"position": "learned", "qk_norm": True},
        [(1, NORM), (0, "embedding.position_embeddings.weight"), (1, STATE + NORM)],
        id="TP2",
        marks=pytest.mark.slow,
    ),
    pytest.param({**SEQUENCE, **SHARDED}, {}, [(0, NORM)], id="TP2 SP distributed", marks=pytest.mark.slow),
    pytest.param(
        {"pipeline": 2, **SHARDED}, {"tied": True}, [(1, TIED)], id="PP2 tied distributed", marks=pytest.mark.slow
    ),
]


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("layout", "model", "changes"), TWO)
def test_one_bit_on_one_of_two_ranks_is_noticed_and_named(
    layout: dict[str, Any], model: dict[str, Any], changes: list[tuple[int, str]], precision: str
) -> None:
    config = variant(CONFIG, parallel=layout, model=model, train={"precision": precision})
    for said in run_ranks(diverge, 2, config, changes):
        for line, (_, name) in zip(said, changes, strict=True):
            assert line is not None and line.startswith(expected(name, "rank 1", "rank 0")), line


@pytest.mark.distributed
def test_what_is_legitimately_different_raises_no_alarm() -> None:
    split = [(1, SPLIT), (0, TIED), (1, STATE + SPLIT)]
    assert run_ranks(diverge, 2, variant(CONFIG, parallel=TENSOR2), split) == [[None] * 3] * 2


FOUR = [
    ({**TENSOR2, **ONE}, {}, [(1, NORM, "ranks 0, 2, 3"), (2, SPLIT, "rank 0"), (3, STATE + NORM, "ranks 0, 1, 2")]),
    ({**SEQUENCE, **SHARDED}, {}, [(3, NORM, "ranks 0, 1, 2"), (3, SPLIT, "rank 1")]),
    ({"pipeline": 2, **SHARDED}, {"tied": True}, [(2, TIED, "ranks 0, 1, 3"), (3, SPLIT, "rank 2")]),
    # With overlapped gathers a replica is written anew before it is read: nothing is left to differ.
    ({**SEQUENCE, **OVERLAP}, {}, []),
    ({"pipeline": 2, **OVERLAP}, {"tied": True}, []),
    ({"pipeline": 2, "virtual_pipeline": 2, **SHARDED}, {"tied": True}, [(3, TIED, "ranks 0, 1, 2")]),
    ({"pipeline": 2, **TENSOR2}, {"tied": True}, [(3, TIED, "rank 1"), (2, NORM, "rank 3")]),
    ({"pipeline": 2, **TENSOR2}, {"tied": False}, []),
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("layout", "model", "changes"), FOUR)
def test_one_bit_on_one_of_four_ranks_is_noticed_and_named(
    layout: dict[str, Any], model: dict[str, Any], changes: list[tuple[int, str, str]], precision: str
) -> None:
    config = variant(CONFIG, parallel=layout, model=model, train={"precision": precision})
    for said in run_ranks(diverge, 4, config, [(rank, name) for rank, name, _ in changes]):
        for line, (rank, name, others) in zip(said, changes, strict=True):
            few, most = f"rank {rank}", others
            if others in ("rank 3",) and rank < 3:
                few, most = others, few  # of two that differ the higher rank comes first
            assert line is not None and line.startswith(expected(name, few, most)), line


def pretrain_with_a_flip(config: Config, rank: int, name: str, step: int) -> int:
    """Train; after this step's update one bit of a weight changes on one rank."""
    from types import SimpleNamespace

    from megatron_md.run.pretrain import pretrain
    from megatron_md.train.step import Stepper

    update, updates = Stepper._update, iter(range(1, 1000))

    def flipping(self: Any, grad_norm: float) -> None:
        update(self, grad_norm)
        if next(updates) == step and self.world.rank == rank:
            flip(SimpleNamespace(chunks=self.chunks, optimizer=self.optimizer), name)

    Stepper._update = flipping  # type: ignore[method-assign]
    return pretrain(config)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("every", "said"),
    [
        (None, "after step 4"),
        pytest.param(3, "after step 3", marks=pytest.mark.slow),
        pytest.param(0, None, marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_replicas_differ_ends_before_it_saves(every: int | None, said: str | None, tmp_path: Path) -> None:
    corpora = {"train": write_bigram_corpus(tmp_path / "corpus", 60, 0)}
    config = config_for(
        tmp_path / "run",
        corpora,
        parallel=ONE,
        train={"check_replicas_every": every, "steps": 6},
        checkpoint={"every_steps": 2, "asynchronous": True},
        validation={"sequences": 0},
    )
    if said is None:
        assert run_ranks(pretrain_with_a_flip, 2, config, 1, SPLIT, 3) == [0, 0]
        return
    with pytest.raises(RankError, match=f"ReplicaError: replicas differ {said}: {SPLIT} on rank 1 is not what it is"):
        run_ranks(pretrain_with_a_flip, 2, config, 1, SPLIT, 3)
    run = tmp_path / "run"
    assert (run / "checkpoints" / "latest").read_text() == "step_00000002"
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000002"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "failed" and SPLIT in summary["error"]
    if every is not None:  # the same command goes on from there
        assert run_ranks(pretrain_with_a_flip, 2, config, 1, SPLIT, 999) == [0, 0]
