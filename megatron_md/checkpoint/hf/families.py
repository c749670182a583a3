"""Families of Hugging Face checkpoints, as tables: which of their tensors make up which of ours.

Our names are those of megatron-core's distributed checkpoints, where the layers of a model are one stacked tensor
[layers, ...]. A rule names one of our tensors and the tensors of a Hugging Face layer (or model) that it consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_md import run_files
from megatron_md.checkpoint.directory import RECORD_NAME, Weights
from megatron_md.checkpoint.hf.configs import (
    read_llada,
    read_llama_like,
    write_dream,
    write_llada,
    write_llama_like,
    write_sdar,
)
from megatron_md.config import Config, ObjectiveConfig, ResolvedModel
from megatron_md.errors import UserError

Layout = Literal["plain", "qkv", "gate_up"]
Direction = Literal["megatron", "hf", "peft"]


@dataclass(frozen=True)
class Rule:
    """One of our tensors, and what it is made from.

    Attributes:
        ours: its name; under `decoder.layers.` it has a leading axis of layers.
        theirs: names of its parts; `{layer}` stands for the number of the layer.
        shapes: of each part, by the names of `dimensions`.
        layout: `plain`: the same tensor; `qkv`: query, key and value heads, interleaved by query group;
            `gate_up`: gate on top of up.
        when: a boolean key of `ModelConfig` that decides if the tensor is there; a leading "not " turns it round.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]
    layout: Layout = "plain"
    when: str | None = None

    @property
    def is_layer(self) -> bool:
        """Whether our tensor stacks the layers."""
        return self.ours.startswith("decoder.layers.")

    def applies(self, model: ResolvedModel) -> bool:
        """Whether a model of this shape has the tensor."""
        if self.when is None:
            return True
        negated = self.when.startswith("not ")
        return bool(getattr(model, self.when.removeprefix("not "))) != negated


@dataclass(frozen=True)
class Family:
    """A kind of Hugging Face checkpoint.

    Attributes:
        name: what the command line calls it.
        rules: the tensors.
        read_config: the shape of a model by its `config.json`.
        write_config: a `config.json` for a model: (model, what it says beside the shape: special token ids, a block
            model's `block_size`, longest row) -> content.
        causal: the published weights are those of a causal language model.
        right_shift: the logits at a position predict the token to its right.
        in_blocks: its models are block models.
    """

    name: str
    rules: tuple[Rule, ...]
    read_config: Callable[[Mapping[str, Any]], ResolvedModel]
    write_config: Callable[[ResolvedModel, Mapping[str, int], int], dict[str, Any]]
    causal: bool = False
    right_shift: bool = False
    in_blocks: bool = False


def _rules(
    *, embedding: str, final_norm: str, head: str, layer: str, names: Mapping[str, str], biases: bool, qk_norm: bool
) -> tuple[Rule, ...]:
    """The table of a decoder with RMSNorm, rotary positions and SwiGLU, which all families are."""
    attention, mlp = "decoder.layers.self_attention", "decoder.layers.mlp"

    def parts(kind: str, *keys: str) -> tuple[str, ...]:
        return tuple(f"{layer}.{names[key]}.{kind}" for key in keys)

    norm, per_head = (("hidden",),), (("head_dim",),)
    projections = tuple((width, "hidden") for width in ("queries", "keys", "keys"))
    rules = [
        Rule("embedding.word_embeddings.weight", (embedding,), (("vocab", "hidden"),)),
        Rule(f"{attention}.linear_qkv.layer_norm_weight", parts("weight", "attention_norm"), norm),
        Rule(f"{attention}.linear_qkv.weight", parts("weight", "q", "k", "v"), projections, "qkv"),
    ]
    if biases:
        widths = (("queries",), ("keys",), ("keys",))
        rules.append(Rule(f"{attention}.linear_qkv.bias", parts("bias", "q", "k", "v"), widths, "qkv", "qkv_bias"))
    if qk_norm:
        rules += [
            Rule(f"{attention}.{letter}_layernorm.weight", parts("weight", f"{letter}_norm"), per_head, when="qk_norm")
            for letter in ("q", "k")
        ]
    return (
        *rules,
        Rule(f"{attention}.linear_proj.weight", parts("weight", "attention_out"), (("hidden", "queries"),)),
        Rule(f"{mlp}.linear_fc1.layer_norm_weight", parts("weight", "mlp_norm"), norm),
        Rule(f"{mlp}.linear_fc1.weight", parts("weight", "gate", "up"), (("ffn", "hidden"),) * 2, "gate_up"),
        Rule(f"{mlp}.linear_fc2.weight", parts("weight", "down"), (("hidden", "ffn"),)),
        Rule("decoder.final_layernorm.weight", (final_norm,), norm),
        Rule("output_layer.weight", (head,), (("vocab", "hidden"),), when="not tied"),
    )


def dimensions(model: ResolvedModel) -> dict[str, int]:
    """The widths that the shapes of a family's tensors name."""
    return {
        "vocab": model.vocab,
        "hidden": model.hidden,
        "ffn": model.ffn,
        "head_dim": model.head_width,
        "queries": model.heads * model.head_width,
        "keys": model.key_heads * model.head_width,
    }


_LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "attention_out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_LLADA_NAMES = {
    "attention_norm": "attn_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "attention_out": "attn_out",
    "mlp_norm": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}


def _llama_like(*, biases: bool, qk_norm: bool) -> tuple[Rule, ...]:
    return _rules(
        embedding="model.embed_tokens.weight",
        final_norm="model.norm.weight",
        head="lm_head.weight",
        layer="model.layers.{layer}",
        names=_LLAMA_NAMES,
        biases=biases,
        qk_norm=qk_norm,
    )


def _llama_family(name: str, architecture: str, *, bias: bool = False, qk_norm: bool = False) -> Family:
    return Family(
        name,
        _llama_like(biases=bias, qk_norm=qk_norm),
        partial(read_llama_like, model_type=name, qkv_bias=bias, qk_norm=qk_norm),
        partial(write_llama_like, architecture=architecture, model_type=name),
        causal=True,
    )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llada",
            _rules(
                embedding="model.transformer.wte.weight",
                final_norm="model.transformer.ln_f.weight",
                head="model.transformer.ff_out.weight",
                layer="model.transformer.blocks.{layer}",
                names=_LLADA_NAMES,
                biases=False,
                qk_norm=False,
            ),
            read_llada,
            write_llada,
        ),
        Family(
            "dream",
            _llama_like(biases=True, qk_norm=False),
            partial(read_llama_like, model_type="Dream", qkv_bias=True, qk_norm=False),
            write_dream,
            right_shift=True,
        ),
        _llama_family("llama", "LlamaForCausalLM"),
        _llama_family("qwen2", "Qwen2ForCausalLM", bias=True),
        _llama_family("qwen3", "Qwen3ForCausalLM", qk_norm=True),
        Family(
            "sdar",
            _llama_like(biases=False, qk_norm=True),
            partial(read_llama_like, model_type="sdar", qkv_bias=False, qk_norm=True),
            write_sdar,
            in_blocks=True,
        ),
    )
}


def family_named(name: str) -> Family:
    """The family of this name.

    Raises:
        UserError: there is none; names those there are.
    """
    if name not in FAMILIES:
        raise UserError(f"--family {name}: unknown; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def is_run(source: Path) -> bool:
    """Whether a source of a conversion is a run or a checkpoint, else a folder of Hugging Face."""
    return (source / RECORD_NAME).is_file() or (source / run_files.CHECKPOINTS).is_dir()


def check_asked(
    source: Path,
    target: Path | None,
    family: str | None,
    to: Direction,
    *,
    add_mask_token: bool,
    block_size: int | None = None,
    weights: Weights = "model",
) -> Family | None:
    """The family of a conversion, which is refused as far as that can be told before torch is imported.

    Args:
        source: what to convert.
        target: what to write, if anything.
        family: name of the family; a run that stays one (adapters merged with their weights) needs none.
        to: the direction.
        add_mask_token: a mask token is asked for.
        block_size: the block size of a block model, where it is said.
        weights: a run's own, or their average.

    Raises:
        UserError: the conversion cannot be made.
    """
    kind = family_named(family) if family is not None else None
    if kind is None and not (to == "megatron" and is_run(source)):
        raise UserError(f"--family is missing: {', '.join(FAMILIES)}")
    if add_mask_token and to != "megatron":
        raise UserError("--add-mask-token belongs to --to megatron")
    if block_size is not None and not (kind and kind.in_blocks and to == "megatron" and not is_run(source)):
        raise UserError(f"--block-size is said of a folder of {_block_families()} that goes --to megatron")
    if target is not None and target.exists():
        raise UserError(f"{target}: exists already; choose another folder, or remove it")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if weights == "ema" and not is_run(source):
        raise UserError(
            f"--weights ema is said of a run, and {source} is a folder of Hugging Face, with one kind of them"
        )
    return kind


def check_exportable(config: Config, family: Family) -> None:
    """Check that a family can express a run's model, and that its code would use the logits as the run did.

    Raises:
        UserError: it cannot, or would not; names the key.
    """
    model, objective = config.model, config.objective
    _check_blocks(objective, family)
    if not family.causal and objective.name == "autoregressive":
        raise UserError(
            f"objective.name is autoregressive, and {family.name} is no causal model; export as a causal one"
        )
    if not family.causal and objective.right_shift != family.right_shift:
        where = "the next position's" if family.right_shift else "that position's"
        raise UserError(
            f"objective.right_shift is {objective.right_shift}, and the code of {family.name} takes the output at a "
            f"position for {where}; export as another family"
        )
    ours = {"qkv_bias": model.qkv_bias, "qk_norm": model.qk_norm}
    has = {"qkv_bias": any(rule.when == "qkv_bias" for rule in family.rules)}
    has["qk_norm"] = any(rule.when == "qk_norm" for rule in family.rules)
    for key, wanted in ours.items():
        if wanted != has[key]:
            fitting = "qwen2 or dream" if model.qkv_bias else "qwen3" if model.qk_norm else "llada or llama"
            train = f"train with model.{key}={str(not wanted).lower()}"
            way_out = train if family.in_blocks else f"export as {fitting}"
            raise UserError(f"model.{key} is {wanted}, which {family.name} cannot express; {way_out}")
    if model.position != "rope":
        raise UserError(f"model.position is {model.position}: no family has it; only rope can be exported")


def _check_blocks(objective: ObjectiveConfig, family: Family) -> None:
    """As `check_exportable`: block models go to families of block models, and nothing else does."""
    if objective.block_stages and not family.in_blocks:
        raise UserError(
            f"objective.name is {objective.name}, and the code of {family.name} knows no blocks; export as "
            f"{_block_families()}"
        )
    if family.in_blocks and not objective.block_stages:
        raise UserError(
            f"objective.name is {objective.name}, and {family.name} is for block models; export as another family"
        )
    if objective.autoregressive_weight:
        raise UserError(
            f"objective.autoregressive_weight is {objective.autoregressive_weight:g}: the clean half is causal then, "
            f"and the code of {family.name} has it see whole blocks; only models trained with 0 can be exported"
        )


def _block_families() -> str:
    return " or ".join(family.name for family in FAMILIES.values() if family.in_blocks)
