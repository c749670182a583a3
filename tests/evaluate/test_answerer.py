"""Answers of a run: the same whatever was known before, on any layout; a killed process loses next to nothing."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_md.diffusion.conditional import ConditionalEstimator
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.evaluate.answer_file import Answer, AnswerFile
from megatron_md.evaluate.answerer import AT_ONCE, Answerer, Continuation, Document, Likelihood
from tests.ranks import RankError, run_ranks

ESTIMATOR = ConditionalEstimator(draws=4, minibatch=1, guidance=0.5)
LIKELIHOODS = [
    Likelihood([5, 6, 7 + number % 3], [9, 10 + number, 8], number // 2, check_greedy=number == 3)
    for number in range(10)
]
DOCUMENTS = [Document([7, 8, 9] * 15, 3), Document([4, 5], 4)]
SAMPLER = SamplerConfig(6, temperature=1.0, eos="stop", confidence_eos_eot_inf=True)
TEXTS = [
    Continuation([5, 6, 7], SAMPLER, 1),
    Continuation([5, 6], SAMPLER, 2),
    Continuation([8, 9, 5], SAMPLER, 3, eot_token_ids=(11, 12)),
    Continuation([5, 6, 7], SAMPLER, 4, until=("e",)),
    Continuation([5, 5, 7], SAMPLER, 5),
]


def answers(run: Path, path: Path | None, tensor: int = 1, die_after: int = -1) -> tuple[list[Answer], int]:
    """On a rank: all answers, and rows through the model; or what a process leaves that is killed on its way."""
    from megatron_md import parallel
    from megatron_md.data.tokenizer import Tokenizer
    from megatron_md.run.saved import Placement, open_run

    saved = open_run(run, Placement(tensor, 1, "cpu"))
    saved = replace(saved, config=replace(saved.config, train=replace(saved.config.train, micro_batch_size=2)))
    count = 0

    def on_answer() -> None:
        nonlocal count
        count += 1
        if count == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    with parallel.session(saved.config) as world:
        answerer = Answerer(saved, world, Tokenizer(saved.tokenizer), AnswerFile(path, {"step": saved.step}))
        found = [
            *answerer.likelihoods(LIKELIHOODS, ESTIMATOR, on_answer),
            *answerer.documents(DOCUMENTS, replace(ESTIMATOR, guidance=0.0), on_answer),
            *answerer.texts(TEXTS, on_answer),
        ]
        return found, answerer.forward_passes


def alike(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.is_greedy, one.forward_passes) == (other.text, other.is_greedy, other.forward_passes)
        if other.log_likelihood is not None:
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)
        assert (one.halves is None) == (other.halves is None)


@pytest.mark.distributed
def test_a_killed_evaluation_goes_on_where_it_stopped(trained: Path, tmp_path: Path) -> None:
    run = trained / "run"
    ((whole, passes),) = run_ranks(answers, 1, run, None)
    assert all(math.isfinite(answer.log_likelihood or 0.0) for answer in whole)
    assert passes == sum(answer.forward_passes for answer in whole)
    # Four draws with and without the prompt; one answer of three tokens was decoded as well, guided too.
    assert [answer.forward_passes for answer in whole[:4]] == [8, 8, 8, 8 + 6]
    assert whole[3].halves is not None and whole[3].halves[0] != whole[3].halves[1]
    assert sum(whole[3].halves) / 2 == pytest.approx(whole[3].log_likelihood, rel=1e-9)
    # Killed among the likelihoods, and among the texts; the second process is killed as well, the third has two ranks.
    path, kept = tmp_path / "answers.jsonl", []
    for die_after in (AT_ONCE + 2, len(LIKELIHOODS) + 8):
        with pytest.raises(RankError, match="rank 0 died without a word"):
            run_ranks(answers, 1, run, path, 1, die_after)
        kept.append(path.read_bytes())
    assert kept[1].startswith(kept[0]) and [text.count(b"\n") for text in kept] == [1 + AT_ONCE, 1 + 10 + 2 + 4]
    for found, counted in run_ranks(answers, 2, run, path):
        alike(found, whole)
        assert counted == passes
    assert path.read_bytes().startswith(kept[1]) and path.read_bytes().count(b"\n") == 1 + len(whole)
    complete = path.read_bytes()
    ((again, _),) = run_ranks(answers, 1, run, path)
    alike(again, whole)
    assert path.read_bytes() == complete


@pytest.mark.distributed
def test_a_text_ends_at_what_ends_one(trained: Path) -> None:
    class Bytes:
        eos_token_id = 2

        def decode(self, tokens: Any) -> str:
            return bytes(tokens).decode()

    answerer = Answerer(None, None, Bytes(), AnswerFile(None, {}))  # type: ignore[arg-type]
    asked = Continuation([], SAMPLER, 0, until=("", "cd", "e"), eot_token_ids=(3, 4))
    assert answerer.text([*b"ab", 4, *b"x"], asked) == "ab"
    assert answerer.text([*b"ab", 2, 3], asked) == "ab" and answerer.text([3, *b"a"], asked) == ""
    assert answerer.text([*b"abecd"], asked) == "ab" and answerer.text([*b"abc"], asked) == "abc"
