"""Adapters merged with their weights: the same function, as a run that goes on like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_md.checkpoint.directory import CONFIG_NAME, find_checkpoint
from megatron_md.checkpoint.merged import MergedReader
from megatron_md.config import LoraConfig, load_resolved
from megatron_md.config.lora import LINEARS, part_sizes
from megatron_md.errors import UserError
from tests.adapted_run import KEYS, adapted_config, train_adapters, write_base
from tests.checkpoint.hf_models import shape_of
from tests.ranks import run_ranks
from tests.small_run import CONFIG


class Stored:
    """Tensors by name, read slice by slice."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values
        self.tensors = {name: (tuple(value.shape), value.dtype) for name, value in values.items()}

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        return self.values[name][tuple(slice(start, start + n) for start, n in zip(offset, size, strict=True))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [["q", "k", "v", "proj", "fc1", "fc2"], ["k", "fc2"]])
def test_merged_weights_are_the_formula(targets: list[str], dtype: torch.dtype) -> None:
    keys, model = LoraConfig(rank=3, alpha=6.0, targets=targets), shape_of("llada", kv_heads=2)  # type: ignore[arg-type]
    sizes, generator = part_sizes(model), torch.Generator().manual_seed(1)
    base, adapters, changes = {}, {}, {}
    for linear in LINEARS:
        rows = sum(sizes[part][1] for part in linear.parts)
        shape = (model.layers, rows, sizes[linear.parts[0]][0])
        base[linear.weight] = torch.randn(shape, generator=generator).to(dtype)
        for part in linear.adapted(targets):
            inputs, outputs = sizes[part]
            a = adapters[linear.key("A", part)] = torch.randn(model.layers, 3, inputs, generator=generator).to(dtype)
            b = adapters[linear.key("B", part)] = torch.randn(model.layers, outputs, 3, generator=generator).to(dtype)
            changes[part] = 2.0 * torch.einsum("lor,lri->loi", b.float(), a.float())
    config = replace(CONFIG, model=model, lora=keys)
    reader = MergedReader(Stored(base), Stored(adapters), config, dtype=torch.float32)
    head, per_group = model.head_width, model.heads // model.key_heads
    for linear in LINEARS:
        whole = base[linear.weight][2].float().clone()
        if linear.name == "qkv":  # by hand: two groups of two queries, a key and a value
            for group in range(model.key_heads):
                row = group * (per_group + 2) * head
                for part, heads in (("q", per_group), ("k", 1), ("v", 1)):
                    if part in changes:
                        own = changes[part][2, group * heads * head : (group + 1) * heads * head]
                        whole[row : row + heads * head] += own
                    row += heads * head
        else:
            row = 0
            for part in linear.parts:
                if part in changes:
                    whole[row : row + sizes[part][1]] += changes[part][2]
                row += sizes[part][1]
        found = reader.read(linear.weight, (2, 0, 0), (1, *whole.shape))[0]
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-5)
        cut = reader.read(linear.weight, (2, 1, 3), (1, 4, 5))[0]
        assert torch.equal(cut, found[1:5, 3:8])
    rounded = MergedReader(Stored(base), Stored(adapters), config)
    assert rounded.read(LINEARS[1].weight, (0, 0, 0), (1, 2, 2)).dtype == dtype
    del adapters[LINEARS[1 if "proj" in targets else 3].key("B", "proj" if "proj" in targets else "fc2")]
    with pytest.raises(UserError, match="which its config says it has"):
        MergedReader(Stored(base), Stored(adapters), config)


def logits(run: Path) -> torch.Tensor:
    """On a rank: logits of a run's newest checkpoint, with its adapters or without any."""
    from megatron_md import parallel
    from megatron_md.checkpoint.base import recorded_base
    from megatron_md.checkpoint.state import load_model
    from megatron_md.config import ParallelConfig
    from megatron_md.model.build import build_model
    from megatron_md.train.inference import Inference

    checkpoint = find_checkpoint(run)
    config = replace(load_resolved(checkpoint / CONFIG_NAME), parallel=ParallelConfig())
    with parallel.session(config) as world:
        chunks = build_model(config, world.device, causal=False, mask_token_id=3, initialize=False)
        base = recorded_base(checkpoint)
        load_model(chunks, checkpoint, base.path if base else None)
        return Inference(config, world, chunks, causal=False, mask_token_id=3)(torch.arange(4, 36).reshape(2, 16))


@pytest.mark.distributed
def test_a_merged_run_is_the_adapted_one_and_a_base_itself(tmp_path: Path) -> None:
    from megatron_md.checkpoint.hf.convert import convert
    from megatron_md.run.check import check_config

    write_base(tmp_path)
    train_adapters(tmp_path)
    convert(tmp_path / "lora", tmp_path / "merged", to="megatron", tell=lambda line: None)
    (adapted,), (merged,) = run_ranks(logits, 1, tmp_path / "lora"), run_ranks(logits, 1, tmp_path / "merged")
    (before,) = run_ranks(logits, 1, tmp_path / "base")
    scale = adapted.nan_to_num(neginf=0.0).abs().max().item()
    torch.testing.assert_close(merged, adapted, rtol=0.0, atol=1e-6 * scale)
    assert (adapted - before).nan_to_num().abs().max() > 1e-2 * scale
    config = load_resolved(find_checkpoint(tmp_path / "merged") / CONFIG_NAME)
    assert config.lora is None and config.checkpoint.load is None
    assert (tmp_path / "merged" / "huggingface" / "config.json").is_file()
    check_config(adapted_config(tmp_path, "second", KEYS, checkpoint={"load": str(tmp_path / "merged")}), 1)
    with pytest.raises(UserError, match="a run with whole weights already"):
        convert(tmp_path / "merged", tmp_path / "again", to="megatron")
