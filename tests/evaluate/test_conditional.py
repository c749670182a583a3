from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.diffusion import conditional
from megatron_md.diffusion.conditional import ConditionalEstimator
from megatron_md.evaluate.conditional import Question, conditional_log_likelihoods
from tests.diffusion.denoiser_scorer import DenoiserScorer
from tests.diffusion.peer_vectors import vector
from tests.diffusion.toy_denoiser import ALARM_Z, ToyLaw
from tests.diffusion.toy_rows import LENGTH, law_of

PROMPT, ANSWERS = (0, 1), ((2, 1, 2), (0, 0, 1))


def exact(law: ToyLaw, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    tokens = law.tokens_XN
    has_prompt = np.all(tokens[:, : len(prompt)] == prompt, axis=1)
    return float(np.log(law.law_X[np.all(tokens == [*prompt, *answer], axis=1)][0] / law.law_X[has_prompt].sum()))


def scorer_of(law: ToyLaw, size: int = 400) -> DenoiserScorer:
    return DenoiserScorer(law, micro_batch_size=size, excluded=(law.mask,))


def repeated(law: ToyLaw, repeats: int, **keys: Any) -> np.ndarray:
    """Estimates [repeats, answers] with independent draws."""
    found = conditional_log_likelihoods(
        scorer_of(law), [Question(PROMPT, ANSWERS)] * repeats, ConditionalEstimator(**keys), mask_token_id=law.mask
    )
    return np.array([[answer.log_likelihood for answer in answers] for answers in found])


def z_of(estimates: np.ndarray, target: float) -> float:
    return abs(estimates.mean() - target) / (estimates.std(ddof=1) / np.sqrt(len(estimates)))


@pytest.mark.parametrize("law_name", ["unigram", "markov"])
def test_monte_carlo_finds_the_exact_conditional(law_name: str) -> None:
    law = law_of(law_name)
    found = repeated(law, 300, draws=64)
    for at, answer in enumerate(ANSWERS):
        target = exact(law, PROMPT, answer)
        assert z_of(found[:, at], target) < ALARM_Z < z_of(1.02 * found[:, at], target)


def test_a_wrong_weight_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    law = law_of("markov")
    right = conditional.evenly_spaced_counts

    def wrong(length: int, minibatch: int, u: float) -> np.ndarray:
        return np.minimum(right(length, minibatch, u) + 1, length)  # never one token alone

    monkeypatch.setattr(conditional, "evenly_spaced_counts", wrong)
    found = repeated(law, 60, draws=64)
    assert z_of(found[:, 0], exact(law, PROMPT, ANSWERS[0])) > ALARM_Z


def test_stderr_is_the_spread_of_repeated_estimates() -> None:
    law = law_of("markov")
    questions = [Question(PROMPT, ANSWERS[:1])] * 150
    found = conditional_log_likelihoods(
        scorer_of(law), questions, ConditionalEstimator(draws=64, minibatch=4), mask_token_id=law.mask
    )
    spread = np.std([answers[0].log_likelihood for answers in found], ddof=1)
    mean = np.sqrt(np.mean([answers[0].stderr ** 2 for answers in found]))
    assert mean == pytest.approx(spread, rel=0.2)  # the spread of 150 draws is known within 6 %


def test_left_to_right_is_exact_for_exact_conditionals() -> None:
    law = law_of("markov")
    estimator = ConditionalEstimator("left_to_right")
    for size in (1, 2, 400):
        ((first, second),) = conditional_log_likelihoods(
            scorer_of(law, size), [Question(PROMPT, ANSWERS)], estimator, mask_token_id=law.mask
        )
        assert first.log_likelihood == pytest.approx(exact(law, PROMPT, ANSWERS[0]), rel=1e-12)
        assert second.log_likelihood == pytest.approx(exact(law, PROMPT, ANSWERS[1]), rel=1e-12)
        assert (first.stderr, first.forward_passes) == (0.0, 3)


@pytest.mark.parametrize("guidance", [0.5, 2.0])
def test_guidance_is_that_of_the_logits_with_and_without_the_prompt(guidance: float) -> None:
    law, answer = law_of("markov"), ANSWERS[0]
    estimator = ConditionalEstimator("left_to_right", guidance=guidance)
    ((found,),) = conditional_log_likelihoods(
        scorer_of(law, 2), [Question(PROMPT, [answer])], estimator, mask_token_id=law.mask
    )
    target = 0.0
    for at, token in enumerate(answer):
        rest = [*answer[:at], *[law.mask] * (len(answer) - at)]
        conditional_V, unconditional_V = (
            law.conditional_SNV[int(law.number(torch.tensor([[*prompt, *rest]]), law.vocab + 1)), len(prompt) + at]
            for prompt in (PROMPT, [law.mask] * len(PROMPT))
        )
        # softmax(u + (1 + w)(c - u)) of logarithms: c^(1 + w) / u^w, normalised
        guided_V = conditional_V ** (1.0 + guidance) / unconditional_V**guidance
        target += float(np.log(guided_V[token] / guided_V.sum()))
    assert found.log_likelihood == pytest.approx(target, rel=1e-9)
    assert found.forward_passes == 2 * len(answer)


def test_guidance_counts_for_every_draw_of_monte_carlo() -> None:
    # Logits that depend on the prompt alone, and one token again and again: each draw gives the same, and it is known.
    given_V, masked_V, answer, guidance = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.5, 0.0]), [2, 2, 2], 1.5

    def denoiser(tokens_BL: torch.Tensor) -> torch.Tensor:
        is_given_B11 = (tokens_BL[:, :1] != 3)[..., None]
        return torch.where(is_given_B11, given_V, masked_V).expand(*tokens_BL.shape, -1)

    estimator = ConditionalEstimator(draws=32, guidance=guidance)
    questions = [Question([1, 1], [answer, [2]]), Question([], [answer], key=7)]
    found = conditional_log_likelihoods(DenoiserScorer(denoiser), questions, estimator, mask_token_id=3)
    logp_V = (masked_V + (1.0 + guidance) * (given_V - masked_V)).double().log_softmax(dim=0)
    assert found[0][0].log_likelihood == pytest.approx(float(logp_V[answer].sum()), rel=1e-4)
    assert found[0][1].log_likelihood == pytest.approx(float(logp_V[2]), rel=1e-4)
    assert [each.forward_passes for answers in found for each in answers] == [64, 2, 32]
    # Without a prompt there is nothing to do without; the first token of the row is then part of the answer.
    plain = ConditionalEstimator(draws=32)
    (alone,) = conditional_log_likelihoods(DenoiserScorer(denoiser), questions[1:], plain, mask_token_id=3)
    assert found[1][0].log_likelihood == alone[0].log_likelihood


def test_uniform_model_as_in_llada() -> None:
    case = vector("llada_loglik_uniform_model")
    inputs = case["inputs"]
    scorer = DenoiserScorer(lambda tokens: torch.zeros(*tokens.shape, inputs["vocab"]))
    estimator = ConditionalEstimator(draws=inputs["mc_num"], minibatch=inputs["batch_size"])
    question = Question([0] * inputs["prompt_len"], [[1] * inputs["answer_len"]])
    ((found,),) = conditional_log_likelihoods(scorer, [question], estimator, mask_token_id=6)
    assert found.log_likelihood == pytest.approx(case["expected"], abs=case["tol"])
    assert found.stderr == pytest.approx(0.0, abs=1e-6) and found.forward_passes == inputs["mc_num"]


def test_coupled_choices_differ_more_surely_than_their_parts() -> None:
    found = repeated(law_of("unigram"), 60, draws=16)
    assert np.var(found[:, 0] - found[:, 1]) < 0.9 * (np.var(found[:, 0]) + np.var(found[:, 1]))


class RankScorer(DenoiserScorer):
    data_size = 2


def test_ranks_share_the_questions() -> None:
    law = law_of("markov")
    questions = [Question((0,), ((1, 2), (2,))), Question((), ((1, 0, 2, 2, 1),)), Question(PROMPT, ANSWERS)]
    estimator = ConditionalEstimator(draws=16)
    law_of_any_length = {length: ToyLaw(marginal(law, length), 3, length) for length in (2, 3, 5)}

    def denoiser(tokens: torch.Tensor) -> torch.Tensor:
        return law_of_any_length[tokens.shape[1]](tokens)

    def figures(scorer: DenoiserScorer) -> np.ndarray:
        found = conditional_log_likelihoods(scorer, questions, estimator, mask_token_id=law.mask)
        assert [len(answers) for answers in found] == [2, 1, 2]
        return np.array([[a.log_likelihood, a.forward_passes] for answers in found for a in answers])

    whole = figures(DenoiserScorer(denoiser, excluded=(3,)))
    parts = []
    for rank in range(2):
        scorer = RankScorer(denoiser, micro_batch_size=3, excluded=(3,))
        scorer.data_rank = rank
        parts.append(figures(scorer))
    assert (parts[0][2] == 0).all() and (parts[1][2] != 0).all()
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-12)
    assert whole[:, 1].tolist() == [16, 1, 16, 16, 16]


def marginal(law: ToyLaw, length: int) -> np.ndarray:
    return law.law_X.reshape(3**length, 3 ** (LENGTH - length)).sum(axis=1)


@pytest.mark.parametrize(
    ("question", "keys", "message"),
    [
        (Question((0,), ((1,), ())), {}, "question 0, answer 1: an answer without tokens"),
        (Question((3,), ((1,),)), {}, r"question 0, answer 0: the text contains the mask token \(3\)"),
        (Question((0, 1), ((1, 2),)), {"max_length": 3}, "tokens and the answer's 2 exceed the model's 3 positions"),
    ],
    ids=str,
)
def test_bad_questions_are_refused(question: Question, keys: dict[str, Any], message: str) -> None:
    law = law_of("uniform")
    with pytest.raises(ValueError, match=message):
        conditional_log_likelihoods(scorer_of(law), [question], ConditionalEstimator(), mask_token_id=law.mask, **keys)


def test_a_method_for_another_kind_of_model_is_refused() -> None:
    law = law_of("uniform")
    with pytest.raises(ValueError, match="'autoregressive' does not fit this model"):
        conditional_log_likelihoods(scorer_of(law), [], ConditionalEstimator("autoregressive"), mask_token_id=3)
