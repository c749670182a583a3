"""Small Hugging Face folders with random weights, of every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch

from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.checkpoint.hf.folder import plan_shards, write_folder
from megatron_md.checkpoint.hf.model_card import CARD_NAME
from megatron_md.checkpoint.hf.tensors import moves
from megatron_md.config import ResolvedModel

FAMILY_NAMES = tuple(FAMILIES)
BLOCK_SIZE = 4  # of the folders of block models


def shape_of(family: str, *, kv_heads: int = 2, tied: bool = False, vocab: int = 67) -> ResolvedModel:
    """A shape that the family can have; a vocabulary of 67 rows divides by no tensor-parallel size."""
    return ResolvedModel(
        layers=4,
        hidden=32,
        heads=4,
        kv_heads=kv_heads,
        head_dim=16 if family in ("qwen3", "sdar") else 8,
        ffn=48,
        tied=tied,
        vocab=vocab,
        max_length=64,
        rope_theta=5000.0,
        norm_eps=1e-6,
        qkv_bias=family in ("qwen2", "dream"),
        qk_norm=family in ("qwen3", "sdar"),
    )


def write_model(
    folder: Path,
    family: str,
    model: ResolvedModel,
    *,
    dtype: torch.dtype = torch.float32,
    std: float = 0.2,
    shard_bytes: int = 20_000,
    **config: Any,
) -> dict[str, torch.Tensor]:
    """A folder with random weights in several files; returns them."""
    generator = torch.Generator().manual_seed(17)
    table = FAMILIES[family]
    tensors = {}
    for move in moves(table, model):
        for name, shape in zip(move.theirs, move.shapes, strict=True):
            noise = torch.randn(shape, generator=generator) * std
            tensors[name] = (noise + 1.0 if "norm" in name or "ln_f" in name else noise).to(dtype)
    keys = {"eos_token_id": 2, "mask_token_id": 5, **({"block_size": BLOCK_SIZE} if table.in_blocks else {})}
    content = {**table.write_config(model, keys, 64), **config}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    folder.mkdir(parents=True)
    write_folder(
        folder,
        config=(json.dumps(content, indent=2) + "\n").encode(),
        shards=plan_shards(sizes, shard_bytes),
        read=tensors.__getitem__,
        companions={},
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but its card, which an export adds."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != CARD_NAME}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 12 tokens: no mask token, `<|endoftext|>` is 11."""
    vocab = {text: number for number, text in enumerate(["<unk>", *"abcdefgh", "ab", "cd"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b"), ("c", "d")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def write_byte_tokenizer(folder: Path, *, eos: int = 300, mask: int = 310) -> None:
    """A byte-level tokenizer with LLaDA's special tokens, at these ids."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: number for number, text in enumerate([*letters, "th", "the"])}
    model = tokenizers.models.BPE(vocab, [("t", "h"), ("th", "e")])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] |= {f"filler{number}": number for number in range(len(vocab), eos)}
    special = {eos: "<|endoftext|>", mask: "<|mdm_mask|>"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [
        {"id": id, "content": special.get(id, f"<|reserved_{id}|>"), "special": True, **flags}
        for id in range(eos, mask + 1)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
