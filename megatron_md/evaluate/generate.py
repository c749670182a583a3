"""`megatron-md generate`: denoise a canvas of mask tokens after a prompt and print the text."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from megatron_md.arguments import add_model_arguments, positive
from megatron_md.files import replace_file

EXAMPLES = """examples:
  megatron-md generate runs/demo --prompt 'def main(' --length 64
  megatron-md generate runs/demo --length 128 --steps 32 --strategy ancestral --temperature 1 --samples 4
  megatron-md generate runs/demo --length 128 --steps 64 --block 32 --output samples.jsonl
"""

STRATEGIES = "low_confidence | random | margin | entropy | ancestral | first_hitting | threshold | factor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to continue (default: none)")
    parser.add_argument("--length", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps (default: one per token)")
    parser.add_argument("--block", type=int, default=None, help="tokens per block, filled left to right (default: all)")
    parser.add_argument("--strategy", default="low_confidence", help=STRATEGIES)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (default: 0)")
    parser.add_argument("--samples", type=positive, default=1, help="how many texts, with seeds that follow each other")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--output", metavar="FILE.jsonl", default=None, help="also write the texts as JSON lines")


def run(args: argparse.Namespace) -> int:
    """Generate, print, and write `--output`.

    Raises:
        ValueError: bad input, with the way out.
    """
    # Everything that can be wrong is checked before torch is imported and the model is loaded.
    _check_output(args.output)
    import torch

    from megatron_md import parallel
    from megatron_md.data.tokenizer import Tokenizer
    from megatron_md.diffusion.sampler import SamplerConfig, check_fits, sample
    from megatron_md.evaluate.load import LoadedDenoiser, open_run

    settings = [
        SamplerConfig(
            length=args.length,
            steps=args.steps,
            block=args.block,
            strategy=args.strategy,
            temperature=args.temperature,
            seed=args.seed + number,
        )
        for number in range(args.samples)
    ]
    saved = open_run(
        args.run_path, world_size=int(os.environ.get("WORLD_SIZE", "1")), device=args.device, trust=args.trust
    )
    tokenizer = Tokenizer(saved.tokenizer)
    prompt: list[int] = tokenizer.encode(args.prompt).tolist() if args.prompt else []
    check_fits(len(prompt), args.length, saved.config.model.max_length or saved.config.data.seq_length)
    with parallel.session(saved.config) as world:
        denoiser = LoadedDenoiser(saved, world, tokenizer)
        prompt_BP = torch.tensor([prompt], dtype=torch.int64, device=world.device)
        lines = []
        for setting in settings:
            start = time.perf_counter()
            result = sample(denoiser, prompt_BP, setting, mask_token_id=tokenizer.mask_token_id)
            tokens = result.tokens_BL[0].tolist()
            record = {
                "prompt": args.prompt,
                "text": tokenizer.decode(tokens[len(prompt) :]),
                "seed": setting.seed,
                "forward_passes": result.forward_passes,
                "seconds": time.perf_counter() - start,
            }
            lines.append(json.dumps(record))
            if world.is_main:
                print(args.prompt + str(record["text"]))
                print(
                    f"[{args.length} tokens, {result.forward_passes} forward passes, {record['seconds']:.1f} s, "
                    f"step {saved.step} of {args.run_path}]",
                    file=sys.stderr,
                )
        if args.output and world.is_main:
            replace_file(Path(args.output), "".join(line + "\n" for line in lines))
    return 0


def _check_output(output: str | None) -> None:
    if output and Path(output).is_dir():
        raise ValueError(f"--output {output} is a folder: name a file")
    if output and not Path(output).parent.is_dir():
        raise ValueError(f"--output {output}: the folder {Path(output).parent} does not exist")
