"""`megatron-md window`: figures of a corpus that can be counted by hand, the line for the config, the picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.cli import main
from megatron_md.commands.window import GENERATION, config_line, documents, predict
from megatron_md.config import config_from_mapping
from megatron_md.config.loader import parse_yaml
from megatron_md.data.shards import Manifest, load_manifest
from megatron_md.data.writer import Tokenised, Vocabulary, write_corpus
from megatron_md.diffusion.theory import optimal_mask_rate
from megatron_md.run.check import check_config
from tests.data.small_corpus import EOS, MASK, PAD, all_documents
from tests.diffusion.test_ngrams import ngram_weights


def write(folder: Path, documents: list[list[int]], tokenizer: str = "0" * 64) -> Manifest:
    batch = [Tokenised(np.array(tokens, dtype=np.int64), len(tokens)) for tokens in documents]
    return write_corpus([batch], Vocabulary(1000, EOS, MASK, PAD, tokenizer), folder, shard_tokens=2000)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    random = np.random.default_rng(0)
    found = write(tmp_path / "corpus", [np.minimum(random.zipf(1.5, 90) + 3, 999).tolist() for _ in range(100)])
    assert len(found.shards) > 2
    return found


def window(words: list[str], folder: Path) -> int:
    return main(["window", *words, "--output", str(folder / "out" / "window.png")])


def figures(manifest: Manifest, folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    output = folder / "figures.json"
    assert window([str(manifest.directory), *words, "--json", str(output)], folder) == 0
    assert f"{output} written" in capsys.readouterr().out
    return json.loads(output.read_text())


def test_figures_are_those_of_the_whole_corpus(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures(manifest, tmp_path, capsys)
    last = found["by_tokens"][-1]
    assert last["tokens"] == manifest.tokens == 9000
    tokens = [np.array(document) for document in all_documents(manifest)]
    for by in ("types", "occurrences"):
        weights = ngram_weights(tokens, by=by)  # type: ignore[arg-type]
        assert last["weights"][by] == {str(order): weight for order, weight in weights.items()}
        assert last["mask_rate"][by]["linear"] == optimal_mask_rate(weights, 1)
        assert last["mask_rate"][by]["squared"] == optimal_mask_rate(weights, 2)
    sizes = [prediction["tokens"] for prediction in found["by_tokens"]]
    assert len(sizes) == 4 and all(2 <= size * 8 / 9000 <= 8.2 or size < 1300 for size in sizes)
    assert (tmp_path / "out/window.png").read_bytes().startswith(b"\x89PNG")


def test_both_uses_get_a_line_that_a_config_takes(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert window([str(manifest.directory)], tmp_path) == 0
    text = capsys.readouterr().out
    lines = re.findall(r"^  (objective: .*)$", text, re.MULTILINE)
    assert len(lines) == 2 and lines[1] == config_line(*GENERATION) == 'objective: {mask_schedule: "uniform:0.5,1"}'
    schedules = []
    for line in lines:
        config = config_from_mapping(parse_yaml(line, "window"))
        check_config(config, 1, corpora=False)
        schedules.append(config.objective.mask_schedule)
    rates = predict([manifest], manifest.tokens)[-1].mask_rate["occurrences"]
    low, high = map(float, str(schedules[0]).partition(":")[2].split(","))
    assert high - low == pytest.approx(0.1)
    assert (low + high) / 2 == pytest.approx(np.mean(list(rates.values())), abs=0.0051)
    assert "likelihood" in text and "generation" in text and "fine-tuning of LLaDA-8B" in text


def test_max_tokens_takes_documents_at_random(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures(manifest, tmp_path, capsys, "--max-tokens", "4000")
    assert found["by_tokens"][-1]["tokens"] == 4000
    read = [document.tolist() for document in documents([manifest], 4000)]
    stored = all_documents(manifest)
    assert sum(map(len, read)) == 4000
    assert read != stored[: len(read)] and all(document in stored for document in read[:-1])
    assert figures(manifest, tmp_path, capsys, "--max-tokens", "999999")["by_tokens"][-1]["tokens"] == 9000


def test_several_corpora_are_read_as_one(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "other", all_documents(manifest)[:30])
    found = figures(manifest, tmp_path, capsys, str(tmp_path / "other"))
    assert found["by_tokens"][-1]["tokens"] == 9000 + 30 * 90


def test_a_corpus_of_pairs_alone_asks_for_half(tmp_path: Path) -> None:
    # Only bigrams recur, so Signal(t) = t (1 - t).
    corpus = write(tmp_path / "pairs", [[5, 6]] * 20 + [[7, 8]] * 20)
    prediction = predict([corpus], corpus.tokens)[-1]
    assert prediction.weights["types"] == {2: 1.0, 3: 0.0, 4: 0.0, 5: 0.0, 6: 0.0}
    assert prediction.mask_rate["types"] == pytest.approx({"linear": 0.5, "squared": 0.5})
    assert prediction.window == (0.45, 0.55)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
        (["--max-tokens", "-5"], "--max-tokens -5: must be at least 1"),
        (["--max-tokens", "3"], "no n-gram recurs often enough in 3 tokens"),
        (["--output", "window.doc"], "no picture format 'doc'"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["window", str(manifest.directory), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_corpora_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], manifest: Manifest) -> None:
    write(tmp_path / "empty", [[], []])
    write(tmp_path / "foreign", [[5, 6]], tokenizer="1" * 64)
    cases = [
        ([str(tmp_path / "empty")], "holds no tokens"),
        ([str(tmp_path / "nowhere")], "no such manifest"),
        ([str(manifest.directory), str(tmp_path / "foreign")], "different tokenizers"),
    ]
    for words, message in cases:
        assert window(words, tmp_path) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_damage_is_named(manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = manifest.directory / load_manifest(manifest.directory).shards[0].name
    content = bytearray(shard.read_bytes())
    content[520] ^= 1
    shard.write_bytes(content)
    assert window([str(manifest.directory)], tmp_path) == 2
    assert f"{shard}: document 0" in capsys.readouterr().err
