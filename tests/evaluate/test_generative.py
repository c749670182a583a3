"""Entropy and perplexity of samples: closed forms, laws whose perplexity is known, and the command on any layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_md.evaluate.generative import Judge, Quality, ngram_distance, perplexity_at, unigram_entropy
from tests.diffusion.denoiser_scorer import DenoiserScorer
from tests.evaluate.test_likelihood import evaluate, refusal
from tests.ranks import run_ranks

EOS = 2


def test_entropy_is_within_a_sample() -> None:
    assert unigram_entropy([[1, 2, 3, 4]]) == pytest.approx(math.log(4))
    assert unigram_entropy([[7] * 5]) == 0.0
    # Two samples that are constant differ from each other, not within.
    assert unigram_entropy([[1, 1], [2, 2]]) == 0.0
    assert unigram_entropy([[1, 1, 2, 2], [5, 6, 7, 8]]) == pytest.approx(1.5 * math.log(2))


def test_distances_count_ngrams_within_samples() -> None:
    assert ngram_distance([[1, 2], [1, 2]], [[1, 2]], 1) == 0.0 == ngram_distance([[1, 2], [1, 2]], [[1, 2]], 2)
    # 3/4 and 1/4 against 1/2 and 1/2; no pair reaches from one sample into the next.
    assert ngram_distance([[1, 1], [1, 2]], [[1, 2]], 1) == pytest.approx(0.25)
    assert ngram_distance([[1, 1], [1, 2]], [[1, 2]], 2) == pytest.approx(0.5)
    assert ngram_distance([[1, 2, 1]], [[3, 4]], 2) == 1.0


def quality(entropy: float, perplexity: float) -> Quality:
    return Quality(1.0, 8, 8.0, perplexity, 0.0, entropy, 0.0, 0.0, 1.0)


def test_perplexities_are_compared_at_equal_entropy() -> None:
    swept = [quality(4.0, 80.0), quality(3.0, 20.0)]
    assert perplexity_at(3.5, swept) == pytest.approx(40.0)
    assert perplexity_at(3.0, swept) == pytest.approx(20.0)
    assert perplexity_at(2.9, swept) is None and perplexity_at(4.1, swept) is None and perplexity_at(1.0, []) is None


class Words:
    """A tokenizer: one letter, one token, shifted by some number."""

    def __init__(self, name: str, shift: int) -> None:
        self.sha256, self.shift, self.eos_token_id, self.mask_token_id = name, shift, EOS, 3

    def encode(self, text: str) -> Any:
        return torch.tensor([ord(letter) - ord("a") + self.shift for letter in text], dtype=torch.int64)

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(token - self.shift + ord("a")) for token in tokens)


def judge(words: Words, law_V: torch.Tensor, context: int = 4) -> Judge:
    config: Any = SimpleNamespace(model=SimpleNamespace(max_length=context), data=None)
    saved: Any = SimpleNamespace(config=config)
    scorer = DenoiserScorer(lambda tokens: law_V.log().expand(*tokens.shape, -1), causal=True)
    return Judge(saved, words, scorer)  # type: ignore[arg-type]


def test_a_judge_of_independent_tokens_knows_their_law() -> None:
    law_V = torch.tensor([0.1, 0.1, 0.2, 0.1, 0.5], dtype=torch.float64)
    words: Any = Words("one", 0)
    samples = [[4, 4, 2, 0, 1, 4], [2, 2, 4, 4, 4, 1]]
    nats, stderr = judge(words, law_V)(samples, words)  # longer than the context of 4
    per_sample = [-sum(math.log(law_V[token]) for token in sample) / 6 for sample in samples]
    assert nats == pytest.approx(sum(per_sample) / 2, rel=1e-9)
    assert stderr == pytest.approx(abs(per_sample[0] - per_sample[1]) / 2, rel=1e-9)
    assert math.isnan(judge(words, law_V)(samples[:1], words)[1])


def test_texts_are_encoded_anew_for_a_judge_with_another_tokenizer() -> None:
    ours: Any = Words("ours", 4)
    law_V = torch.full((40,), 1 / 40, dtype=torch.float64)
    other = judge(Words("theirs", 10), law_V)
    assert other._encoded_anew([4, 5, EOS, 6, EOS], ours) == [10, 11, EOS, 12, EOS]
    assert other._encoded_anew([4, 5], ours) == [10, 11]
    assert other([[4, 5, EOS, 6]], ours)[0] == pytest.approx(math.log(40))


@pytest.mark.distributed
@pytest.mark.slow
def test_samples_are_judged_alike_on_every_layout(trained: Path) -> None:
    words = ["--generative", "--judge", str(trained / "causal"), "--samples", "6", "--length", "16"]
    words += ["--steps", "4,16", "--temperatures", "0.7,1", "--micro-batch-size", "4"]
    found = []
    for ranks, *split in ((1,), (2, "--tensor", "1"), (2, "--pipeline", "2")):
        output = trained / "quality.json"
        code = run_ranks(evaluate, ranks, str(trained / "run"), *words, *split, "--json", str(output))
        assert code == [0] * int(ranks)
        found.append(json.loads(output.read_text()))
    one = found[0]
    for other in found[1:]:
        for ours, theirs in zip(one["settings"], other["settings"], strict=True):
            for key in ours.keys() - {"seconds"}:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-5), key
        assert other["text"] == pytest.approx(one["text"], rel=1e-5)
    assert [(setting["temperature"], setting["steps"]) for setting in one["settings"]] == [
        (0.7, 4), (0.7, 16), (1.0, 4), (1.0, 16),
    ]  # fmt: skip
    assert all(setting["forward_passes"] <= setting["steps"] for setting in one["settings"])
    assert 0.0 < one["text"]["unigram_distance"] < one["text"]["bigram_distance"] < 1.0
    # A model that has hardly learnt is more varied and less likely than text.
    assert all(setting["perplexity"] > one["text"]["perplexity"] > 1.0 for setting in one["settings"])
    assert all(0.0 < setting["entropy"] <= math.log(16) for setting in one["settings"])
    assert one["perplexity_at_text_entropy"].keys() == {"4", "16"}


@pytest.mark.distributed
def test_a_causal_run_samples_from_left_to_right(trained: Path) -> None:
    output = trained / "causal_quality.json"
    words = ["--generative", "--judge", str(trained / "causal"), "--samples", "3", "--length", "8"]
    assert run_ranks(evaluate, 1, str(trained / "causal"), *words, "--json", str(output)) == [0]
    (setting,) = json.loads(output.read_text())["settings"]
    assert (setting["steps"], setting["forward_passes"]) == (8, 8.0)


def test_bad_input_is_refused_by_name(trained: Path) -> None:
    causal = ["--generative", "--judge", str(trained / "causal")]
    for text, *words in (
        ("needs --judge RUN_AR", "--generative"),
        ("is not causal, so that it has no exact perplexity", "--generative", "--judge", str(trained / "run")),
        ("nowhere: neither a run directory", "--generative", "--judge", str(trained / "nowhere")),
        ("--length 99 exceeds the 32 positions", *causal, "--length", "99"),
        ("steps 5 is not a multiple of the 2 blocks", *causal, "--length", "8", "--block", "4", "--steps", "5"),
        ("unknown sampling strategy", *causal, "--strategy", "guess"),
    ):
        refusal(trained, text, *words)
