"""Runs that repeat few unique tokens: how many, how often, that they resume to the bit, and what marks overfitting."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_md.checkpoint.contract import effect
from megatron_md.cli import main
from megatron_md.config import CorpusConfig, to_yaml
from megatron_md.data.shards import load_manifest
from megatron_md.data.stream import SequenceStream
from megatron_md.run.check import check_config
from megatron_md.run.epochs import local_passes
from megatron_md.train.records import has_overfitted, lowest
from tests.ranks import RankError, run_ranks
from tests.train.test_trainer import config_for, corpora, metrics, pretrain, pretrain_and_die_after, without_times

__all__ = ["corpora"]  # the fixture

MOST = 450  # of documents of 100 tokens: four, which with their <eos> are 404 tokens in 13 rows of 32


def few(run_dir: Path, corpora: dict[str, str], epochs: float, **sections: Any) -> Any:
    keys = {"train": {"steps": 400, "epochs": epochs}, **sections}
    return config_for(run_dir, {**corpora, "max_tokens": MOST}, **keys)


@pytest.mark.distributed
def test_a_run_repeats_its_tokens_tells_so_resumes_to_the_bit_and_refuses_others(
    tmp_path: Path, corpora: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(pretrain, 1, few(tmp_path / "whole", corpora, 4))
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    made = {"corpus": corpora["train"], "unique_tokens": 400, "documents": 4, "epochs": 7 * 8 / 13}
    assert summary["corpora"] == [made] and summary["step"] == 7
    assert summary["best_val_nelbo"] == min(r["val_nelbo"] for r in metrics(tmp_path / "whole") if "val_nelbo" in r)
    assert {"val_nelbo", "unigram_entropy"} <= summary.keys()
    parts = few(tmp_path / "parts", corpora, 4, checkpoint={"every_steps": 2})
    run_ranks(pretrain_and_die_after, 1, parts, 5, timeout=60)
    others = {
        "451 now": replace(parts.data, max_tokens=MOST + 1),
        "None now": replace(parts.data, max_tokens=None),
    }
    for said, data in others.items():
        with pytest.raises(RankError, match=rf"belongs to another run \(data\.max_tokens: 450 there, {said}\)"):
            run_ranks(pretrain, 1, replace(parts, data=data))
    run_ranks(pretrain, 1, parts)
    assert without_times(metrics(tmp_path / "parts")) == without_times(metrics(tmp_path / "whole"))
    started = json.loads((tmp_path / "parts/events.jsonl").read_text().splitlines()[0])
    assert started["event"] == "started" and started["corpora"] == [made]
    assert main(["inspect", str(tmp_path / "whole")]) == 0
    out = capsys.readouterr().out
    assert f"{corpora['train']}: 400 unique tokens in 4 documents, 4.31 epochs" in out
    assert f"lowest val_nelbo {summary['best_val_nelbo']:.4f}, at step" in out


def test_a_dry_run_tells_unique_tokens_and_epochs(
    tmp_path: Path, corpora: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(few(tmp_path / "run", corpora, 4)))
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    assert f"  400 unique tokens in 4 documents, 4.31 epochs of {corpora['train']}\n" in capsys.readouterr().out


def test_rows_of_such_a_run_are_shown(corpora: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "show", corpora["train"], "--seq-length", "32", "--window-shards", "2", "--row", "12"]
    assert main([*words, "--max-tokens", str(MOST)]) == 0
    cut = capsys.readouterr().out
    assert main(words) == 0 and capsys.readouterr().out != cut
    assert len(re.findall(r"^row 12: ", cut, re.MULTILINE)) == 1
    rows = SequenceStream(load_manifest(corpora["train"]), seed=1234, seq_length=32, window_shards=2, max_tokens=MOST)
    assert f"row 12: {rows.rows([12]).is_maskable_BL.sum()} maskable tokens" in cut
    assert main([*words, "--max-tokens", "7000"]) == 2
    assert "max_tokens 7000 is more than the 6000 of" in capsys.readouterr().err


def test_corpora_of_a_mixture_are_told_one_by_one(tmp_path: Path, corpora: dict[str, str]) -> None:
    cut = CorpusConfig(corpora["train"], 3.0, name="cut", max_tokens=MOST)
    mixed = config_for(tmp_path / "run", {"train": [cut, CorpusConfig(corpora["valid"], 1.0, name="rest")]})
    told = [(one.corpus, one.unique_tokens, one.epochs) for one in local_passes(mixed)]
    assert told == [("cut", 400, 48 / 13), ("rest", 1000, 16 / 32)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"max_tokens": 7000}, r"data\.train: max_tokens 7000 is more than the 6000 of \S+: leave it out"),
        ({"max_tokens": 50}, r"data\.train: max_tokens 50: the first document of \S+ has 100: raise it to that"),
        ({"max_tokens": 150, "seq_length": 128}, r"max_tokens 150 leaves 100 tokens, less than data\.seq_length 128"),
        ({"max_tokens": 100, "train": [CorpusConfig("a", 1.0)]}, r"data\.max_tokens is for a single corpus: give each"),
    ],
)
def test_what_cannot_be_is_refused_before_the_start(
    tmp_path: Path, corpora: dict[str, str], data: dict[str, Any], message: str
) -> None:
    config = config_for(tmp_path / "run", corpora, data=data, model={"max_length": 128})
    with pytest.raises(ValueError, match=message):
        check_config(config, 1)


def test_another_number_of_tokens_is_another_run() -> None:
    assert effect("data.max_tokens", [1000, 2000], set()) == "refused"


def record(step: int, nelbo: float | None, stderr: float | None = 0.1) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "val_nelbo": nelbo, "val_nelbo_stderr": stderr}


@pytest.mark.parametrize(
    ("nelbos", "best", "is_over"),
    [
        ([], None, False),
        ([None], None, False),
        ([3.0, 2.0, 1.0], 3, False),
        ([3.0, 1.0, 1.05], 2, False),
        ([3.0, 1.0, 1.0], 2, False),
        ([3.0, 1.0, 1.2], 2, True),
        ([3.0, 1.0, 1.2, None], 2, True),
        ([3.0, 1.0, float("inf")], 2, False),
    ],
)
def test_a_run_has_overfitted_where_it_ends_above_its_minimum_by_more_than_its_error(
    nelbos: list[float | None], best: int | None, is_over: bool
) -> None:
    records = [{"step": 0, "loss": 1.0}, *(record(step, nelbo) for step, nelbo in enumerate(nelbos, start=1))]
    found = lowest(records)
    assert (found and found["step"]) == best and has_overfitted(records) is is_over
    assert not has_overfitted([*records, record(9, 1.0)])
    assert has_overfitted([*records, record(9, 1.0), record(10, 1.01, None)])


def test_the_picture_marks_the_minimum_of_a_run_that_overfitted(tmp_path: Path) -> None:
    from megatron_md.evaluate.plot import plot_run
    from tests.evaluate.test_plot import texts

    def drawn(*nelbos: float) -> str:
        lines = [json.dumps({**record(step, nelbo), "loss": 1.0}) for step, nelbo in enumerate(nelbos, start=1)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        plot_run(tmp_path, tmp_path / "loss.svg")
        return texts(tmp_path / "loss.svg")

    assert "lowest 1.000, at step 2: overfitted from there" in drawn(3.0, 1.0, 1.5)
    assert "overfitted" not in drawn(3.0, 1.0, 1.05)
