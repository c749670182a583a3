"""Damaged data, mixtures and random lengths in whole runs: all ranks agree, and a resumed run does the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.batch import DamagedDocument
from megatron_md.config import Config, CorpusConfig
from megatron_md.data.ledger import QuarantineLedger
from megatron_md.data.shards import ShardReader, load_manifest
from megatron_md.data.stream import SequenceStream
from tests.ranks import run_ranks
from tests.small_run import LENGTH
from tests.train.test_trainer import (
    config_for,
    metrics,
    pretrain,
    pretrain_and_die_after,
    without_times,
    write_bigram_corpus,
)

pytestmark = pytest.mark.distributed


def small(run_dir: Path, corpora: Any, **sections: dict[str, Any]) -> Config:
    """A run without validation on one corpus or a mixture."""
    data = {"train": corpora, **sections.pop("data", {})}
    return config_for(run_dir, {}, data=data, validation={"sequences": 0}, **sections)


def damage_in_row(config: Config, g: int) -> DamagedDocument:
    """Damage a document that touches row g and, unless it is the first, no row before."""
    assert isinstance(config.data.train, str)
    manifest = load_manifest(config.data.train)

    def damaged_rows(number: int, document: int) -> list[int]:
        stream = SequenceStream(manifest, seed=config.seed, seq_length=LENGTH, window_shards=2, keep_going=True)
        name = manifest.shards[number].name
        stream.quarantine([DamagedDocument(manifest.sha256, name, document, 0)])
        damaged = [{(lost.shard, lost.document) for lost in stream.rows([row]).damaged} for row in range(64)]
        return [row for row, lost in enumerate(damaged) if (name, document) in lost]

    for number, shard in enumerate(manifest.shards):
        reader = ShardReader(manifest, number)
        for document in range(len(reader.index)):
            if damaged_rows(number, document)[:1] == [g]:
                with reader.path.open("r+b") as file:
                    file.seek(int(reader.index["offset"][document]))
                    file.write(b"\xff\xff")
                return DamagedDocument(manifest.sha256, shard.name, document, int(reader.index["tokens"][document]))
    raise AssertionError(f"no document begins in row {g}")


def test_two_ranks_go_on_without_damaged_documents(tmp_path: Path) -> None:
    corpus = write_bigram_corpus(tmp_path / "corpus", 60, 0)
    config = small(tmp_path / "run", corpus, train={"steps": 4}, parallel={"distributed_optimizer": True})
    # Rows 0, 1, 4, 5 of a global batch are rank 0's, the others rank 1's.
    damaged = [damage_in_row(config, 10), damage_in_row(config, 19)]
    assert run_ranks(pretrain, 2, config) == [0, 0]
    records = metrics(tmp_path / "run")
    assert [record["quarantined"] for record in records] == [0, 1, 2, 2]
    ledger = (tmp_path / "run" / "quarantine.jsonl").read_text()
    lines = [json.loads(line) for line in ledger.splitlines()]
    assert [line.pop("step") for line in lines] == [2, 3]
    assert [DamagedDocument(**line) for line in lines] == damaged
    assert (tmp_path / "run" / "checkpoints" / "step_00000004" / "quarantine.jsonl").read_text() == ledger
    # One process with other prefetching sees the same damage and the same losses.
    alone = replace(config, run_dir=str(tmp_path / "alone"), data=replace(config.data, prefetch=0))
    run_ranks(pretrain, 1, alone)
    assert (tmp_path / "alone" / "quarantine.jsonl").read_text() == ledger
    for one, two in zip(metrics(tmp_path / "alone"), records, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_a_resumed_run_leaves_out_what_it_left_out_before(tmp_path: Path) -> None:
    corpus = write_bigram_corpus(tmp_path / "corpus", 60, 0)
    config = small(tmp_path / "whole", corpus, train={"steps": 6})
    manifest = load_manifest(corpus)
    sound = {shard.name: (manifest.directory / shard.name).read_bytes() for shard in manifest.shards}
    damage_in_row(config, 15)
    run_ranks(pretrain, 1, config)
    parts = replace(config, run_dir=str(tmp_path / "parts"), checkpoint=replace(config.checkpoint, every_steps=3))
    run_ranks(pretrain_and_die_after, 1, parts, 4)
    # The shard is restored in between, and the run's own file is lost: the checkpoint knows what was left out.
    for name, data in sound.items():
        (manifest.directory / name).write_bytes(data)
    (tmp_path / "parts" / "quarantine.jsonl").unlink()
    run_ranks(pretrain, 1, parts)
    assert without_times(metrics(tmp_path / "parts")) == without_times(metrics(tmp_path / "whole"))
    assert metrics(tmp_path / "parts")[-1]["quarantined"] == 1
    whole, again = (QuarantineLedger.read(tmp_path / name / "quarantine.jsonl") for name in ("whole", "parts"))
    assert whole.text() == again.text() != ""


def refusal(config: Config) -> str:
    from megatron_md.errors import PeerFailedError
    from megatron_md.train.callbacks.quarantine import QuarantineError

    with pytest.raises((QuarantineError, PeerFailedError)) as caught:
        pretrain(config)
    # The rank that comes second ends silently, with the same error as the cause.
    error = caught.value.__cause__ if isinstance(caught.value, PeerFailedError) else caught.value
    assert isinstance(error, QuarantineError)
    return str(error)


def test_too_much_damage_stops_all_ranks_with_one_report(tmp_path: Path) -> None:
    corpus = write_bigram_corpus(tmp_path / "corpus", 60, 0)
    config = small(tmp_path / "run", corpus, data={"max_quarantined": 0}, parallel={"distributed_optimizer": True})
    # Row 10 is served to rank 1 only.
    damaged = damage_in_row(config, 10)
    reports = run_ranks(refusal, 2, config, timeout=60)
    assert reports[0] == reports[1]
    for part in (f"{damaged.shard} document {damaged.document}", "data.max_quarantined 0", "quarantine.jsonl lists"):
        assert part in reports[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "QuarantineError" in summary["error"]
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("split", ["tensor", pytest.param("context", marks=pytest.mark.slow)])
def test_batches_of_random_length_train_alike_on_any_layout_and_after_a_crash(tmp_path: Path, split: str) -> None:
    corpus = write_bigram_corpus(tmp_path / "corpus", 60, 0)
    data = {"random_length_fraction": 0.7, "document_attention": "within_document"}
    config = small(tmp_path / "one", corpus, train={"steps": 6}, data=data)
    run_ranks(pretrain, 1, config)
    layout: dict[str, Any] = {split: 2, "pipeline": 2}
    four = replace(config, run_dir=str(tmp_path / "four"), parallel=replace(config.parallel, **layout))
    run_ranks(pretrain, 4, four)
    records = metrics(tmp_path / "one")
    sizes = np.diff([0, *(record["tokens"] for record in records)]) // 8
    assert len(set(sizes.tolist())) > 2 and max(sizes) <= LENGTH and not (sizes % 2).any()
    for one, other in zip(records, metrics(tmp_path / "four"), strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    parts = replace(config, run_dir=str(tmp_path / "parts"), checkpoint=replace(config.checkpoint, every_steps=2))
    run_ranks(pretrain_and_die_after, 1, parts, 3)
    run_ranks(pretrain, 1, parts)
    assert without_times(metrics(tmp_path / "parts")) == without_times(records)


def resume_with_other_weights(config: Config) -> None:
    with pytest.raises(ValueError, match=r"belongs to another run \(corpus: "):
        pretrain(config)


def test_a_mixture_trains_resumes_and_keeps_its_weights(tmp_path: Path) -> None:
    paths = [write_bigram_corpus(tmp_path / name, 30, seed) for seed, name in enumerate(("a", "b"))]
    corpora = [CorpusConfig(paths[0], 0.75), CorpusConfig(paths[1], [(0, 0.25), (20, 3.0)])]
    whole = small(tmp_path / "whole", corpora, train={"steps": 6})
    run_ranks(pretrain, 1, whole)
    parts = replace(whole, run_dir=str(tmp_path / "parts"), checkpoint=replace(whole.checkpoint, every_steps=3))
    run_ranks(pretrain_and_die_after, 1, parts, 4)
    run_ranks(pretrain, 1, parts)
    assert without_times(metrics(tmp_path / "parts")) == without_times(metrics(tmp_path / "whole"))
    other = replace(parts, data=replace(parts.data, train=[corpora[0], replace(corpora[1], weight=0.5)]))
    run_ranks(resume_with_other_weights, 1, replace(other, train=replace(other.train, steps=8)))
    # Steps 0 to 5 have read 48 rows: weights may change from there on.
    later = [corpora[0], replace(corpora[1], weight=[(0, 0.25), (20, 3.0), (48, 0.5)])]
    other = replace(parts, data=replace(parts.data, train=later), train=replace(parts.train, steps=7))
    run_ranks(pretrain, 1, other)
    assert [record["step"] for record in metrics(tmp_path / "parts")] == list(range(1, 8))
