"""Decoding with and without kept keys and values, and with one token or several a step, side by side.

    python benchmarks/decode.py runs/denoiser runs/blocks --data corpus/valid --length 128 --block 32
    python benchmarks/decode.py runs/denoiser --llada ../LLaDA --fast-dllm ../Fast-dLLM

Each way continues the same prompts, one at a time and greedily, and the ways take turns. On CPUs the clock is that of
the process, which work beside it disturbs less. Forward passes and tokens are counted where the network is called.

A denoiser of whole rows is also exported as LLaDA's, for the samplers of LLaDA and Fast-dLLM: `--llada` and
`--fast-dllm` name clones of their repositories (the latter needs `einops`). Without them their lines are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import published
import torch

from megatron_md import parallel
from megatron_md.checkpoint.hf.convert import convert
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.errors import UserError
from megatron_md.evaluate.load import load_model
from megatron_md.evaluate.rows import evaluation_rows
from megatron_md.run.saved import Placement, SavedRun, open_run
from megatron_md.train.filling import fill
from megatron_md.train.inference import Inference

OURS, LLADA, FAST_DLLM = "ours", "LLaDA", "Fast-dLLM"
HEAD = ("sampler", "strategy", "cache", "tokens/s", "passes", "tokens", "speed", "same text", "ours is", "same text")


class Counter:
    """What went through a network: forward passes, and tokens."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.passes = self.tokens = 0
        network.register_forward_pre_hook(self._count)

    def _count(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.passes += 1
        self.tokens += inputs[0].numel()


@dataclass(frozen=True)
class Way:
    """One way to write a text.

    Attributes:
        sampler: whose.
        strategy: of our names.
        cache: of our names.
        write: from a prompt to the tokens behind it.
        counter: of its network.
    """

    sampler: str
    strategy: str
    cache: str
    write: Callable[[Sequence[int]], list[int]]
    counter: Counter


@dataclass
class Found:
    """What a way came to.

    Attributes:
        sampler, strategy, cache: the way's.
        seconds: of all texts, in each repeat.
        passes: through the network, for all texts.
        tokens: that went through the network, for all texts.
        texts: tokens.
    """

    sampler: str
    strategy: str
    cache: str
    seconds: list[float] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    texts: list[list[int]] = field(default_factory=list)


def our_ways(args: argparse.Namespace, denoiser: Inference, tokenizer: Tokenizer) -> list[Way]:
    """Every strategy with every cache that the model can have."""
    counter = Counter(denoiser.chunks[0])
    is_block_model = denoiser.block_size is not None
    caches = ("none", "auto") if is_block_model else ("none", "prefix", "dual")
    token_ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    ways = []
    for strategy in args.strategies:
        for cache in caches:
            how = SamplerConfig(
                args.length,
                block=None if is_block_model else args.block,
                strategy=strategy,
                threshold=args.threshold,
                factor=args.factor,
                cache=cache,
            )

            def write(prompt: Sequence[int], how: SamplerConfig = how) -> list[int]:
                tokens: list[int] = fill(denoiser, [prompt], how, **token_ids).tokens_BL[0].tolist()
                return tokens[-args.length :]

            ways.append(Way(OURS, strategy, cache, write, counter))
    return ways


def published_ways(args: argparse.Namespace, saved: SavedRun, exported: Path, mask_token_id: int) -> list[Way]:
    """What was published, on the exported model: those strategies that it has."""
    convert(saved.checkpoint, exported, family="llada", to="hf", dtype="fp32", tell=lambda line: None)
    keys = {"length": args.length, "block": args.block, "mask_token_id": mask_token_id}
    samplers = {}
    if args.llada:
        samplers[LLADA] = published.llada(args.llada, exported, args.device, **keys)
    if args.fast_dllm:
        confident = {"threshold": args.threshold, "factor": args.factor}
        samplers[FAST_DLLM] = published.fast_dllm(args.fast_dllm, exported, args.device, **keys, confident=confident)
    ways = []
    for name, sampler in samplers.items():
        counter = Counter(sampler.network)
        for (strategy, cache), generate in sampler.ways.items():

            def write(prompt: Sequence[int], generate: published.Write = generate) -> list[int]:
                tokens: list[int] = generate(torch.tensor([prompt], device=args.device))[0].tolist()
                return tokens[len(prompt) :]

            if strategy in args.strategies:
                ways.append(Way(name, strategy, cache, write, counter))
    return ways


def measure(
    ways: Sequence[Way], prompts: Sequence[Sequence[int]], repeats: int, clock: Callable[[], float]
) -> list[Found]:
    """Write the texts of all prompts in every way, the ways taking turns."""
    found = [Found(way.sampler, way.strategy, way.cache) for way in ways]
    for way in ways:
        way.write(prompts[0])
    for _ in range(repeats):
        for way, result in zip(ways, found, strict=True):
            passes, tokens = way.counter.passes, way.counter.tokens
            result.texts.clear()
            start = clock()
            result.texts.extend(way.write(prompt) for prompt in prompts)
            result.seconds.append(clock() - start)
            result.passes, result.tokens = way.counter.passes - passes, way.counter.tokens - tokens
    return found


def same_share(one: Found, other: Found) -> float:
    """Share of places at which two ways have the same token."""
    pairs = [a == b for x, y in zip(one.texts, other.texts, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(pairs) / len(pairs)


def speedup(new: Found, old: Found) -> float:
    """How often as fast: the median over the repeats."""
    return statistics.median(b / a for a, b in zip(new.seconds, old.seconds, strict=True))


def table(found: Sequence[Found]) -> list[list[str]]:
    """A line for each way: against its own sampler without a cache, and ours against it."""
    by_way = {(result.sampler, result.strategy, result.cache): result for result in found}
    lines = []
    for result in found:
        written = sum(map(len, result.texts))
        uncached = by_way[result.sampler, result.strategy, "none"]
        ours = by_way[OURS, result.strategy, result.cache]
        line = [
            result.sampler,
            result.strategy,
            result.cache,
            f"{written / statistics.median(result.seconds):,.1f}",
            f"{result.passes / len(result.texts):.1f}",
            f"{result.tokens / written:.1f}",
            f"{speedup(result, uncached):.2f}x",
            f"{same_share(result, uncached):.1%}",
        ]
        is_ours = result.sampler == OURS
        lines.append(
            [*line, *(("", "") if is_ours else (f"{speedup(ours, result):.2f}x", f"{same_share(ours, result):.1%}"))]
        )
    return lines


def compare(args: argparse.Namespace, path: str, folder: Path) -> list[Found]:
    """Everything about one run."""
    saved = open_run(path, Placement(device=args.device))
    tokenizer = Tokenizer(saved.tokenizer)
    data = args.data or [saved.config.data.valid]
    rows = evaluation_rows(data, [saved.config], tokenizer, count=args.prompts)
    if rows.tokens_RL.shape[1] < args.prompt:
        raise UserError(f"--prompt {args.prompt}: rows of the run have {rows.tokens_RL.shape[1]} tokens")
    prompts = rows.tokens_RL[:, : args.prompt].tolist()
    with parallel.session(saved.config) as world:
        torch.set_num_threads(args.threads)
        denoiser = load_model(saved, world, tokenizer)
        ways = our_ways(args, denoiser, tokenizer)
        if denoiser.block_size is None and (args.llada or args.fast_dllm):
            ways += published_ways(args, saved, folder / "exported", tokenizer.mask_token_id)
        return measure(ways, prompts, args.repeats, time.process_time if args.device == "cpu" else time.perf_counter)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a block model, or a denoiser without right_shift")
    parser.add_argument("--data", nargs="+", help="of the prompts, a corpus or text files; the run's validation corpus")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=128, help="tokens to write")
    parser.add_argument("--block", type=int, default=32, help="of a denoiser of whole rows")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--factor", type=float, default=1.0)
    strategies = ["low_confidence", "threshold", "factor"]
    parser.add_argument("--strategies", nargs="+", choices=strategies, default=strategies)
    parser.add_argument("--llada", type=Path, metavar="DIR", help="clone of github.com/ML-GSAI/LLaDA")
    parser.add_argument("--fast-dllm", type=Path, metavar="DIR", help="clone of github.com/NVlabs/Fast-dLLM")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    hardware = f"{args.threads} threads, {platform.processor() or platform.machine()}"
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else hardware
    print(f"{hardware}, torch {torch.__version__}, commit {commit}; load {os.getloadavg()[0]:.1f}")
    for name, clone in ((LLADA, args.llada), (FAST_DLLM, args.fast_dllm)):
        if clone is None:
            print(f"{name} is left out: no clone of it was given")
    results = {}
    for path in args.runs:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(args, path, Path(folder))
        results[path] = [asdict(result) for result in found]
        print(
            f"\n{path}: {args.prompts} texts of {args.length} tokens after {args.prompt}; load {os.getloadavg()[0]:.1f}"
        )
        for line in (HEAD, *table(found)):
            print("| " + " | ".join(line) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"commit": commit, "hardware": hardware, "results": results}) + "\n")


if __name__ == "__main__":
    main()
