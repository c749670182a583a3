"""A stock GPTModel of megatron-core under our objective: the same numbers as our own model, from logits everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.config import Config
from megatron_md.errors import UserError
from megatron_md.parallel import World
from tests.integrations.foreign_loop import LAYOUTS, STEPS, assert_same, foreign_loop, small, start
from tests.ranks import run_ranks
from tests.small_run import LENGTH


def stock_model(task: Any, vp_stage: int | None) -> Any:
    """A GPTModel of megatron-core's own parts, with the weights that ours begins with."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_md.integrations.stock import bidirectional

    ours = task.model_provider(vp_stage=vp_stage)
    theirs = GPTModel(
        config=task.transformer,
        transformer_layer_spec=bidirectional(get_gpt_layer_local_spec(normalization="RMSNorm")),
        vocab_size=ours.vocab_size,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=task.config.model.tied,
        position_embedding_type="rope",
        rotary_base=task.config.model.rope_theta,
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)
    assert {name for name, _ in theirs.named_parameters()} == {name for name, _ in ours.named_parameters()}
    return theirs


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["one", "tensor2", pytest.param("pipeline2", marks=pytest.mark.slow)])
def test_a_stock_model_learns_the_same(
    name: str, bigrams: dict[str, str], ours: list[dict[str, Any]], tmp_path: Path
) -> None:
    size, layout = LAYOUTS[name]
    config = small(tmp_path, bigrams, parallel={"distributed_optimizer": False, "vocab_multiple": 64, **layout})
    assert_same(run_ranks(foreign_loop, size, config, STEPS, False, stock_model), ours, first=1e-5)


def test_the_loss_is_that_of_our_head(world: World) -> None:
    from megatron_md.integrations.stock import loss_of_logits
    from megatron_md.model.head import Prediction, masked_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(12, 8, generator=generator, requires_grad=True)
    weight_VH = torch.randn(20, 8, generator=generator)
    prediction = Prediction(torch.tensor([1, 4, 11]), torch.tensor([5, 0, 19]), torch.tensor([1.0, 0.5, 2.0]))
    never = {3, 25}
    losses, gradients = [], []
    for is_stock in (True, False):
        if is_stock:
            found = loss_of_logits((hidden_NH @ weight_VH.t()).view(2, 6, 20), prediction, 0, never)
        else:
            hidden_MH = hidden_NH.index_select(0, prediction.positions_M)
            found = masked_cross_entropy(
                hidden_MH, weight_VH, prediction, first_token=0, excluded=torch.tensor([3]), chunk=2
            )
        losses.append(found.nll_M.numpy())
        gradients.append(torch.autograd.grad(found.loss, hidden_NH)[0].numpy())
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def causal_refusal(config: Config) -> str:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_md.integrations.bridge import DiffusionTask
    from megatron_md.parallel import shutdown

    start(config)
    task = DiffusionTask(config)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(task.transformer, spec, vocab_size=256, max_sequence_length=LENGTH)
    with pytest.raises(UserError) as error:
        task.forward_step(task.data_iterator(), model)
    shutdown()
    return str(error.value)


@pytest.mark.distributed
def test_a_causal_stock_model_is_refused(bigrams: dict[str, str], tmp_path: Path) -> None:
    (said,) = run_ranks(causal_refusal, 1, small(tmp_path, bigrams))
    assert "attention of the model is causal, masked_diffusion asks for no_mask" in said


@pytest.mark.parametrize(
    "keys", [{"data": {"document_attention": "within_document"}}, {"objective": {"attention_annealing": 64}}], ids=str
)
def test_what_only_our_attention_can_do_is_refused(keys: dict[str, Any]) -> None:
    from megatron_md.integrations.stock import check_stock
    from tests.small_run import variant

    with pytest.raises(UserError, match="needs our own attention"):
        check_stock(torch.nn.Linear(1, 1), variant(**keys), causal=False)
