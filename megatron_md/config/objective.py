"""What is minimised: the section `objective` of a run's config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from megatron_md.config.schema import STRICT, Doc, Fraction, PositiveInt

if TYPE_CHECKING:
    from megatron_md.config import Config


@dataclass(frozen=True)
class BlockStage:
    """A block size that holds for a part of the run."""

    __pydantic_config__ = STRICT

    size: Annotated[
        PositiveInt, Doc("tokens of a block; data.seq_length: no blocks, but masked diffusion of whole rows")
    ]
    until: Annotated[Fraction, Doc("share of the run's tokens at which the next stage begins; 1 in the last one")] = 1.0


@dataclass(frozen=True)
class MaskNoiseConfig:
    """Gaussian noise on the embeddings of masked tokens as training starts."""

    __pydantic_config__ = STRICT

    std: Annotated[PositiveFloat, Doc("standard deviation of each element at the start; it falls to 0 in a line")]
    until: Annotated[Fraction, Doc("share of the run's tokens after which there is none")]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised, and how the mask rate is drawn."""

    __pydantic_config__ = STRICT

    name: Annotated[
        str, Doc("masked_diffusion, masked_diffusion_sft, block_diffusion, autoregressive, or one from imports")
    ] = "masked_diffusion"
    mask_schedule: Annotated[
        str | dict[str, Any],
        Doc(
            "law of the mask rate t: uniform:lo,hi | beta:a,b | truncated_normal:mode,std | "
            "logit_normal:location,scale | point:t | a preset's name | a mapping for mixture, knots, curriculum, anneal"
        ),
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
    pairs: Annotated[
        Literal["none", "antithetic", "complementary"],
        Doc(
            "rows 2k and 2k+1 of a global batch: antithetic: at mirrored rates; complementary: one text twice, masked "
            "where the other is not"
        ),
    ] = "none"
    block_size: Annotated[
        PositiveInt | list[BlockStage] | None,
        Doc(
            "tokens of a block under block_diffusion, a divisor of data.seq_length; or stages, each with a size and "
            "the share of the run that it lasts until: the last one's is the model's"
        ),
    ] = None
    autoregressive_weight: Annotated[
        float,
        Field(
            ge=0.0,
            le=1e6,
            description="under block_diffusion, weight of the clean half's own next-token loss, beside 1 of the "
            "diffusion's; the clean half is causal then",
        ),
    ] = 0.0
    token_rate: Annotated[
        dict[str, Any] | None,
        Doc(
            "tokens of a row are masked at rates of their own: {name: position, strength: 1}, {name: frequency, "
            "strength: 1, counts: FILE}, or one from imports; null: all at the row's rate"
        ),
    ] = None
    right_shift: Annotated[
        bool, Doc("the output at a position predicts the token to its right (Dream, starts from causal models)")
    ] = False
    attention_annealing: Annotated[
        Fraction,
        Doc("share of the run over which attention grows from causal to bidirectional, for starts from causal models"),
    ] = 0.0
    mask_noise: Annotated[
        MaskNoiseConfig | None,
        Doc("noise on masked embeddings, for starts from models without a mask token; null: none"),
    ] = None
    min_mask_rate: Annotated[float, Field(gt=0.0, lt=1.0, description="floor of t in training")] = 1e-3
    head_chunk: Annotated[PositiveInt, Doc("masked positions per chunk of the LM head and cross-entropy")] = 1024
    options: Annotated[dict[str, Any], Doc("keyword arguments of a third-party objective")] = field(
        default_factory=dict
    )

    @property
    def block_stages(self) -> list[BlockStage]:
        """The block sizes over the run, in order; empty where there are no blocks."""
        if isinstance(self.block_size, int):
            return [BlockStage(self.block_size)]
        return self.block_size or []

    @property
    def final_block_size(self) -> int | None:
        """The block size that the model is for; None: no blocks."""
        return self.block_stages[-1].size if self.block_stages else None

    @property
    def rows_per_text(self) -> int:
        """Rows in a row that show the same text."""
        return 2 if self.pairs == "complementary" else 1

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each; `run.check` reads the mask schedule."""
        yield from self._problems_of_pairs(run)
        yield from self._problems_of_token_rate()
        yield from self._problems_of_blocks(run)
        if self.mask_noise is not None and self.name == "autoregressive":
            yield "objective.mask_noise: autoregressive masks nothing; set null"
        is_within = run.data.document_attention == "within_document"
        if self.right_shift and is_within:
            yield (
                "objective.right_shift predicts a document's first token from the document before it, which "
                "data.document_attention within_document keeps apart: set one of them back"
            )
        if not self.attention_annealing:
            return
        if is_within:
            yield (
                "objective.attention_annealing hides pairs of whole rows, and data.document_attention within_document "
                "cuts them up: set one of them back"
            )
        if self.name == "autoregressive":
            yield "objective.attention_annealing: attention of autoregressive is always causal; set it to 0"

    def _problems_of_blocks(self, run: Config) -> Iterator[str]:
        length, stages = run.data.seq_length, self.block_stages
        if self.name != "block_diffusion":
            if self.block_size is not None or self.autoregressive_weight:
                yield f"objective.block_size and autoregressive_weight are of block_diffusion, and name is {self.name}"
            return
        if not stages:
            yield "objective.name block_diffusion needs objective.block_size, such as 32"
        for stage in stages:
            if length % stage.size:
                yield f"objective.block_size {stage.size} does not divide data.seq_length {length}; change one of them"
        ends = [0.0, *(stage.until for stage in stages)]
        if stages and (ends[-1] != 1.0 or any(last >= end for last, end in pairwise(ends))):
            yield f"objective.block_size: its stages end at {ends[1:]}; let `until` grow, to 1 in the last one"
        if self.right_shift or self.attention_annealing or self.token_rate is not None or self.pairs != "none":
            yield (
                "objective.name block_diffusion does not go with right_shift, attention_annealing, token_rate or "
                "pairs: set them back"
            )
        if self.autoregressive_weight and self.normalise == "masked":
            yield "objective.normalise masked does not count what autoregressive_weight weighs: set maskable or null"
        if run.data.random_length_fraction:
            yield "data.random_length_fraction cuts rows within blocks: set it to 0 under block_diffusion"

    def _problems_of_token_rate(self) -> Iterator[str]:
        if self.token_rate is None:
            return
        if self.name == "autoregressive" or self.pairs == "complementary" or self.importance:
            yield (
                "objective.token_rate does not go with name autoregressive (which masks nothing), pairs complementary "
                "or importance (which know the row's rate only): set one of them back"
            )
        if (self.weight, self.normalise == "masked") not in (("elbo", False), ("none", True)):
            yield (
                f"objective.token_rate does not go with weight {self.weight} and normalise {self.normalise}: take "
                "weight elbo with maskable or sequences, or weight none with masked"
            )

    def _problems_of_pairs(self, run: Config) -> Iterator[str]:
        if self.pairs == "none":
            return
        if self.name == "autoregressive":
            yield f"objective.pairs {self.pairs}: autoregressive masks nothing; set none"
        if self.pairs == "complementary" and self.min_mask_rate >= 0.5:
            yield (
                f"objective.min_mask_rate {self.min_mask_rate:g}: under objective.pairs complementary a rate and its "
                "complement are both at least that: set it below 0.5"
            )
        sizes = {"train.global_batch_size": run.train.global_batch_size}
        if ramp := run.train.batch_ramp:
            sizes |= {"train.batch_ramp.start": ramp.start, "train.batch_ramp.increment": ramp.increment}
        for key, rows in sizes.items():
            if rows % 2:
                yield f"objective.pairs {self.pairs} needs an even number of rows in a global batch: {key} is {rows}"
