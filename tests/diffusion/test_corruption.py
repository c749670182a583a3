from __future__ import annotations

import numpy as np
import pytest

from megatron_md.batch import BatchPosition, CleanBatch
from megatron_md.diffusion import corruption
from megatron_md.diffusion.corruption import (
    assemble,
    is_below_rate,
    mask_at_rate,
    mask_exact_count,
    random_words,
    stratified_uniforms,
    stratified_uniforms_of_rows,
    uniforms,
)
from megatron_md.diffusion.schedule import parse_schedule
from tests.diffusion.peer_vectors import vector

GOLDEN_WORDS = [10328906019526824645, 14457629271906891161, 10037377057595801202]


def test_numpy_runs_the_published_philox() -> None:
    # Known answer of Random123 for key 0 and counter 0; numpy counts up before it uses the counter.
    words = np.random.Philox(counter=2**256 - 1, key=0).random_raw(4)
    assert [f"{word:016x}" for word in words.tolist()] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]


def test_words_are_a_fixed_function_of_seed_purpose_and_index() -> None:
    # Committed values: a change here changes every run.
    assert random_words(1234, "is_masked", (7,), 3).tolist() == GOLDEN_WORDS
    np.testing.assert_array_equal(uniforms(1234, "is_masked", 7, 3), [(word >> 11) / 2**53 for word in GOLDEN_WORDS])


def test_any_part_of_a_stream_is_found_without_the_rest() -> None:
    whole = random_words(5, "x", (3, 2), 40)
    for start in range(12):
        np.testing.assert_array_equal(random_words(5, "x", (3, 2), 17, start=start), whole[start : start + 17])


def test_streams_differ_by_seed_purpose_and_every_index() -> None:
    streams = [(1, "a", (0, 0)), (2, "a", (0, 0)), (1, "b", (0, 0)), (1, "a", (1, 0)), (1, "a", (0, 1))]
    words = np.concatenate([random_words(*stream, 500) for stream in streams])
    assert len(np.unique(words)) == len(words)


def test_uniforms_are_uniform_and_independent_of_their_neighbours() -> None:
    u = np.stack([uniforms(0, "is_masked", g, 100) for g in range(1000)])
    assert u.min() >= 0.0 and u.max() < 1.0
    counts = np.bincount((u.reshape(-1) * 20).astype(int), minlength=20)
    # Chi-square with 19 degrees of freedom: 43.8 is passed once in a thousand; the draw is fixed.
    assert np.sum((counts - 5000) ** 2 / 5000) < 43.8
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        assert abs(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]) < 4 / np.sqrt(a.size)


@pytest.mark.parametrize("size", [1, 2, 7, 2048])
def test_every_stratum_of_the_global_batch_is_hit_once(size: int) -> None:
    for first in (0, 13, 10**12):
        u = stratified_uniforms(3, first, size)
        np.testing.assert_array_equal(np.sort(np.floor(u * size)), np.arange(size))
        assert u.dtype == np.float64 and u.min() >= 0.0 and u.max() < 1.0


def test_strata_are_permuted_anew_in_every_batch_and_jitter_belongs_to_the_row() -> None:
    size = 64
    a, b, c = stratified_uniforms(3, 0, size), stratified_uniforms(3, size, size), stratified_uniforms(4, 0, size)
    strata = [np.floor(u * size) for u in (a, b, c)]
    assert not np.array_equal(strata[0], strata[1]) and not np.array_equal(strata[0], strata[2])
    # Rows 64..127 keep their jitter in a batch of another size or start (a batch ramp); only the strata change.
    jitter = (b * size) % 1.0
    np.testing.assert_allclose((stratified_uniforms(3, size, 32) * 32) % 1.0, jitter[:32], atol=1e-13)
    np.testing.assert_allclose((stratified_uniforms(3, 0, 2 * size) * 2 * size)[size:] % 1.0, jitter, atol=1e-13)
    # Neither batch order nor position in the batch says anything about the stratum.
    means = np.mean([stratified_uniforms(3, size * k, size) for k in range(400)], axis=0)
    assert np.abs(means - 0.5).max() < 4.5 * np.sqrt(1 / 12 / 400)


def test_strata_are_read_only_and_cached() -> None:
    u = stratified_uniforms(3, 0, 16)
    assert stratified_uniforms(3, 0, 16) is u
    with pytest.raises(ValueError, match="read-only"):
        u[0] = 0.0


def test_a_row_does_not_depend_on_its_length_or_its_neighbours() -> None:
    g_B, t_B = np.array([4, 9, 2]), np.array([0.3, 0.5, 0.9])
    is_maskable_BL = np.ones((3, 50), dtype=bool)
    whole = mask_at_rate(1, g_B, t_B, is_maskable_BL)
    np.testing.assert_array_equal(mask_at_rate(1, g_B, t_B, is_maskable_BL[:, :17]), whole[:, :17])
    np.testing.assert_array_equal(mask_at_rate(1, g_B[1:2], t_B[1:2], is_maskable_BL[:1]), whole[1:2])


def test_masks_are_nested_over_rates_and_never_fall_on_other_positions() -> None:
    g_B = np.arange(5)
    is_maskable_BL = np.arange(200)[None] % np.arange(2, 7)[:, None] > 0
    before = np.zeros_like(is_maskable_BL)
    for t in (0.0, 0.1, 0.4, 0.8, 1.0):
        is_masked_BL = mask_at_rate(1, g_B, np.full(5, t), is_maskable_BL)
        assert np.all(before <= is_masked_BL) and np.all(is_masked_BL <= is_maskable_BL)
        before = is_masked_BL
    np.testing.assert_array_equal(before, is_maskable_BL)
    assert not mask_at_rate(1, g_B, np.zeros(5), is_maskable_BL).any()


def test_masked_share_is_the_rate() -> None:
    is_masked_BL = mask_at_rate(0, np.arange(400), np.full(400, 0.3), np.ones((400, 500), dtype=bool))
    assert abs(is_masked_BL.mean() - 0.3) < 4 * np.sqrt(0.21 / 200_000)


def test_exact_count_masks_the_smallest_uniforms() -> None:
    is_maskable_BL = np.arange(60)[None] % np.array([2, 3, 5])[:, None] > 0
    u_BL = np.stack([uniforms(8, "is_masked", (g, 1), 60) for g in range(3)])
    for count in (0, 1, 11, 30):
        is_masked_BL = mask_exact_count(8, [(g, 1) for g in range(3)], np.full(3, count), is_maskable_BL)
        for row in range(3):
            assert is_masked_BL[row].sum() == count
            chosen, others = u_BL[row][is_masked_BL[row]], u_BL[row][is_maskable_BL[row] & ~is_masked_BL[row]]
            assert count in (0, len(others) + count) or chosen.max() < others.min()
        assert not np.any(is_masked_BL & ~is_maskable_BL)
    everything = is_maskable_BL.sum(axis=1)
    np.testing.assert_array_equal(mask_exact_count(8, [(0,), (1,), (2,)], everything, is_maskable_BL), is_maskable_BL)


def test_assemble_gathers_what_is_scored() -> None:
    tokens_BL = np.arange(10, 22).reshape(3, 4)
    is_maskable_BL = np.ones((3, 4), dtype=bool)
    is_maskable_BL[2, 3] = False
    is_scored_BL = np.zeros((3, 4), dtype=bool)
    is_scored_BL[0, 1] = is_scored_BL[2, 0] = is_scored_BL[2, 2] = True
    batch = CleanBatch(tokens_BL, is_maskable_BL, np.array([5, 6, 7]), BatchPosition(5, 3))
    corrupted = assemble(
        batch,
        tokens_BL=np.where(is_scored_BL, 99, tokens_BL),
        is_scored_BL=is_scored_BL,
        weights_B=np.array([1.5, 2.0, 3.0]),
        denominator=11,
        mask_rate_B=np.array([0.2, 0.3, 0.4]),
    )
    np.testing.assert_array_equal(corrupted.positions_M, [1, 8, 10])
    np.testing.assert_array_equal(corrupted.targets_M, [11, 18, 20])
    np.testing.assert_array_equal(corrupted.weights_M, np.array([1.5, 3.0, 3.0], dtype=np.float32))
    assert corrupted.weights_M.dtype == np.float32 and corrupted.positions_M.dtype == np.int64
    assert corrupted.denominator == 11
    assert corrupted.tokens_BL[0, 1] == 99 and corrupted.tokens_BL[0, 0] == 10


def test_rows_of_a_micro_batch_get_their_share_of_the_global_strata() -> None:
    u = stratified_uniforms(2, 100, 8)
    for rows in ([100, 101], [105, 103, 107]):
        batch = CleanBatch(
            np.zeros((len(rows), 1), int), np.ones((len(rows), 1), bool), np.array(rows), BatchPosition(100, 8)
        )
        np.testing.assert_array_equal(stratified_uniforms_of_rows(2, batch), u[np.array(rows) - 100])


def test_forward_process_of_smdm_and_llada() -> None:
    case = vector("smdm_forward_process")
    inputs, expected = case["inputs"], case["expected"]
    t_B = parse_schedule(f"uniform:{inputs['eps']},1").sample(np.array(inputs["u_t"]))
    np.testing.assert_allclose(t_B, [row[0] for row in expected["p_mask"]], atol=case["tol"])
    x0_BL = np.array(inputs["x0"])
    is_masked_BL = is_below_rate(np.array(inputs["u_mask"]), t_B, np.ones_like(x0_BL, dtype=bool))
    np.testing.assert_array_equal(is_masked_BL, np.array(expected["mask"], dtype=bool))
    np.testing.assert_array_equal(np.where(is_masked_BL, inputs["mask_id"], x0_BL), expected["noisy"])


def test_masking_is_strict() -> None:
    u_BL = np.array([[0.25, 0.5, 0.75]])
    assert is_below_rate(u_BL, np.array([0.5]), np.ones((1, 3), dtype=bool)).tolist() == [[True, False, False]]


def test_mdlm_strata_are_ours_without_the_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    case = vector("mdlm_sample_t")
    inputs = case["inputs"]
    monkeypatch.setattr(corruption, "random_words", lambda *args: np.arange(args[3], dtype=np.uint64))
    monkeypatch.setattr(corruption, "uniforms", lambda *args, start: np.array(inputs["u"]))
    u_B = corruption.stratified_uniforms.__wrapped__(0, 0, inputs["n"])
    schedule = parse_schedule(f"uniform:{inputs['sampling_eps']},1")
    np.testing.assert_allclose(schedule.sample(u_B), case["expected"]["antithetic"], atol=case["tol"])
    np.testing.assert_allclose(schedule.sample(np.array(inputs["u"])), case["expected"]["plain"], atol=case["tol"])
