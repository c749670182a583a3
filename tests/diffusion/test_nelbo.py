from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.batch import CorruptedBatch
from megatron_md.diffusion.estimators import Estimator, Plan
from megatron_md.diffusion.nelbo import NelboTable, difference, evaluate_nelbo
from megatron_md.diffusion.scoring import ScoredRows
from tests.diffusion.denoiser_scorer import DenoiserScorer
from tests.diffusion.peer_vectors import vector
from tests.diffusion.toy_denoiser import ALARM_Z, ToyLaw
from tests.diffusion.toy_posterior import ToyPosterior
from tests.diffusion.toy_rows import LENGTH, ToyRows

EPS = 0.3  # far from 0, so that the target of `plain` is far from the NELBO
PLANTED = 1.02
MASK = 50


def evaluate(toy: ToyRows, estimator: Estimator, **keys: Any) -> NelboTable:
    return evaluate_nelbo(toy.scorer, toy.rows, estimator, mask_token_id=toy.law.mask, **keys)


def estimator_of(name: str, toy: ToyRows, seed: int = 1) -> Estimator:
    density = evaluate(toy, Estimator(seed=9)).neyman_density(LENGTH) if name == "neyman" else ()
    return Estimator(name, seed, EPS, density)  # type: ignore[arg-type]


def is_off(table: NelboTable, target: float, factor: float = 1.0) -> bool:
    """The alarm: the estimate is too far from the target for its own error."""
    report = table.report()
    return abs(factor * report.nelbo - target) > factor * ALARM_Z * report.mask_stderr + 1e-9


QUICK = {("exact", "markov"), ("complementary", "markov"), ("stratified_t", "markov"), ("plain", "markov")} | {
    (name, "unigram") for name in ("exact", "complementary", "neyman")
}
CASES = [
    pytest.param(name, law, marks=[] if (name, law) in QUICK else [pytest.mark.slow])
    for law in ("markov", "unigram", "uniform")
    for name in ("exact", "complementary", "neyman", "stratified_t", "plain")
]


@pytest.mark.parametrize(("name", "law"), CASES)
def test_estimators_find_the_exact_likelihood(name: str, law: str) -> None:
    toy = ToyRows(law, 1000)
    target = toy.rate_target(EPS) if name in ("stratified_t", "plain") else toy.nll
    table = evaluate(toy, estimator_of(name, toy), stderr=0.0027 * target)
    assert not is_off(table, target) and is_off(table, target, PLANTED)
    if law == "markov" and name in ("stratified_t", "plain"):
        assert is_off(table, toy.nll)  # it is not the NELBO that they estimate


@pytest.mark.parametrize(("name", "law"), [("exact", "markov"), ("complementary", "uniform"), ("neyman", "markov")])
def test_a_wrong_weight_is_seen(name: str, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ToyRows(law, 1000)
    estimator = (
        Estimator("neyman", 1, density=(1.0, 2.0, 3.0, 4.0, 5.0)) if name == "neyman" else estimator_of(name, toy)
    )
    right = estimator.plan

    def wrong(*args: Any) -> Plan:
        plan = right(*args)
        count_DB = np.rint(plan.rate_DB * LENGTH)
        weight_DB = {
            "exact": np.full_like(plan.weight_DB, 1.0 / 3.0),  # 1 / E[l]: right for a uniform law only
            "complementary": np.where(count_DB > 0, 0.5 / np.maximum(count_DB, 1), 0.0),  # the lone draw of l = n
            "neyman": 1.0 / np.maximum(count_DB, 1),  # no 1 / (n q)
        }[name]
        return Plan(plan.rate_DB, weight_DB, plan.stratum_B)

    assert not is_off(evaluate(toy, estimator, passes=10), toy.nll)
    monkeypatch.setattr(Estimator, "plan", lambda self, *args: wrong(*args))
    assert is_off(evaluate(toy, estimator, passes=10), toy.nll)


def test_fewer_forward_passes_for_the_better_estimator() -> None:
    toy = ToyRows("markov", 300)
    cost = {}
    for name in ("exact", "complementary", "stratified_t", "plain"):
        report = evaluate(toy, Estimator(name, 2, 1e-3), passes=8).report()  # type: ignore[arg-type]
        cost[name] = report.forward_passes * report.mask_stderr**2
    assert cost["exact"] < cost["stratified_t"] and cost["exact"] < cost["plain"]


def test_the_curve_is_the_cross_entropy_at_each_count() -> None:
    toy = ToyRows("markov", 1000)
    for name in ("exact", "complementary"):
        points = evaluate(toy, Estimator(name), passes=4).report(rate_bins=LENGTH).ce_by_rate  # type: ignore[arg-type]
        assert [round(point.rate * LENGTH) for point in points] == [1, 2, 3, 4, 5]
        for point, ce in zip(points, toy.ce_L, strict=True):
            assert abs(point.ce - ce) < ALARM_Z * point.stderr < 0.4 * ce
    assert [point.rows for point in points][-1] < 1000


def test_a_causal_model_has_its_exact_likelihood() -> None:
    toy = ToyRows("markov", 200)

    def causal(tokens_BL: torch.Tensor) -> torch.Tensor:
        # Position i sees BOS and the tokens before i: ask the exact denoiser with the rest masked.
        logits = []
        for i in range(LENGTH):
            state_BN = torch.full_like(tokens_BL, toy.law.mask)
            state_BN[:, :i] = tokens_BL[:, 1 : i + 1]
            logits.append(toy.law(state_BN)[:, i])
        return torch.stack(logits, dim=1)

    scorer = DenoiserScorer(causal, excluded=(toy.law.mask,), causal=True)
    table = evaluate_nelbo(
        scorer, toy.rows, Estimator("autoregressive"), mask_token_id=toy.law.mask, stderr=1e-6, passes=1
    )
    report = table.report()
    assert report.nelbo == pytest.approx(toy.nll, rel=1e-12)
    assert (report.passes, report.forward_passes, report.mask_stderr, report.ce_by_rate) == (1, 200, 0.0, [])
    values_R = table.values_PR()[0]
    assert report.stderr == pytest.approx(values_R.std(ddof=1) / math.sqrt(200))
    compared = difference(evaluate(toy, Estimator("exact"), passes=40), table)
    assert abs(compared.difference) < ALARM_Z * compared.mask_stderr and compared.passes == 40


class PosteriorScorer(DenoiserScorer):
    """The exact denoiser of a toy posterior, from its table."""

    def __init__(self, toy: ToyPosterior, row_R: np.ndarray) -> None:
        super().__init__(lambda tokens: tokens, micro_batch_size=len(row_R))
        self.toy, self.row_R = toy, row_R

    def _score(self, batch: CorruptedBatch) -> np.ndarray:
        length = batch.tokens_BL.shape[1]
        set_B = (batch.tokens_BL == MASK) @ (1 << np.arange(length))
        row_M, column_M = batch.positions_M // length, batch.positions_M % length
        return np.asarray(self.toy.nll_XSN[self.row_R[row_M], set_B[row_M], column_M])


def score(toy: ToyPosterior, row_R: np.ndarray, *, seed: int) -> NelboTable:
    """What the exact denoiser gets on some of the toy's sequences."""
    tokens_RL = toy.tokens_XN[row_R]
    rows = ScoredRows(tokens_RL, np.ones_like(tokens_RL, dtype=bool))
    return evaluate_nelbo(PosteriorScorer(toy, row_R), rows, Estimator("exact", seed), mask_token_id=MASK)


@pytest.mark.parametrize(("vocab", "length"), [(2, 4), (3, 4)])
def test_exact_denoiser_over_all_counts_and_masks_has_its_nll(vocab: int, length: int) -> None:
    toy = ToyPosterior(vocab, length)
    size_S = toy.is_masked_SN.sum(axis=1)
    mean_XS = toy.sum_XS / np.maximum(size_S, 1)
    per_count = [mean_XS[:, size_S == count].mean(axis=1) for count in range(1, length + 1)]
    np.testing.assert_allclose(np.mean(per_count, axis=0), toy.nll_X / length, rtol=1e-12)


def test_estimate_of_the_exact_denoiser_is_the_entropy_within_its_error() -> None:
    toy = ToyPosterior(3, 4)
    result = score(toy, np.random.default_rng(0).choice(len(toy.law_X), size=4000, p=toy.law_X), seed=1).report()
    entropy = float(toy.law_X @ toy.nll_X) / 4
    assert abs(result.nelbo - entropy) < 3.5 * result.stderr < 0.07 * entropy
    assert result.ppl_bound == pytest.approx(math.exp(result.nelbo))
    assert (result.tokens, result.rows) == (16000, 4000)


def test_paired_stderr_is_the_spread_of_repeated_estimates() -> None:
    # Copies of one token: it is unknown when all are masked and nearly known otherwise, so the value hangs on l.
    toy = ToyPosterior(3, 5, noise=0.02)
    generator = np.random.default_rng(7)
    repeats, rows = 400, 64
    nelbos, paired, naive = [], [], []
    for repeat in range(repeats):
        table = score(toy, generator.choice(len(toy.law_X), size=rows, p=toy.law_X), seed=repeat)
        nelbos.append(table.report().nelbo)
        paired.append(table.report().stderr ** 2)
        naive.append(np.var(table.values_PR()[0], ddof=1) / rows)
    spread, mean_paired = float(np.std(nelbos, ddof=1)), math.sqrt(np.mean(paired))
    # The spread of 400 draws is known within 1 / sqrt(2 * 400) = 3.5 %: three of that. Pairs straddle neighbouring
    # strata and so err upwards, by a little at 64 rows.
    assert mean_paired == pytest.approx(spread, rel=0.11)
    assert math.sqrt(np.mean(naive)) > 1.15 * spread  # the formula that ignores the strata


def uniform_nelbo(is_maskable_RL: np.ndarray, nats: float) -> NelboTable:
    """What a model of `nats` for every token gets."""
    logits_V = torch.tensor([0.0, math.log(math.expm1(nats))], dtype=torch.float64)  # softmax(0) = exp(-nats)
    scorer = DenoiserScorer(lambda tokens: logits_V.expand(*tokens.shape, -1))
    rows = ScoredRows(np.zeros(is_maskable_RL.shape, dtype=np.int64), is_maskable_RL)
    return evaluate_nelbo(scorer, rows, Estimator("exact", 3), mask_token_id=1)


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_uniform_model_has_log_v_exactly(rows: int) -> None:
    lengths = np.random.default_rng(rows).integers(1, 21, (rows, 1))
    result = uniform_nelbo(np.arange(20)[None] < lengths, math.log(7)).report()
    assert result.nelbo == pytest.approx(math.log(7), rel=1e-14)
    assert math.isnan(result.stderr) if rows == 1 else result.stderr < 1e-15


def test_log_likelihood_of_a_uniform_model_as_in_llada() -> None:
    case = vector("llada_loglik_uniform_model")
    inputs = case["inputs"]
    prompt, answer = inputs["prompt_len"], inputs["answer_len"]
    is_maskable_RL = np.tile(np.arange(prompt + answer) >= prompt, (inputs["mc_num"], 1))
    nelbo = uniform_nelbo(is_maskable_RL, math.log(inputs["vocab"])).report().nelbo
    assert -answer * nelbo == pytest.approx(case["expected"], abs=case["tol"])


def test_a_hopeless_model_has_an_infinite_bound() -> None:
    table = NelboTable(ScoredRows(np.zeros((2, 3), dtype=np.int64), np.ones((2, 3), dtype=bool)), Estimator("exact"))
    index_R = table.open_rows(0)
    table.record(0, index_R, 1000.0 * np.rint(table.estimator.plan(index_R, np.full(2, 3), 2).rate_DB * 3))
    assert table.report().ppl_bound == math.inf and table.report().nelbo == pytest.approx(1000.0)


class RankScorer(DenoiserScorer):
    """One of two data-parallel ranks, whose sums are added by hand."""

    data_size = 2


@pytest.mark.parametrize("name", ["exact", "complementary", "neyman", "stratified_t", "plain"])
def test_figures_do_not_depend_on_batches_or_ranks(name: str) -> None:
    toy = ToyRows("markov", 41)
    estimator = Estimator(name, 3, density=(1.0, 2.0) if name == "neyman" else ())  # type: ignore[arg-type]
    whole = evaluate(toy, estimator, passes=2)
    toy.scorer.micro_batch_size = 3
    np.testing.assert_allclose(evaluate(toy, estimator, passes=2).sums, whole.sums, rtol=1e-12)
    parts = []
    for rank in range(2):
        scorer = RankScorer(toy.law, micro_batch_size=4, excluded=(toy.law.mask,))
        scorer.data_rank = rank
        parts.append(evaluate_nelbo(scorer, toy.rows, estimator, mask_token_id=toy.law.mask, passes=2).sums)
    np.testing.assert_allclose(np.add(*parts), whole.sums, rtol=1e-12)
    other = evaluate(toy, Estimator(name, 4, density=estimator.density), passes=2)  # type: ignore[arg-type]
    assert not np.allclose(other.sums, whole.sums) and not np.allclose(whole.sums[0], whole.sums[1])


def test_an_evaluation_goes_on_where_it_stopped() -> None:
    toy = ToyRows("markov", 50)
    estimator = Estimator("complementary", 5)
    whole = evaluate(toy, estimator, passes=3)
    toy.scorer.micro_batch_size = 1
    states: list[str] = []
    calls: list[int] = []

    def stop(table: NelboTable) -> None:
        states.append(json.dumps(table.state()))
        if len(states) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(toy, estimator, passes=3, on_progress=stop)
    saved = json.loads(states[-1])
    half = NelboTable(toy.rows, estimator)
    half.load_state(saved)
    assert half.passes == 1 and 0 < len(half.open_rows(1)) < 50
    score = toy.scorer.negative_log_likelihoods
    toy.scorer.negative_log_likelihoods = lambda batches: (calls.append(len(batches)), score(batches))[1]  # type: ignore[method-assign,assignment,func-returns-value]
    resumed = evaluate(toy, estimator, passes=3, state=saved)
    np.testing.assert_allclose(resumed.sums, whole.sums, rtol=1e-12)
    assert sum(calls) == 2 * (100 - (50 - len(half.open_rows(1))))
    with pytest.raises(ValueError, match="the saved evaluation scored other rows"):
        evaluate(ToyRows("markov", 50, seed=1), estimator, state=saved)
    with pytest.raises(ValueError, match="the saved evaluation used"):
        evaluate(toy, Estimator("complementary", 6), state=saved)


def test_passes_go_on_until_the_error_is_small_enough() -> None:
    toy = ToyRows("markov", 100)
    report = evaluate(toy, Estimator("exact"), stderr=0.01).report()
    assert report.mask_stderr <= 0.01 and report.passes > 2
    assert evaluate(toy, Estimator("exact"), stderr=0.01, max_passes=report.passes - 1).report().mask_stderr > 0.01
    assert math.isnan(evaluate(toy, Estimator("exact")).report().mask_stderr)


def test_two_models_are_compared_in_pairs() -> None:
    toy = ToyRows("markov", 200)
    tilted = ToyLaw(toy.law.law_X**0.9 / np.sum(toy.law.law_X**0.9), toy.law.vocab, LENGTH)
    scorer = DenoiserScorer(tilted, micro_batch_size=500, excluded=(toy.law.mask,))
    estimator = Estimator("complementary", 2)
    ours = evaluate(toy, estimator, passes=16)
    theirs = evaluate_nelbo(scorer, toy.rows, estimator, mask_token_id=toy.law.mask, passes=20)
    found = difference(ours, theirs)
    powers = toy.law.vocab ** np.arange(LENGTH - 1, -1, -1)
    number_R = toy.rows.tokens_RL @ powers
    exact = toy.nll + float(np.log(tilted.law_X[number_R]).mean()) / LENGTH
    assert found.passes == 16 and abs(found.difference - exact) < ALARM_Z * found.mask_stderr
    unpaired = math.hypot(ours.report().mask_stderr, theirs.report().mask_stderr)
    assert found.mask_stderr < 0.3 * unpaired and found.stderr < 0.3 * ours.report().stderr
    with pytest.raises(ValueError, match="different rows"):
        difference(ours, evaluate(ToyRows("markov", 200, seed=4), estimator))
    with pytest.raises(ValueError, match="different estimators or seeds"):
        difference(ours, evaluate(toy, Estimator("complementary", 3)))


def test_bytes_padding_and_empty_rows() -> None:
    toy = ToyRows("uniform", 6)
    is_maskable_RL = np.arange(LENGTH) < np.array([5, 3, 0, 1, 2, 4])[:, None]
    rows = ScoredRows(toy.rows.tokens_RL, is_maskable_RL, bytes=30)
    for name in ("exact", "complementary", "neyman"):
        density = (1.0,) if name == "neyman" else ()
        table = evaluate_nelbo(
            toy.scorer,
            rows,
            Estimator(name, density=density),
            mask_token_id=toy.law.mask,
            passes=2,  # type: ignore[arg-type]
        )
        report = table.report()
        assert report.nelbo == pytest.approx(math.log(3)) and (report.tokens, report.rows) == (15, 5)
        assert report.ppl_bound == pytest.approx(3.0)
        assert report.bits_per_byte == pytest.approx(math.log2(3) / 2)
        assert report.stderr == pytest.approx(0.0, abs=1e-12)
        if name != "complementary":
            assert report.forward_passes == 10


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"estimator": Estimator("autoregressive")},
            "'autoregressive' does not fit this model; choose one for a denoiser",
        ),
        ({"passes": 0}, "passes must be at least 1"),
        ({"passes": 5, "max_passes": 4}, "at most max_passes 4, got 5"),
        ({"stderr": 0.0}, "stderr must be positive"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(ToyRows("uniform", 2), **{"estimator": Estimator(), **keys})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "exakt"}, "unknown estimator 'exakt'"),
        ({"min_mask_rate": 0.0}, r"min_mask_rate must be in \(0, 1\)"),
        ({"name": "neyman"}, "neyman, which needs one"),
        ({"density": (1.0,)}, "a density belongs to the estimator neyman"),
        ({"name": "neyman", "density": (1.0, 0.0)}, "must be positive in every bin"),
    ],
    ids=str,
)
def test_bad_estimators_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Estimator(**keys)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="hold no token to score"):
        ScoredRows(np.zeros((2, 3), dtype=np.int64), np.zeros((2, 3), dtype=bool))
    toy = ToyRows("uniform", 2)
    with pytest.raises(ValueError, match="no pass over the rows is complete"):
        NelboTable(toy.rows, Estimator()).report()
    with pytest.raises(ValueError, match="must use the estimator exact"):
        evaluate(toy, Estimator("plain")).neyman_density()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_broken_model_is_refused(value: float) -> None:
    toy = ToyRows("uniform", 20)
    logits_V = torch.tensor([0.0, 0.0, value, 0.0])
    toy.scorer = DenoiserScorer(lambda tokens: logits_V.expand(*tokens.shape, -1), micro_batch_size=20)
    with pytest.raises(ValueError, match=r"row \d+: the model's cross-entropy is not finite"):
        evaluate(toy, Estimator(), stderr=0.1)
