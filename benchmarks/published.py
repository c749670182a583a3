"""Published samplers, loaded from their own clones, on a model of ours that was exported as LLaDA's.

Nothing of them is copied here. LLaDA's repository has a sampler and no network: it runs on the Llama of `transformers`
without its causal mask, which is the same. Fast-dLLM's runs on its own network, a copy of LLaDA's that keeps keys.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.checkpoint.hf.folder import HuggingFaceFolder
from megatron_md.checkpoint.hf.verify import reference_model

Write = Callable[[torch.Tensor], torch.Tensor]
FAST_DLLM = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}


@dataclass(frozen=True)
class Published:
    """A published sampler on a network.

    Attributes:
        network: what it calls.
        ways: from a prompt [1, P] to a canvas [1, L], by strategy and cache.
    """

    network: torch.nn.Module
    ways: Mapping[tuple[str, str], Write]


class Bidirectional(torch.nn.Module):
    """A causal model of `transformers`, each of whose tokens sees all others."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.device = network.device
        network.set_attn_implementation("sdpa")

    def forward(self, tokens_BL: torch.Tensor, attention_mask: None = None) -> Any:
        """With `logits` [B, L, V], as LLaDA's network gives them."""
        length = tokens_BL.shape[1]
        bias_LL = torch.zeros((1, 1, length, length), dtype=self.network.dtype, device=self.device)
        return self.network(tokens_BL, attention_mask=bias_LL, use_cache=False)


def llada(clone: Path, exported: Path, device: str, *, length: int, block: int, mask_token_id: int) -> Published:
    """LLaDA's `generate.py`, which commits one token a step here."""
    generate = _module(clone / "generate.py", "llada_generate").generate
    with HuggingFaceFolder(exported) as folder:
        network = Bidirectional(reference_model(folder, FAMILIES["llada"], torch.float32).to(device))
    _never_predict(network, mask_token_id)
    keys = {"steps": length, "gen_length": length, "block_length": block, "mask_id": mask_token_id}
    return Published(network, {("low_confidence", "none"): partial(generate, network, **keys)})


def fast_dllm(
    clone: Path,
    exported: Path,
    device: str,
    *,
    length: int,
    block: int,
    mask_token_id: int,
    confident: dict[str, float],
) -> Published:
    """Fast-dLLM's `llada/generate.py` with its network.

    Args:
        clone: of its repository.
        exported: folder of Hugging Face.
        device: where to compute.
        length: tokens to write.
        block: tokens of a block.
        mask_token_id: of the exported model.
        confident: value of each strategy that commits by confidence; left out where the clone does not know it.
    """
    sys.path.insert(0, str(clone / "llada"))  # whose `generate` imports a neighbour
    module = _module(clone / "llada/generate.py", "fast_dllm_generate")
    network = _fast_dllm_network(module.LLaDAModelLM, exported).to(device)
    _never_predict(network, mask_token_id)
    keys = {"steps": length, "gen_length": length, "block_length": block, "mask_id": mask_token_id}
    ways: dict[tuple[str, str], Write] = {}
    for cache, name in FAST_DLLM.items():
        generate = getattr(module, name)
        ways["low_confidence", cache] = partial(_text_of, partial(generate, network, **keys))
        for strategy, value in confident.items():
            if strategy in inspect.signature(generate).parameters:
                ways[strategy, cache] = partial(_text_of, partial(generate, network, **keys, **{strategy: value}))
    return Published(network, ways)


def _text_of(generate: Callable[[torch.Tensor], tuple[torch.Tensor, int]], prompt: torch.Tensor) -> torch.Tensor:
    """Without the number of passes, which is counted at the network."""
    return generate(prompt)[0]


def _fast_dllm_network(kind: Any, exported: Path) -> Any:
    with HuggingFaceFolder(exported) as folder:
        config = kind.config_class(**folder.config)
        config.use_cache = False  # which it reads, and newer releases of transformers do not keep
        network = kind(config)
        network.load_state_dict(
            {name: folder.read(name).float() for name in folder.tensors}, strict=not config.weight_tying
        )
    return network.eval()


def _never_predict(network: torch.nn.Module, mask_token_id: int) -> None:
    """Our sampler never proposes the mask token; theirs rely on a model that gives it no probability."""

    def hide(module: Any, inputs: Any, output: Any) -> None:
        output.logits[..., mask_token_id] = -torch.inf

    network.register_forward_hook(hide)


def _module(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
