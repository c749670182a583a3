"""Flip rates by hand, what counts as an answer, and the summary over seeds; nothing here needs the harness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_md.cli import main
from megatron_md.evaluate.tasks import FlipRate, answers_of, flip_rate, half_flips, summary


def test_flip_rate_is_the_disagreement_of_two_seeds() -> None:
    assert flip_rate([{1: "a", 2: "b"}, {1: "a", 2: "c"}]) == FlipRate(0.5, 0.5, 2)
    # Three seeds: question 1 differs in two pairs of three, question 2 in all, question 3 in none.
    seeds = [{1: 0, 2: 0, 3: 5}, {1: 0, 2: 1, 3: 5}, {1: 1, 2: 2, 3: 5}]
    found = flip_rate(seeds)
    assert found.flip_rate == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert (found.changed, found.questions) == (pytest.approx(2 / 3), 3)
    for bad in ([{1: 0}], [{1: 0}, {2: 0}], [{}, {}]):
        with pytest.raises(ValueError, match=r"two seeds|same questions"):
            flip_rate(bad)


def test_half_flips_are_choices_that_the_halves_of_the_draws_disagree_on() -> None:
    first, second = {0: (-1.0, -1.1), 1: (-2.0, -2.0)}, {0: (-1.0, -3.0), 1: (-2.0, -2.0)}
    halves = {"t": {(0, 0): first, (0, 1): second, (0, 2): {0: (-1.0, -9.0)}}, "u": {(0, 0): second}}
    assert half_flips(halves, ["t"]) == FlipRate(0.5, 0.5, 2)  # a single continuation is no choice
    assert half_flips(halves, ["t", "u"]) == FlipRate(pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert half_flips(halves, ["v"]) is None
    found = summary({1: results(0.5, 0)}, halves)
    assert found["t"]["half_flips"] == found["g"]["half_flips"]
    assert found["t"]["half_flips"] == {"flip_rate": 0.5, "changed": 0.5, "questions": 2}


def sample(doc: int, *responses: Any, name: str = "none") -> dict[str, Any]:
    return {"doc_id": doc, "filter": name, "filtered_resps": list(responses)}


def test_answers_are_choices_texts_or_whether_greedy_decoding_agrees() -> None:
    assert answers_of([sample(0, (-3.0, False), (-1.0, False), (-2.0, True)), sample(4, (-1.0, True))]) == {
        "none": {0: 1, 4: True}
    }
    assert answers_of([sample(0, "12", name="strict"), sample(0, "12.", name="loose")]) == {
        "strict": {0: "12"},
        "loose": {0: "12."},
    }
    assert answers_of([sample(0, -12.5)]) == {}


def results(accuracy: float, choice: int) -> dict[str, Any]:
    likelihoods = [(-1.0 if at == choice else -2.0, False) for at in range(3)]
    figures = {"alias": "t", "acc,none": accuracy, "acc_stderr,none": 0.1, "perplexity,none": 3.0}
    return {
        "results": {"t": {**figures, "perplexity_stderr,none": "N/A"}, "g": {"alias": "g", "acc,none": accuracy}},
        "samples": {"t": [sample(0, *likelihoods), sample(1, (-1.0, False), (-2.0, False))]},
        "group_subtasks": {"g": ["t"]},
    }


def test_summary_is_over_seeds() -> None:
    found = summary({1: results(0.5, 0), 2: results(0.7, 2)})
    assert found["t"]["metrics"]["acc,none"] == {
        "mean": pytest.approx(0.6),
        "stderr": 0.1,
        "seeds": [0.5, 0.7],
        "spread": pytest.approx(0.2 / 2**0.5),
    }
    assert found["t"]["metrics"]["perplexity,none"]["stderr"] is None
    assert found["t"]["flips"] == found["g"]["flips"] == {"none": {"flip_rate": 0.5, "changed": 0.5, "questions": 2}}
    one = summary({1: results(0.5, 0)})
    assert one["g"] == {"metrics": {"acc,none": {"mean": 0.5, "stderr": None, "seeds": [0.5], "spread": None}}}


def test_the_harness_is_an_extra(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(trained / "run"), "--tasks", "arc_easy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--tasks: needs lm_eval: pip install 'megatron-md[eval]'")
