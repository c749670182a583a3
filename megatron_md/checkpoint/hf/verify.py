"""Compares the logits of a converted model with those of the `transformers` class of its family.

LLaDA's network is Llama's and Dream's is Qwen2's, each without the causal mask, and SDAR's is Qwen3's with one of
blocks: their published code is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from megatron_md import parallel, run_files
from megatron_md.checkpoint.base import recorded_base
from megatron_md.checkpoint.directory import Weights, find_checkpoint
from megatron_md.checkpoint.hf.families import FAMILIES, Family
from megatron_md.checkpoint.hf.folder import HuggingFaceFolder
from megatron_md.checkpoint.hf.tensors import moves
from megatron_md.checkpoint.state import load_model
from megatron_md.config import ParallelConfig, ResolvedConfig, ResolvedModel, load_resolved
from megatron_md.data.corpus import documents, texts
from megatron_md.data.optional import optional_package
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.model.block_attention import BlockRows
from megatron_md.model.build import build_model

REFERENCE = {"llada": "llama", "dream": "qwen2", "sdar": "qwen3"}
PRECISIONS: dict[Literal["fp32", "bf16"], torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, LENGTH, SEED = 2, 64, 1234
BOTH = {"bidirectional attention": False, "causal attention": True}  # which is causal


def reference_model(folder: HuggingFaceFolder, family: Family, dtype: torch.dtype) -> Any:
    """The `transformers` model with a folder's weights, in evaluation mode.

    Raises:
        UserError: `transformers` is not installed.
    """
    transformers = optional_package("transformers", "--verify", "convert")
    twin = FAMILIES[REFERENCE.get(family.name, family.name)]
    model = family.read_config(folder.config)
    content = twin.write_config(model, {}, model.max_length)
    kinds = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config = getattr(transformers, kinds[twin.name] + "Config")(**content)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        network = getattr(transformers, kinds[twin.name] + "ForCausalLM")(config)
    state = {
        theirs: folder.read(own).to(dtype)
        for move, other in zip(moves(family, model), moves(twin, model), strict=True)
        for own, theirs in zip(move.theirs, other.theirs, strict=True)
    }
    if model.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.load_state_dict(state, strict=True, assign=True)
    rope = network.model.rotary_emb
    network.model.rotary_emb = type(rope)(config)
    return network.eval()


@torch.no_grad()
def reference_logits(
    network: Any, tokens_BL: torch.Tensor, *, causal: bool, block_size: int | None = None
) -> torch.Tensor:
    """Logits fp32 [B, L, V] of a `transformers` model, whose tokens see all others, those to their left, or blocks.

    With a `block_size` a token sees its own block and those before it: causal attention in blocks of one token each.
    """
    length, dtype = tokens_BL.shape[1], network.dtype
    block_L = torch.arange(length) // (block_size or (1 if causal else length))
    is_hidden_LL = block_L[None] > block_L[:, None]
    bias_LL = torch.zeros((length, length), dtype=dtype).masked_fill(is_hidden_LL, torch.finfo(dtype).min)
    logits: torch.Tensor = network(tokens_BL, attention_mask=bias_LL.expand(len(tokens_BL), 1, -1, -1)).logits
    return logits.float()


def our_model(config: ResolvedConfig, checkpoint: Path, *, causal: bool, weights: Weights = "model") -> Any:
    """The model of a checkpoint, in evaluation mode, within a session."""
    chunks: list[Any] = build_model(config, torch.device("cpu"), causal=causal, mask_token_id=None, initialize=False)
    base = recorded_base(checkpoint)
    load_model(chunks, checkpoint, base.path if base else None, weights=weights)
    return chunks[0].eval()


@torch.no_grad()
def our_logits(network: Any, tokens_BL: torch.Tensor, block_size: int | None = None) -> torch.Tensor:
    """Logits fp32 [B, L, V] of our model, with a `block_size` in blocks."""
    length = tokens_BL.shape[1]
    positions_BL = torch.arange(length).expand_as(tokens_BL)
    rows = BlockRows(qkv_format="sbhd", block_size=block_size, length=length, copies=1) if block_size else None
    logits: torch.Tensor = network(tokens_BL, positions_BL, None, packed_seq_params=rows)
    return logits


def inputs(model: ResolvedModel, tokenizer: Path | None) -> dict[str, torch.Tensor]:
    """What the models are compared on, by name: random tokens [B, L], and the demo text [1, L] if there is a tokenizer.

    Args:
        model: the shape of both.
        tokenizer: a file that `Tokenizer` can load.
    """
    generator = torch.Generator().manual_seed(SEED)
    length = min(LENGTH, model.max_length)
    found = {"random tokens": torch.randint(model.vocab, (ROWS, length), generator=generator)}
    if tokenizer is not None:
        # The demo's corpus is Python's standard library.
        text = next(document.text for document in texts(documents()) if len(document.text) > 20 * length)
        found["demo text"] = torch.from_numpy(Tokenizer(tokenizer).encode(text)[:length])[None]
    return found


def compare_logits(folder_path: Path, run_path: Path, family: Family, weights: Weights = "model") -> Iterator[str]:
    """Lines with the largest difference of the logits, for fp32 and bf16, each attention and each of `inputs`.

    Attention is bidirectional and causal, or that of a block model.

    Raises:
        UserError: one of the two cannot be opened.
    """
    checkpoint = find_checkpoint(run_path)
    # One process looks at it, whatever layout has trained it.
    saved = replace(load_resolved(checkpoint / run_files.CONFIG), parallel=ParallelConfig(distributed_optimizer=False))
    with HuggingFaceFolder(folder_path) as folder:
        model = family.read_config(folder.config)
        parameters = sum(math.prod(tensor.shape) for tensor in folder.tensors.values())
        tokenizer, why = _tokenizer(checkpoint.parent.parent)
        rows = inputs(model, tokenizer)
        size = saved.objective.final_block_size if family.in_blocks else None
        attentions = {f"attention in blocks of {size}": False} if size else BOTH
        if tokenizer is None:
            yield f"demo text: left out, {why}"
        for precision, dtype in PRECISIONS.items():
            need = 1.2 * parameters * dtype.itemsize
            if need > psutil.virtual_memory().available:
                yield f"{precision}: left out, it needs {need / 1e9:.0f} GB of free memory"
                continue
            config = replace(saved, train=replace(saved.train, precision=precision, device="cpu"))
            with parallel.session(config):
                for attention, causal in attentions.items():
                    # One model in memory at a time: an 8B one fills a machine.
                    network = reference_model(folder, family, dtype)
                    expected = {
                        name: reference_logits(network, rows[name], causal=causal, block_size=size) for name in rows
                    }
                    del network
                    network = our_model(config, checkpoint, causal=causal, weights=weights)
                    for name, tokens_BL in rows.items():
                        logits_BLV = our_logits(network, tokens_BL, size)[..., : model.vocab]
                        difference = (logits_BLV - expected[name]).abs().max().item()
                        relative = difference / expected[name].abs().max().item()
                        figures = f"{difference:.1e} ({relative:.1e} relative)"
                        yield f"{precision}, {attention}, {name}: max |difference of logits| {figures}"
                    del network


def _tokenizer(run: Path) -> tuple[Path | None, str]:
    """The tokenizer of a run, if it can be used; else why not."""
    file = run / run_files.TOKENIZER
    try:
        Tokenizer(file)
    except ValueError as error:
        return None, str(error)
    return file, ""
