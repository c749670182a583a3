"""A converted causal model of Hugging Face scores what `transformers` scores, and writes what it writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_md.cli import main
from tests.checkpoint.hf_models import shape_of, write_model
from tests.ranks import run_ranks

TOKENS = [7, 11, 2, 40, 9, 30, 30, 12]


def scored(folder: Path) -> None:
    """On a rank: log p of an answer and of a document, and greedy text."""
    from megatron_md import parallel
    from megatron_md.checkpoint.hf.families import FAMILIES
    from megatron_md.checkpoint.hf.folder import HuggingFaceFolder
    from megatron_md.checkpoint.hf.verify import reference_logits, reference_model
    from megatron_md.diffusion.conditional import ConditionalEstimator
    from megatron_md.diffusion.sampler import SamplerConfig
    from megatron_md.evaluate.conditional import Question, conditional_log_likelihoods, document_log_likelihoods
    from megatron_md.evaluate.load import load_model
    from megatron_md.run.saved import Placement, open_run
    from megatron_md.train.filling import fill

    def expected(tokens: list[int], first: int) -> float:
        with HuggingFaceFolder(folder / "hf") as hf:
            row = torch.tensor([tokens])
            logits = reference_logits(reference_model(hf, FAMILIES["qwen2"], torch.float32), row, causal=True)
        logp_LV = logits[0].log_softmax(dim=-1)
        return sum(float(logp_LV[at - 1, tokens[at]]) for at in range(first, len(tokens)))

    saved = open_run(folder / "run", Placement(device="cpu"))
    words: Any = SimpleNamespace(mask_token_id=5)
    with parallel.session(saved.config) as world:
        scorer = load_model(saved, world, words)
        estimator = ConditionalEstimator("autoregressive")
        ((answer,),) = conditional_log_likelihoods(
            scorer, [Question(TOKENS[:3], [TOKENS[3:]])], estimator, mask_token_id=5
        )
        assert answer.log_likelihood == pytest.approx(expected(TOKENS, 3), rel=1e-5)
        # An <eos> goes before each window, of at most 4 positions.
        (document,) = document_log_likelihoods(
            scorer, [TOKENS], estimator, mask_token_id=5, eos_token_id=2, max_length=4
        )
        parts = [[2, *TOKENS[:3]], [2, *TOKENS[3:6]], [2, *TOKENS[6:]]]
        assert document.log_likelihood == pytest.approx(sum(expected(part, 1) for part in parts), rel=1e-5)
        with pytest.raises(ValueError, match="nothing predicts the first one without a prompt"):
            conditional_log_likelihoods(scorer, [Question([], [[7]])], estimator, mask_token_id=5)
        written = fill(scorer, [TOKENS[:3]], SamplerConfig(length=4, steps=2), mask_token_id=5, eos_token_id=2)
        with HuggingFaceFolder(folder / "hf") as hf:
            row, network = torch.tensor([TOKENS[:3]]), reference_model(hf, FAMILIES["qwen2"], torch.float32)
            for _ in range(4):
                logits = reference_logits(network, row, causal=True)
                logits[..., 5] = -torch.inf  # the mask token is never written
                row = torch.cat([row, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
        assert written.tokens_BL.tolist() == row.tolist() and written.forward_passes == 4


@pytest.mark.slow
@pytest.mark.distributed
def test_a_converted_causal_model_scores_and_writes_as_transformers_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_model(tmp_path / "hf", "qwen2", shape_of("qwen2"))
    words = ["convert", str(tmp_path / "hf"), str(tmp_path / "run"), "--family", "qwen2", "--to", "megatron"]
    assert main(words) == 0
    (tmp_path / "run" / "tokenizer.model").touch()
    run_ranks(scored, 1, tmp_path)
