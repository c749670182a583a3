"""`megatron-md convert`: Hugging Face folders to runs and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from megatron_md.checkpoint.directory import Weights
from megatron_md.checkpoint.hf.families import FAMILIES, Direction, check_asked
from megatron_md.commands.arguments import positive
from megatron_md.commands.stoppable import stoppable_progress
from megatron_md.messages import say

EXAMPLES = """examples:
  megatron-md convert LLaDA-8B-Base runs/llada-8b --family llada --to megatron
  megatron-md convert LLaDA-8B-Base runs/llada-8b --family llada --to megatron --dry-run
  megatron-md convert runs/llada-8b LLaDA-8B-continued --family llada --to hf --dtype bf16 --verify
  megatron-md convert Qwen3-0.6B runs/qwen3 --family qwen3 --to megatron --add-mask-token
  megatron-md convert SDAR-4B-Chat runs/sdar --family sdar --to megatron --block-size 4
  megatron-md convert runs/lora adapters --family llada --to peft
  megatron-md convert runs/lora runs/merged --to megatron

The Megatron side is a run directory with one checkpoint at step 0 that any tensor- and pipeline-parallel layout loads;
training starts from its weights with checkpoint.load=RUN checkpoint.load_only=model. The adapters of a LoRA run are
merged with its base towards hf and megatron.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SRC", help="Hugging Face folder; or run directory or checkpoint")
    parser.add_argument("target", metavar="DST", help="new folder")
    parser.add_argument(
        "--family", metavar="NAME", help=f"{', '.join(FAMILIES)}; none for a LoRA run that becomes a run"
    )
    parser.add_argument("--to", required=True, choices=get_args(Direction), help="direction; peft: adapters alone")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="data type of the weights; as they are by default"
    )
    parser.add_argument(
        "--weights", choices=get_args(Weights), default="model", help="a run's weights, or their average"
    )
    parser.add_argument("--add-mask-token", action="store_true", help="add <|mask|> to a causal model's vocabulary")
    parser.add_argument(
        "--block-size", type=positive, metavar="N", help="of a block model whose config.json does not say"
    )
    parser.add_argument("--verify", action="store_true", help="compare the logits of both sides (needs transformers)")
    parser.add_argument("--dry-run", action="store_true", help="check the source, print the table, write nothing")
    parser.add_argument("--trust", action="store_true", help="open a checkpoint that has no manifest to verify it by")


def run(args: argparse.Namespace) -> int:
    """Convert.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    source, target = Path(args.source), None if args.dry_run else Path(args.target)
    asked = {key: getattr(args, key) for key in ("add_mask_token", "block_size", "weights")}
    check_asked(source, target, args.family, args.to, **asked)
    from megatron_md.checkpoint.hf.convert import convert, open_conversion

    keys = {**asked, **{key: getattr(args, key) for key in ("family", "to", "dtype", "trust")}}
    if args.dry_run:
        with open_conversion(args.source, **keys) as conversion:
            _print_table(conversion.table())
        return 0
    title = f"{args.source} -> {args.target}"
    convert(
        args.source,
        args.target,
        **keys,
        verify=args.verify,
        progress=lambda parts: stoppable_progress(parts, title),
        tell=say,
    )
    return 0


def _print_table(rows: list[tuple[str, str, str, str]]) -> None:
    for ours, shape, layout, parts in rows:
        how = {"plain": "=", "qkv": "= by query group", "gate_up": "= stacked", "adapted": "+ alpha / rank x"}[layout]
        say(f"{ours} {shape}")
        say(f"    {how} {parts}")
