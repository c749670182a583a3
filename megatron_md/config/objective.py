"""What is minimised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from megatron_md.config.keys import STRICT, Doc, Fraction, PositiveInt

if TYPE_CHECKING:
    from megatron_md.config.run import Config


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised, and how the mask rate is drawn."""

    __pydantic_config__ = STRICT

    name: Annotated[str, Doc("masked_diffusion, masked_diffusion_sft, autoregressive, or one from imports")] = (
        "masked_diffusion"
    )
    mask_schedule: Annotated[
        str | dict[str, Any],
        Doc("law of the mask rate t: uniform:lo,hi | beta:a,b | point:t | a mapping for mixture, knots, curriculum"),
    ] = "uniform:0,1"
    weight: Annotated[
        Literal["elbo", "none", "realised"], Doc("weight of a row: 1/t, constant, or maskable/masked")
    ] = "elbo"
    importance: Annotated[bool, Doc("also divide by the schedule's density: unbiased full-range NELBO")] = False
    normalise: Annotated[
        Literal["maskable", "masked", "sequences"] | None,
        Doc("global count that the loss sum is divided by; null: the objective's own (maskable; sequences for SFT)"),
    ] = None
    mask_logit: Annotated[Literal["exclude", "keep"], Doc("may the mask token itself be predicted (LLaDA: keep)")] = (
        "exclude"
    )
    right_shift: Annotated[
        bool, Doc("the output at a position predicts the token to its right (Dream, starts from causal models)")
    ] = False
    attention_annealing: Annotated[
        Fraction,
        Doc("share of the run over which attention grows from causal to bidirectional, for starts from causal models"),
    ] = 0.0
    min_mask_rate: Annotated[float, Field(gt=0.0, lt=1.0, description="floor of t in training")] = 1e-3
    head_chunk: Annotated[PositiveInt, Doc("masked positions per chunk of the LM head and cross-entropy")] = 1024
    options: Annotated[dict[str, Any], Doc("keyword arguments of a third-party objective")] = field(
        default_factory=dict
    )

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each; `run.check` reads the mask schedule."""
        is_within = run.data.document_attention == "within_document"
        if self.right_shift and is_within:
            yield (
                "objective.right_shift predicts a document's first token from the document before it, which "
                "data.document_attention within_document keeps apart: set one of them back"
            )
        if not self.attention_annealing:
            return
        if run.train.may_use_transformer_engine():
            yield (
                f"objective.attention_annealing {self.attention_annealing:g}: Transformer Engine is installed, and its "
                "attention does not take hidden pairs here; uninstall it, or set objective.attention_annealing=0 or "
                "train.device=cpu"
            )
        if is_within:
            yield (
                "objective.attention_annealing hides pairs of whole rows, and data.document_attention within_document "
                "cuts them up: set one of them back"
            )
        if self.name == "autoregressive":
            yield "objective.attention_annealing: attention of autoregressive is always causal; set it to 0"
