"""Whole runs through `pretrain`: what a run leaves behind, exact resumes, stops, and a recorded curve."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_md.config import Config
from megatron_md.data.writer import Tokenised, Vocabulary, write_corpus
from tests.ranks import run_ranks
from tests.small_run import CONFIG, LENGTH, MASK, VOCAB, variant

GOLDEN = Path(__file__).with_name("golden_curve.json")
STEPS = 8


def write_bigram_corpus(folder: Path, documents: int, seed: int) -> str:
    """A corpus that can be learnt: 20 of the tokens, each of which names the next one, up to a little noise."""
    generator = np.random.default_rng(seed)
    batch = []
    for _ in range(documents):
        tokens = [int(generator.integers(4, 24))]
        while len(tokens) < 100:
            noise = int(generator.integers(0, 3)) if generator.random() < 0.1 else 0
            tokens.append(4 + (3 * tokens[-1] + 7 + noise) % 20)
        batch.append(Tokenised(np.array(tokens), len(tokens)))
    write_corpus([batch], Vocabulary(VOCAB, 1, MASK, 2, "0" * 64), folder, shard_tokens=1500)
    return str(folder)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "train": write_bigram_corpus(folder / "train", 60, 0),
        "valid": write_bigram_corpus(folder / "valid", 10, 1),
    }


def config_for(run_dir: Path, corpora: dict[str, str], **sections: dict[str, Any]) -> Config:
    base = replace(CONFIG, run_dir=str(run_dir))
    keys: dict[str, dict[str, Any]] = {
        "data": {**corpora, "seq_length": LENGTH, "window_shards": 2},
        "optimizer": {"lr": 5e-3},
        "train": {"steps": STEPS},
        "validation": {"every_steps": 4, "sequences": 12},
        "checkpoint": {"every_steps": 0},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for name, values in sections.items():
        keys[name] = {**keys.get(name, {}), **values}
    return variant(base, **keys)


def pretrain(config: Config) -> int:
    """`megatron_md.run.pretrain.pretrain`, imported in the rank's process."""
    from megatron_md.run.pretrain import pretrain as run

    return run(config)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


TIMES = {"step_seconds", "data_seconds", "save_seconds", "tokens_per_second", "time", "memory_gib"}


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


@pytest.mark.distributed
def test_a_run_directory_holds_all_that_was_promised(tmp_path: Path, corpora: dict[str, str]) -> None:
    config = config_for(tmp_path / "run", corpora, log={"tensorboard": True}, parallel={"tensor": 2})
    assert run_ranks(pretrain, 2, config) == [0, 0]
    run = tmp_path / "run"
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert {"loss", "masked_ce", "grad_norm", "lr", "mean_mask_rate", "skipped", *TIMES} <= record.keys()
        assert record["tokens"] == record["step"] * 8 * LENGTH and 0.3 < record["mean_mask_rate"] < 0.7
    validated = [record for record in records if "val_nelbo" in record]
    assert [record["step"] for record in validated] == [4, 8]
    assert validated[1]["val_ppl_bound"] == pytest.approx(np.exp(validated[1]["val_nelbo"]))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["val_nelbo"] == validated[1]["val_nelbo"]
    assert {"val_nelbo_stderr", "unigram_entropy", "tokens_per_second", "parameters"} <= summary.keys()
    assert (run / "checkpoints" / "latest").read_text() == "step_00000008"
    assert any((run / "tensorboard").iterdir())
    kept = (run / "config.yaml").read_text()
    assert "seq_length: 32" in kept and "precision: fp32" in kept  # of the CPU; the config leaves it open
    assert "torch" in json.loads((run / "env.json").read_text())["versions"]
    assert [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()] == [
        "started",
        "saved",
        "finished",
    ]


@pytest.mark.distributed
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path: Path, corpora: dict[str, str]) -> None:
    whole = config_for(tmp_path / "whole", corpora)
    run_ranks(pretrain, 1, whole)
    # The run dies right after its first checkpoint and is started again, with other saving and prefetching.
    first = config_for(tmp_path / "parts", corpora, checkpoint={"every_steps": 3}, data={"prefetch": 0})
    run_ranks(pretrain_and_die_after, 1, first, 4, timeout=60)
    assert (tmp_path / "parts" / "checkpoints" / "latest").read_text() == "step_00000003"
    assert len(metrics(tmp_path / "parts")) == 4
    run_ranks(pretrain, 1, replace(first, data=replace(first.data, prefetch=3)))
    assert without_times(metrics(tmp_path / "parts")) == without_times(metrics(tmp_path / "whole"))


def pretrain_and_die_after(config: Config, step: int) -> None:
    """A crash: an exception from a callback that comes after everything else in that step."""
    from megatron_md.checkpoint.saving import Checkpointing

    original = Checkpointing.after_step

    def crash(self: Any, trainer: Any, record: Any) -> None:
        original(self, trainer, record)
        if trainer.progress.step == step:
            raise KeyError("planted")

    Checkpointing.after_step = crash  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="planted"):
        pretrain(config)


@pytest.mark.distributed
def test_annealed_attention_resumes_exactly_and_validates_in_both_directions(
    tmp_path: Path, corpora: dict[str, str]
) -> None:
    keys = {"objective": {"attention_annealing": 0.9}, "validation": {"every_steps": 2}}
    run_ranks(pretrain, 1, config_for(tmp_path / "whole", corpora, **keys))
    parts = config_for(tmp_path / "parts", corpora, checkpoint={"every_steps": 3}, **keys)
    run_ranks(pretrain_and_die_after, 1, parts, 4, timeout=60)
    run_ranks(pretrain, 1, parts)
    assert without_times(metrics(tmp_path / "parts")) == without_times(metrics(tmp_path / "whole"))
    # Weights that hardly move are validated alike, however the attention of the training steps is.
    still = {**keys, "optimizer": {"lr": 1e-12}, "train": {"steps": 2}}
    run_ranks(pretrain, 1, config_for(tmp_path / "annealed", corpora, **still))
    still["objective"] = {}
    run_ranks(pretrain, 1, config_for(tmp_path / "plain", corpora, **still))
    annealed, plain = metrics(tmp_path / "annealed"), metrics(tmp_path / "plain")
    assert annealed[-1]["val_nelbo"] == pytest.approx(plain[-1]["val_nelbo"], rel=1e-6)
    assert annealed[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-5)


@pytest.mark.distributed
def test_validation_does_not_disturb_training(tmp_path: Path, corpora: dict[str, str]) -> None:
    run_ranks(pretrain, 1, config_for(tmp_path / "often", corpora, validation={"every_steps": 1}))
    run_ranks(pretrain, 1, config_for(tmp_path / "never", corpora, validation={"sequences": 0}))
    often, never = (
        [(record["loss"], record["grad_norm"]) for record in metrics(tmp_path / name)] for name in ("often", "never")
    )
    assert often == never


@pytest.mark.distributed
@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"distributed_optimizer": True}])
def test_validation_is_the_same_on_every_layout(
    objective: str, layout: dict[str, Any], tmp_path: Path, corpora: dict[str, str]
) -> None:
    # 11 rows do not divide into micro-batches of 2 over 2 ranks: the rest is filled up and must not count.
    keys = {"objective": {"name": objective}, "validation": {"sequences": 11}, "train": {"steps": 2}}
    run_ranks(pretrain, 1, config_for(tmp_path / "one", corpora, **keys))
    run_ranks(pretrain, 2, config_for(tmp_path / "two", corpora, **keys, parallel=layout))
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    for key in ("val_nelbo", "val_nelbo_stderr"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)


@pytest.mark.distributed
def test_documents_are_kept_apart_in_training_and_validation(tmp_path: Path, corpora: dict[str, str]) -> None:
    data = {"random_length_fraction": 0.5}
    for attention in ("full", "within_document"):
        config = config_for(tmp_path / attention, corpora, data={**data, "document_attention": attention})
        run_ranks(pretrain, 1, config)
    full, within = metrics(tmp_path / "full"), metrics(tmp_path / "within_document")
    assert [a["tokens"] for a in full] == [b["tokens"] for b in within]
    assert len({a["tokens"] for a in full}) == STEPS and full[0]["mean_mask_rate"] == within[0]["mean_mask_rate"]
    assert full[-1]["val_nelbo"] != within[-1]["val_nelbo"] and full[0]["loss"] != within[0]["loss"]
    assert within[-1]["val_nelbo"] < within[3]["val_nelbo"]


@pytest.mark.distributed
def test_validation_fills_up_whole_rounds_of_an_interleaved_pipeline(tmp_path: Path, corpora: dict[str, str]) -> None:
    # 9 rows make 5 micro-batches of 2, which megatron-core's interleaved schedule would refuse.
    keys = {"validation": {"sequences": 9}, "train": {"steps": 2}}
    run_ranks(pretrain, 1, config_for(tmp_path / "one", corpora, **keys))
    run_ranks(
        pretrain, 2, config_for(tmp_path / "two", corpora, **keys, parallel={"pipeline": 2, "virtual_pipeline": 2})
    )
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert two["val_nelbo"] == pytest.approx(one["val_nelbo"], rel=1e-5)


@pytest.mark.distributed
def test_a_summary_that_was_cut_off_is_mended_by_the_next_start(tmp_path: Path, corpora: dict[str, str]) -> None:
    config = config_for(tmp_path / "run", corpora, train={"steps": 2})
    run_ranks(pretrain, 1, config)
    for left in ('{"status": "running"}', '{"sta', "[1]"):
        (tmp_path / "run" / "summary.json").write_text(left)
        assert run_ranks(pretrain, 1, config) == [0]
        assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {
            "status": "finished",
            "step": 2,
            "tokens": 2 * 8 * LENGTH,
        }


def interrupt_self_during(config: Config, number: int) -> tuple[int, int]:
    """Train while a signal arrives after the third step has been logged; returns the exit code and the last step."""
    metrics_file = Path(config.run_dir) / "metrics.jsonl"

    def send() -> None:
        while not metrics_file.is_file() or len(metrics_file.read_text().splitlines()) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    if os.environ.get("RANK", "0") == "0":
        threading.Thread(target=send, daemon=True).start()
    code = pretrain(config)
    return code, len(metrics(Path(config.run_dir)))


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_and_saves_on_all(number: int, tmp_path: Path, corpora: dict[str, str]) -> None:
    config = config_for(tmp_path / "run", corpora, train={"steps": 500}, parallel={"distributed_optimizer": True})
    results = run_ranks(interrupt_self_during, 2, config, number)
    assert [code for code, _ in results] == [75, 75]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped" and summary["step"] == results[0][1] < 500
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{summary['step']:08d}"


@pytest.mark.distributed
def test_a_finished_run_is_left_alone(tmp_path: Path, corpora: dict[str, str]) -> None:
    config = config_for(tmp_path / "run", corpora, train={"steps": 2})
    run_ranks(pretrain, 1, config)
    files = ("metrics.jsonl", "events.jsonl", "summary.json")
    before = [(tmp_path / "run" / name).read_text() for name in files]
    assert run_ranks(pretrain, 1, config) == [0]
    assert [(tmp_path / "run" / name).read_text() for name in files] == before


@pytest.mark.distributed
def test_golden_curve(tmp_path: Path, corpora: dict[str, str]) -> None:
    """The recorded losses of a small run."""
    run_ranks(pretrain, 1, golden_config(tmp_path / "run", corpora))
    got = [record["masked_ce"] for record in metrics(tmp_path / "run")]
    np.testing.assert_allclose(got, json.loads(GOLDEN.read_text())["masked_ce"], rtol=1e-4)
    # It must be a curve that learns, or a wrong gradient would go unnoticed.
    assert np.mean(got[-5:]) < np.mean(got[:2]) - 2.0


def golden_config(run_dir: Path, corpora: dict[str, str]) -> Config:
    return config_for(run_dir, corpora, train={"steps": 60}, optimizer={"lr": 1e-2}, validation={"sequences": 0})


def collectives(config: Config) -> int:
    """How many collectives this package itself asks for in a whole run."""
    import sys

    import torch.distributed as dist

    asked = 0

    def counting(collective: Any) -> Any:
        def call(*words: Any, **keys: Any) -> Any:
            nonlocal asked
            asked += str(sys._getframe(1).f_globals["__name__"]).startswith("megatron_md.")
            return collective(*words, **keys)

        return call

    for name in ("all_reduce", "broadcast", "broadcast_object_list", "all_gather_object", "barrier"):
        setattr(dist, name, counting(getattr(dist, name)))
    assert pretrain(config) == 0
    return asked


@pytest.mark.distributed
def test_a_step_asks_for_one_collective(tmp_path: Path, corpora: dict[str, str]) -> None:
    def count(steps: int) -> int:
        config = config_for(
            tmp_path / str(steps),
            corpora,
            train={"steps": steps},
            validation={"every_steps": 0, "sequences": 0},
            checkpoint={"every_steps": 0, "every_minutes": 60.0},
        )
        return run_ranks(collectives, 2, config)[0]

    assert count(7) - count(2) == 5


def collections(config: Config) -> tuple[list[int], bool]:
    """On a rank: the steps after which garbage is collected during training, and whether Python does so afterwards."""
    from megatron_md.train.trainer import Trainer

    found = []
    original, collect = Trainer._heed, gc.collect

    def heard(self: Any, result: Any) -> None:
        with mock.patch.object(gc, "collect", side_effect=lambda: found.append(self.progress.step) or collect()):
            original(self, result)
        assert not gc.isenabled()

    with mock.patch.object(Trainer, "_heed", heard):
        pretrain(config)
    return found, gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.distributed
def test_all_ranks_collect_garbage_after_the_same_steps(tmp_path: Path, corpora: dict[str, str]) -> None:
    config = config_for(tmp_path / "run", corpora, train={"gc_every": 3}, validation={"sequences": 0})
    assert run_ranks(collections, 2, config) == [([3, 6], True)] * 2
