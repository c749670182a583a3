"""Low-rank adapters on frozen weights (LoRA, arXiv 2106.09685): the section `lora`, and which matrices have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from megatron_md.config.schema import STRICT, Doc, PositiveInt

if TYPE_CHECKING:
    from megatron_md.config import Config, ModelConfig

Target = Literal["q", "k", "v", "proj", "fc1", "fc2"]
ALL: tuple[Target, ...] = ("q", "k", "v", "proj", "fc1", "fc2")
_MARK = ".lora_"


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer of megatron-core, and the matrices that it holds one under the other.

    Attributes:
        parent: the module of a transformer layer that has it.
        name: its own, without `linear_`.
        parts: the matrices; each has an adapter of its own, as in the models of Hugging Face.
        is_row: tensor parallelism splits its input; else its output.
    """

    parent: str
    name: str
    parts: tuple[str, ...]
    is_row: bool = False

    @property
    def weight(self) -> str:
        """Its weight in a checkpoint."""
        return f"decoder.layers.{self.parent}.linear_{self.name}.weight"

    def key(self, factor: Literal["A", "B"], part: str) -> str:
        """A factor of an adapter in a checkpoint: A [layers, rank, in] or B [layers, out, rank]."""
        return f"decoder.layers.{self.parent}{_MARK}{self.name}.{factor}_{part}"

    def adapted(self, targets: Sequence[str]) -> list[str]:
        """Its parts that have an adapter."""
        return [part for part in self.parts if part in targets or self.name in targets]


LINEARS = (
    AdaptedLinear("self_attention", "qkv", ("q", "k", "v")),
    AdaptedLinear("self_attention", "proj", ("proj",), is_row=True),
    AdaptedLinear("mlp", "fc1", ("gate", "up")),
    AdaptedLinear("mlp", "fc2", ("fc2",), is_row=True),
)


def is_adapter(name: str) -> bool:
    """Whether a parameter or a tensor of a checkpoint belongs to an adapter."""
    return _MARK in name


def is_first_factor(name: str) -> bool:
    """Whether it is an adapter's A, else its B."""
    return ".A_" in name


def part_sizes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Input and output width of each part that can have an adapter."""
    hidden, queries, keys = model.hidden, model.heads * model.head_width, model.key_heads * model.head_width
    return {
        "q": (hidden, queries),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "proj": (queries, hidden),
        "gate": (hidden, model.ffn),
        "up": (hidden, model.ffn),
        "fc2": (model.ffn, hidden),
    }


@dataclass(frozen=True)
class LoraConfig:
    """Adapters: W x becomes W x + alpha / rank * B A x; the weights of `checkpoint.load` stay as they are."""

    __pydantic_config__ = STRICT

    rank: Annotated[PositiveInt, Doc("columns of B and rows of A")] = 16
    alpha: Annotated[PositiveFloat, Doc("an adapter's product counts alpha / rank times")] = 32.0
    dropout: Annotated[
        float, Field(ge=0.0, lt=1.0, description="share of an adapter's input that is dropped in training")
    ] = 0.0
    targets: Annotated[
        list[Target], Doc("matrices with an adapter: query, key, value, output of attention, gate and up, down")
    ] = field(default_factory=lambda: list(ALL))
    load: Annotated[
        str | None, Doc("PEFT folder whose adapters the run starts from; null: new ones, which change nothing yet")
    ] = None

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each."""
        if run.checkpoint.load is None or run.checkpoint.load_only != "model":
            yield (
                "lora trains adapters on the weights of another run: "
                "set checkpoint.load to that run and checkpoint.load_only=model"
            )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            yield f"lora.targets must be some of {', '.join(ALL)}, each once"
        if run.train.precision == "fp8":
            yield "lora has not been run in fp8: set train.precision=bf16"

    def identity(self) -> dict[str, Any]:
        """What the adapters and their function depend on."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": sorted(self.targets)}

    def layer_parameters(self, model: ModelConfig, *, tensor: int = 1) -> int:
        """Entries of one layer's adapters on a tensor-parallel rank."""
        sizes, count = part_sizes(model), 0
        for linear in LINEARS:
            for part in linear.adapted(self.targets):
                whole, split = sizes[part] if not linear.is_row else reversed(sizes[part])
                count += self.rank * (whole + split // tensor)
        return count
