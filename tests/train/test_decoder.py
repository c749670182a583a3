"""Decoding with kept keys and values: exact where it says so, and what the model was trained for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.config import Config
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.errors import UserError
from tests.ranks import run_ranks
from tests.small_run import LENGTH, MASK, VOCAB, small_run, variant

EOS, SIZE = 0, 8
BLOCKS = variant(objective={"name": "block_diffusion", "block_size": SIZE})
JOINT = variant(BLOCKS, objective={"autoregressive_weight": 1.0})


def of_training(config: Config) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Losses of a micro-batch: in training's rows of two halves, and block by block with and without kept keys."""
    from megatron_md.train.decoder import Decoder

    with small_run(config) as run:
        run.train(0, 2)
        clean = run.batches(2)[0]
        (corrupted,) = run.stepper.corrupt([clean])
        length = clean.tokens_BL.shape[1]
        losses = run.inference.negative_log_likelihoods([corrupted])
        nll_M = losses[0] if losses else np.full(len(corrupted.positions_M), np.nan)  # the last pipeline stage has them
        row_M, column_M = np.divmod(corrupted.positions_M, 2 * length)
        is_noisy_M = column_M < length
        found = [nll_M[is_noisy_M]]
        for cache in ("auto", "none"):
            decoder, table = Decoder(run.inference, cache), np.zeros((len(clean.tokens_BL), length))
            for start in range(0, length, SIZE):
                block = slice(start, start + SIZE)
                canvas = clean.tokens_BL.copy()
                canvas[:, block] = corrupted.tokens_BL[:, block]
                canvas[:, start + SIZE :] = MASK
                logits = decoder.of_block(torch.from_numpy(canvas), block)
                targets = torch.from_numpy(clean.tokens_BL[:, block])
                table[:, block] = -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
            found.append(table[row_M[is_noisy_M], column_M[is_noisy_M]])
        return tuple(found)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, {}), (2, {"tensor": 2, "sequence_parallel": True}), (2, {"pipeline": 2}), (2, {"context": 2})],
    ids=str,
)
@pytest.mark.parametrize("config", [BLOCKS, JOINT], ids=["blocks", "joint"])
def test_blocks_are_decoded_as_they_were_trained(config: Config, size: int, layout: dict[str, Any]) -> None:
    for trained, kept, anew in run_ranks(of_training, size, variant(config, parallel=layout)):
        assert len(trained) > 20
        if np.isnan(trained).all():
            trained = anew
        np.testing.assert_allclose(kept, trained, rtol=1e-5)
        np.testing.assert_allclose(anew, trained, rtol=1e-5)


def chain_rule(config: Config) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Per row: the exact NELBO of a model in blocks of one token, and minus the log-likelihood, token by token."""
    from megatron_md.diffusion.estimators import Estimator
    from megatron_md.diffusion.nelbo import evaluate_nelbo
    from megatron_md.diffusion.scoring import ScoredRows
    from megatron_md.train.decoder import Decoder

    with small_run(config) as run:
        run.train(0, 2)
        tokens = np.random.default_rng(0).integers(4, VOCAB, (4, LENGTH))
        rows = ScoredRows(tokens, np.ones_like(tokens, dtype=bool))
        table = evaluate_nelbo(run.inference, rows, Estimator("exact", block_size=1), mask_token_id=MASK)
        decoder, total = Decoder(run.inference, "auto"), np.zeros(4)
        for at in range(LENGTH):
            canvas = torch.from_numpy(np.where(np.arange(LENGTH) < at, tokens, MASK))
            logits = decoder.of_block(canvas, slice(at, at + 1))
            total -= logits.log_softmax(-1)[np.arange(4), 0, tokens[:, at]].numpy()
        return table.values_PR()[0], total / LENGTH


@pytest.mark.distributed
def test_blocks_of_one_token_have_the_autoregressive_likelihood() -> None:
    ((nelbo, exact),) = run_ranks(chain_rule, 1, variant(objective={"name": "block_diffusion", "block_size": 1}))
    np.testing.assert_allclose(nelbo, exact, rtol=1e-6)


def of_answers(config: Config) -> dict[str, list[tuple[float, float]]]:
    """Log-likelihoods of answers by method: and, by hand, token by token and of each answer's only block."""
    from megatron_md.diffusion.conditional import ConditionalEstimator
    from megatron_md.evaluate.conditional import Question, conditional_log_likelihoods
    from megatron_md.train.decoder import Decoder

    with small_run(config) as run:
        run.train(0, 2)
        text = np.random.default_rng(0).integers(4, VOCAB, LENGTH)
        prompt, answers = text[:5].tolist(), [text[5:19].tolist(), text[5:8].tolist()]
        found: dict[str, list[tuple[float, float]]] = {}
        for method in ("left_to_right", "monte_carlo"):
            estimator = ConditionalEstimator(method, draws=512, minibatch=32)
            ((*scored,),) = conditional_log_likelihoods(
                run.inference, [Question(prompt, answers)], estimator, mask_token_id=MASK, max_length=LENGTH
            )
            found[method] = [(answer.log_likelihood, answer.stderr) for answer in scored]
        totals = []
        for answer in answers:
            decoder, total = Decoder(run.inference, "none"), 0.0
            whole = torch.tensor([[*prompt, *answer]])
            for at in range(5, whole.shape[1]):
                canvas = torch.where(torch.arange(whole.shape[1]) < at, whole, MASK)
                begin = at // SIZE * SIZE
                logits = decoder.of_block(canvas, slice(begin, min(begin + SIZE, whole.shape[1])))
                total += float(logits.log_softmax(-1)[0, at - begin, whole[0, at]])
            totals.append((total, 0.0))
        return {**found, "by hand": totals}


@pytest.mark.distributed
def test_answers_have_the_likelihood_of_their_blocks() -> None:
    (found,) = run_ranks(of_answers, 1, BLOCKS)
    np.testing.assert_allclose(found["left_to_right"], found["by hand"], rtol=1e-5)
    for (bound, error), (likelihood, _) in zip(found["monte_carlo"], found["by hand"], strict=True):
        # After two steps the conditionals hardly depend on what is masked, so that the bound is almost tight.
        assert abs(bound - likelihood) < 4 * error + 0.05 and 0 < error < 0.5


PROMPTS = [[5, 6, 7], list(range(10, 21)), [], [9] * 8]
HOW = SamplerConfig(length=13, strategy="random", temperature=1.0)


def texts(config: Config, prompts: list[list[int]], how: SamplerConfig) -> tuple[list[list[int]], int, int]:
    """Texts of prompts, forward passes, and tokens that went through the model."""
    from unittest import mock

    from megatron_md.train import filling

    made: list[Any] = []
    with small_run(config) as run, mock.patch.object(filling, "Decoder", wraps=filling.Decoder) as decoder:
        decoder.side_effect = lambda *args: made.append(filling_decoder(*args)) or made[-1]
        run.train(0, 2)
        found = filling.fill(
            run.inference, prompts, how, mask_token_id=MASK, eos_token_id=EOS, seeds=[3 + len(p) for p in prompts]
        )
        return found.tokens_BL.tolist(), found.forward_passes, made[0].tokens_computed


def filling_decoder(*args: Any) -> Any:
    from megatron_md.train.decoder import Decoder

    return Decoder(*args)


@pytest.mark.distributed
def test_a_text_depends_neither_on_what_is_kept_nor_on_its_batch_nor_on_the_layout() -> None:
    ((together, passes, computed),) = run_ranks(texts, 1, BLOCKS, PROMPTS, HOW)
    assert all(row[-13 - len(prompt) : -13] == prompt for row, prompt in zip(together, PROMPTS, strict=True) if prompt)
    assert all(MASK not in row for row in together)
    ((anew, passes_anew, computed_anew),) = run_ranks(texts, 1, BLOCKS, PROMPTS, replace(HOW, cache="none"))
    assert (anew, passes_anew) == (together, passes)
    assert computed < computed_anew / 1.5
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert run_ranks(texts, 1, BLOCKS, [prompt], HOW)[0][0][0] == row[-13 - len(prompt) :]
    for size, layout in ((2, {"tensor": 2, "sequence_parallel": True}), (2, {"pipeline": 2, "virtual_pipeline": 2})):
        for found, *_ in run_ranks(texts, size, variant(BLOCKS, parallel=layout), PROMPTS, HOW):
            assert found == together


@pytest.mark.distributed
def test_steps_are_shared_by_the_blocks_and_none_is_made_for_what_follows_an_end() -> None:
    fewer = replace(HOW, length=16, steps=4)
    ((_, passes, _),) = run_ranks(texts, 1, BLOCKS, [[]], fewer)
    assert passes == 4, "two blocks of two steps each"
    ((_, passes, _),) = run_ranks(texts, 1, BLOCKS, [[1] * 4], fewer)
    assert passes == 6, "three blocks, the last of which is written to its end"


def approximate(config: Config) -> dict[str, tuple[list[list[int]], int]]:
    """Texts of a denoiser that sees whole rows, by what is kept: and how many tokens went through it."""
    from megatron_md.diffusion.sampler import sample
    from megatron_md.train.decoder import Decoder

    found = {}
    with small_run(config) as run:
        run.train(0, 2)
        prompt = torch.from_numpy(np.random.default_rng(0).integers(4, VOCAB, (2, 8)))
        for name, cache, steps in (
            ("none", "none", 24), ("prefix", "prefix", 24), ("dual", "dual", 24),
            ("none, a step a block", "none", 3), ("dual, a step a block", "dual", 3),
        ):  # fmt: skip
            decoder = Decoder(run.inference, cache)
            text = sample(decoder, prompt, SamplerConfig(24, steps, 8), mask_token_id=MASK)
            found[name] = (text.tokens_BL.tolist(), decoder.tokens_computed)
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_whole_rows_are_kept_from_the_beginning_of_a_block() -> None:
    (alone,) = run_ranks(approximate, 1, variant())
    # 2 rows of 32: every step; or, of each block's 8 steps, one of all and 7 of what follows or of the block.
    assert alone["none"][1] == 2 * 32 * 24
    assert alone["prefix"][1] == 2 * (3 * 32 + 7 * (24 + 16 + 8))
    assert alone["dual"][1] == 2 * (3 * 32 + 7 * 3 * 8)
    assert alone["dual, a step a block"][0] == alone["none, a step a block"][0], "what is fresh is exact"
    for size, layout in ((2, {"tensor": 2}), (2, {"pipeline": 2})):
        for found in run_ranks(approximate, size, variant(parallel=layout)):
            assert found == alone


def last_logits(config: Config) -> list[torch.Tensor]:
    """Logits of a block whose surroundings have not changed since they were kept: with `prefix`, `dual`, and anew."""
    from megatron_md.train.decoder import Decoder

    with small_run(config) as run:
        canvas, block = torch.from_numpy(np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH))), slice(8, 16)
        found = []
        for cache in ("none", "prefix", "dual"):
            decoder = Decoder(run.inference, cache)
            decoder.of_block(canvas, block)
            found.append(decoder.of_block(canvas, block))
        return found


@pytest.mark.distributed
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_what_was_kept_is_what_was_seen(position: str) -> None:
    ((anew, prefix, dual),) = run_ranks(last_logits, 1, variant(model={"position": position}))
    torch.testing.assert_close(prefix, anew, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dual, anew, rtol=1e-4, atol=1e-5)


def refused(config: Config, how: SamplerConfig) -> str:
    from megatron_md.train.filling import fill

    with small_run(config) as run:
        try:
            fill(run.inference, [[5]], how, mask_token_id=MASK, eos_token_id=EOS)
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "how", "words"),
    [
        (BLOCKS, replace(HOW, length=12, block=4), "block 4: the model's own blocks are of 8 tokens; leave block out"),
        (BLOCKS, replace(HOW, guidance=1.0), "guidance needs logits without the prompt"),
        (BLOCKS, replace(HOW, cache="dual"), "cache dual: a block model keeps all exactly"),
        (BLOCKS, replace(HOW, length=32), "exceed the model's 32 positions"),
        (variant(objective={"name": "autoregressive"}), replace(HOW, cache="prefix"), "cache prefix is for denoisers"),
        (variant(objective={"right_shift": True}), replace(HOW, cache="prefix"), "cache prefix is for denoisers"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_refused_in_a_line(config: Config, how: SamplerConfig, words: str) -> None:
    (message,) = run_ranks(refused, 1, config, how)
    assert words in message and "\n" not in message
