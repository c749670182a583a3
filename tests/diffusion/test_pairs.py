"""Rows in pairs: exact laws and masks, unbiased losses that vary less, the same on every layout and after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from megatron_md.batch import BatchPosition, CleanBatch, DamagedDocument, Int64Array, Rows
from megatron_md.config import CorpusConfig, DataConfig, ObjectiveConfig
from megatron_md.config.loader import ConfigError
from megatron_md.config.training import BatchRampConfig
from megatron_md.data.mixture import open_stream
from megatron_md.data.repeated import RepeatedRows
from megatron_md.data.shards import load_manifest
from megatron_md.diffusion.objective import Autoregressive, build_objective, register_objective
from megatron_md.diffusion.pairs import Mirrored, draw_rates, law_of_rates
from megatron_md.diffusion.schedule import parse_schedule
from megatron_md.errors import UserError
from megatron_md.run.check import check_config
from tests.diffusion.test_objective import MASK, build, loss_of_uniform_model, rows, split
from tests.ranks import run_ranks
from tests.train.test_trainer import config_for, corpora, metrics, pretrain, pretrain_and_die_after, without_times

__all__ = ["corpora"]  # the fixture

FLOOR = 1e-3
DAMAGED = DamagedDocument("corpus", "shard", 3, 7)
Paired = Literal["antithetic", "complementary"]
SCHEDULES = ["uniform:0,1", "uniform:0.1,0.4", "beta:2,5", "point:0.3"]


@pytest.mark.parametrize(("first", "count"), [(24, 7), (7, 8)])
def test_a_foreign_loops_odd_batches_are_refused(first: int, count: int) -> None:
    with pytest.raises(UserError, match=rf"complementary needs an even number of rows .* got {count}, row {first} on"):
        draw_rates(11, rows(first, count), parse_schedule("uniform:0,1"), "complementary", FLOOR)


@pytest.mark.parametrize("spec", SCHEDULES)
def test_antithetic_rates_are_mirrored_and_each_half_is_stratified(spec: str) -> None:
    batch, schedule = rows(24, 12), parse_schedule(spec)
    rate = draw_rates(11, batch, schedule, "antithetic", FLOOR)
    if spec == "point:0.3":
        assert np.all(rate == 0.3)
        return
    u = schedule.cdf(rate)
    assert np.allclose(u[::2] + u[1::2], 1.0)
    for half in (u[::2], u[1::2]):
        assert sorted((half * 6).astype(int)) == list(range(6)), "one in each stratum"
    if spec == "uniform:0,1":
        assert rate.mean() == pytest.approx(0.5, abs=1e-12), "the mean of a batch has no noise at all"


@pytest.mark.parametrize("spec", SCHEDULES)
def test_complementary_masks_divide_the_row(spec: str) -> None:
    clean = rows(24, 12)
    again = clean.tokens_BL[np.arange(12) // 2 * 2], clean.is_maskable_BL[np.arange(12) // 2 * 2]
    batch = CleanBatch(*again, clean.sample_index_B, clean.position)
    corrupted = build(mask_schedule=spec, pairs="complementary", weight="none").corrupt(batch)
    is_masked = corrupted.tokens_BL == MASK
    assert np.array_equal(is_masked[::2] ^ is_masked[1::2], batch.is_maskable_BL[::2])
    assert not (is_masked[::2] & is_masked[1::2]).any()
    assert len(corrupted.targets_M) == batch.is_maskable_BL.sum() // 2, "every token is predicted once a pair"
    assert np.allclose(corrupted.mask_rate_B[::2] + corrupted.mask_rate_B[1::2], 1.0)
    nested = build(mask_schedule="uniform:0.95,1", pairs="complementary").corrupt(batch).tokens_BL == MASK
    assert (nested[::2] >= is_masked[::2]).all(), "masks are nested across schedules"


@pytest.mark.parametrize("pairs", ["antithetic", "complementary"])
@pytest.mark.parametrize("weight", ["elbo", "none", "realised"])
@pytest.mark.parametrize("normalise", ["maskable", "masked", "sequences"])
def test_a_uniform_model_has_log_v_on_average(pairs: Paired, weight: Any, normalise: Any) -> None:
    keys = {"mask_schedule": "uniform:0.1,0.7", "weight": weight, "normalise": normalise}
    objective = build(pairs=pairs, **keys)
    losses = [loss_of_uniform_model([objective.corrupt(rows(64 * number, 64))]) for number in range(60)]
    assert np.mean(losses) == pytest.approx(np.log(97), rel=0.01)


@pytest.mark.parametrize("spec", ["uniform:0,1", "uniform:0.2,0.5"])
def test_losses_are_unbiased_and_complements_vary_less(spec: str) -> None:
    """A model whose cross-entropy is k at each of k masked tokens, in closed form.

    Of n = 4 tokens, k are masked at rate t with the binomial chance B(k; 4, t), so that a row's expected loss is
    E_t[sum_k k^2 B(k; 4, t) / t] = E_t[4 (1 + 3 t)]: E k^2 = n t (1 - t) + n^2 t^2.
    """
    count, n = 20_000, 4
    found = {}
    for pairs in ("none", "antithetic", "complementary"):
        config = ObjectiveConfig(mask_schedule=spec, pairs=pairs, min_mask_rate=1e-9)
        objective = build_objective(config, seed=3, mask_token_id=MASK)
        clean = CleanBatch(
            np.zeros((count, n), dtype=np.int64), np.ones((count, n), dtype=bool), np.arange(count),
            BatchPosition(0, count, 0.0),
        )  # fmt: skip
        corrupted = objective.corrupt(clean)
        row = corrupted.positions_M // n
        cost = np.bincount(row, minlength=count)[row] * corrupted.weights_M
        by_pair = np.bincount(row // 2, cost, minlength=count // 2) / 2
        expected = 4 * (1 + 3 * law_of_rates(config).mean())
        assert by_pair.mean() == pytest.approx(expected, abs=4 * by_pair.std() / np.sqrt(count // 2)), pairs
        found[pairs] = by_pair.std()
    assert found["antithetic"] < found["none"], "which is stratified over all rows, but not within a pair"
    if spec == "uniform:0.2,0.5":
        assert found["complementary"] < found["none"]


@pytest.mark.parametrize("spec", ["uniform:0.1,0.4", "beta:2,5", "uniform:0,1"])
def test_the_mirrored_law(spec: str) -> None:
    law = Mirrored(parse_schedule(spec))
    t = (np.arange(20_000) + 0.5) / 20_000
    assert law.density(t).mean() == pytest.approx(1.0, rel=1e-3) and law.mean() == 0.5
    assert law.expectation(lambda x: x**2) == pytest.approx(float((law.density(t) * t**2).mean()), rel=1e-3)
    assert np.allclose(law.density(t), law.density(1.0 - t))
    u = np.linspace(0.01, 0.99, 45)
    assert np.allclose(law.cdf(law.inverse_cdf(u)), u, atol=1e-9)


@pytest.mark.parametrize("pairs", ["antithetic", "complementary"])
def test_corruption_does_not_depend_on_the_layout(pairs: Paired) -> None:
    objective, batch = build(pairs=pairs), rows(64, 8)
    whole = objective.corrupt(batch)
    for order in ([[r] for r in range(8)], [[7, 2, 5, 0], [1, 3, 4, 6]]):
        for chosen, part in zip(order, map(objective.corrupt, split(batch, order)), strict=True):
            np.testing.assert_array_equal(part.tokens_BL, whole.tokens_BL[chosen])
            np.testing.assert_array_equal(part.mask_rate_B, whole.mask_rate_B[chosen])


class Counted:
    """Row g holds the number g, and is as long."""

    is_ragged = False

    def rows(self, sample_index: Any) -> Rows:
        tokens_BL = np.asarray(sample_index)[:, None]
        return Rows(tokens_BL, np.ones_like(tokens_BL, dtype=bool), np.asarray(sample_index))

    def row_lengths(self, sample_index: Any) -> Int64Array:
        return np.asarray(sample_index)

    def state(self, rows: int) -> dict[str, Any]:
        return {"seen": rows}

    def quarantine(self, documents: Any) -> None:
        self.left_out = list(documents)


def test_rows_are_repeated() -> None:
    inner = Counted()
    stream = RepeatedRows(inner, 2)
    served = stream.rows([0, 1, 2, 7])
    assert served.tokens_BL[:, 0].tolist() == stream.row_lengths(np.array([0, 1, 2, 7])).tolist() == [0, 0, 1, 3]
    assert served.sample_index_B.tolist() == [0, 1, 2, 7], "their masks are their own"
    assert stream.state(7) == {"seen": 4} and not stream.is_ragged
    stream.quarantine([DAMAGED])
    assert inner.left_out == [DAMAGED]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"global_batch_size": 9, "micro_batch_size": 1}},
            "even number of rows .* train.global_batch_size is 9",
        ),
        ({"train": {"batch_ramp": BatchRampConfig(1, 1, 4)}}, "train.batch_ramp.start is 1"),
        ({"objective": {"name": "autoregressive"}}, "objective.pairs complementary: autoregressive masks nothing"),
        (
            {"objective": {"pairs": "antithetic", "mask_schedule": "point:0.3"}},
            "objective.pairs antithetic mirrors the mask rate, which point:0.3 does not vary",
        ),
        ({"objective": {"min_mask_rate": 0.5}}, "objective.min_mask_rate 0.5: .* set it below 0.5"),
    ],
)
def test_what_cannot_be_paired_is_refused(
    sections: dict[str, Any], message: str, tmp_path: Path, corpora: dict[str, str]
) -> None:
    sections = {**sections, "objective": {"pairs": "complementary", **sections.get("objective", {})}}
    with pytest.raises(ConfigError, match=message):
        check_config(config_for(tmp_path / "run", corpora, **sections), 1)


def test_weights_of_a_mixture_change_at_their_row_of_the_run(corpora: dict[str, str]) -> None:
    mixed = [CorpusConfig(corpora["train"], [[0, 1.0], [8, 0.0]]), CorpusConfig(corpora["valid"], [[0, 0.0], [8, 1.0]])]
    config = DataConfig(train=mixed, seq_length=32)
    manifests = [load_manifest(corpus.manifest) for corpus in mixed]
    once = open_stream(config, manifests, seed=1).rows(range(16)).tokens_BL
    twice = open_stream(config, manifests, seed=1, rows_per_text=2).rows(range(16)).tokens_BL
    assert np.array_equal(twice[:8:2], once[:4]) and np.array_equal(twice[8::2], once[8:12])


def test_an_objective_that_knows_no_pairs_is_refused() -> None:
    register_objective("knows no pairs")(lambda context: Autoregressive(context))
    with pytest.raises(UserError, match=r"objective.pairs antithetic: 'knows no pairs' does not draw rows in pairs"):
        build(name="knows no pairs", pairs="antithetic")


@pytest.mark.distributed
def test_complements_are_the_same_on_two_ranks_and_after_a_stop(tmp_path: Path, corpora: dict[str, str]) -> None:
    keys = {"objective": {"pairs": "complementary"}, "checkpoint": {"every_steps": 3}}
    whole = config_for(tmp_path / "whole", corpora, **keys)
    assert run_ranks(pretrain, 1, whole) == [0]
    wanted = metrics(tmp_path / "whole")
    assert [record["mean_mask_rate"] for record in wanted] == pytest.approx([0.5] * 8, abs=1e-7)
    halves = config_for(tmp_path / "halves", corpora, **keys, train={"micro_batch_size": 2})
    assert run_ranks(pretrain, 2, halves) == [0, 0]
    for one, two in zip(wanted, metrics(tmp_path / "halves"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]
    stopped = config_for(tmp_path / "stopped", corpora, **keys)
    run_ranks(pretrain_and_die_after, 1, stopped, 4, timeout=60)
    run_ranks(pretrain, 1, stopped)
    assert without_times(metrics(tmp_path / "stopped")) == without_times(wanted)
    refused = config_for(tmp_path / "stopped", corpora, objective={"pairs": "none"}, train={"steps": 9})
    with pytest.raises(Exception, match=r"objective.pairs: complementary there, None now"):
        run_ranks(pretrain, 1, refused)
