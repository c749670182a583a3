"""Masked diffusion on a stock GPTModel, such as a trainer's own provider builds: by logits at every position.

It takes more time and memory than our `Denoiser`, whose head sees the predicted positions only; the loss is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_md.config import ResolvedConfig
from megatron_md.errors import UserError
from megatron_md.model.head import Prediction, PredictionLoss


def bidirectional(layer: ModuleSpec) -> ModuleSpec:
    """A layer spec of megatron-core (`get_gpt_layer_..._spec`) whose attention sees both sides; changed in place."""
    layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    return layer


def check_stock(model: torch.nn.Module, config: ResolvedConfig, *, causal: bool) -> None:
    """Check that a stock model computes what the config asks for.

    Raises:
        UserError: its attention looks to the other sides, or is asked for what only our own attention can do.
    """
    wanted = AttnMaskType.causal if causal else AttnMaskType.no_mask
    found = {getattr(module, "attn_mask_type", wanted) for module in model.modules() if hasattr(module, "linear_proj")}
    if found - {wanted}:
        raise UserError(
            f"attention of the model is {next(iter(found - {wanted})).name}, {config.objective.name} asks for "
            f"{wanted.name}: build its layers from megatron_md.integrations.stock.bidirectional(spec), or the model by "
            "DiffusionTask.model_provider"
        )
    for key, is_set in (
        ("data.document_attention within_document", config.data.document_attention == "within_document"),
        ("objective.attention_annealing", config.objective.attention_annealing),
    ):
        if is_set:
            raise UserError(f"{key} needs our own attention: build the model by DiffusionTask.model_provider")


class LogitsOf:
    """A model that is asked for logits where our step asks it for losses, and keeps what they would be losses of."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prediction: Prediction | None = None

    def __call__(self, *inputs: Any, labels: Prediction, **keys: Any) -> torch.Tensor:
        """Logits on the last pipeline stage, hidden states on the others."""
        self.prediction = labels
        output: torch.Tensor = self.model(*inputs, labels=None, **keys)
        return output


def loss_of_logits(
    logits_BLV: torch.Tensor, prediction: Prediction, first_token: int, never: set[int]
) -> PredictionLoss:
    """The loss of our head from a stock model's logits.

    Args:
        logits_BLV: logits of this tensor-parallel rank's part of the vocabulary [B, L, V/TP].
        prediction: where to predict what.
        first_token: where that part begins.
        never: tokens that are never predicted.
    """
    local = [token - first_token for token in sorted(never) if 0 <= token - first_token < logits_BLV.shape[-1]]
    columns = torch.tensor(local, dtype=torch.int64, device=logits_BLV.device)
    logits_MV = logits_BLV.flatten(0, 1).index_select(0, prediction.positions_M).float()
    logits_M1V = logits_MV.index_fill(1, columns, float("-inf"))[:, None]
    nll_M = vocab_parallel_cross_entropy(logits_M1V, prediction.targets_M[:, None])[:, 0]
    return PredictionLoss(torch.dot(prediction.weights_M, nll_M), nll_M.detach())
