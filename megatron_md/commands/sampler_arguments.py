"""Arguments of the commands that write texts, and how those are shown."""

from __future__ import annotations

import argparse
import sys
from typing import Any, get_args

from megatron_md.commands.arguments import TEMPLATE
from megatron_md.diffusion.names import strategies
from megatron_md.diffusion.sampler_config import CacheName
from megatron_md.errors import UserError
from megatron_md.messages import printable

SAMPLER_KEYS = (
    "steps", "block", "strategy", "temperature", "seed", "top_p", "guidance", "threshold", "factor", "eos",
    "confidence_eos_eot_inf", "cache",
)  # fmt: skip


def add_sampler_arguments(group: argparse._ArgumentGroup, *, length: int) -> None:
    """Declare the keys of `SamplerConfig` but for `eos`."""
    group.add_argument("--length", type=int, help=f"tokens to generate ({length})")
    group.add_argument("--steps", type=int, help="denoising steps (one per token)")
    group.add_argument("--block", type=int, help="tokens per block, filled left to right (all)")
    group.add_argument(
        "--strategy", help=" | ".join(strategies.built_in).replace("low_confidence", "low_confidence (default)")
    )
    group.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (default)")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest that reach P (1)"
    )
    group.add_argument("--guidance", type=float, default=0.0, metavar="W", help="of classifier-free guidance (0: off)")
    group.add_argument("--threshold", type=float, metavar="P", help="from which --strategy threshold commits (0.9)")
    group.add_argument("--factor", type=float, metavar="F", help="of --strategy factor (1)")
    group.add_argument(
        "--confidence-eos-eot-inf",
        action="store_true",
        default=None,
        help="generate what ends a text after all else",
    )
    group.add_argument(
        "--cache",
        choices=get_args(CacheName),
        help="keys and values kept between steps: all that is exact (auto, the default: of block models), none, or "
        "approximately those before a block or around it (prefix, dual)",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")


def add_chat_arguments(group: argparse._ArgumentGroup) -> argparse._ArgumentGroup:
    """Declare how a run is spoken to."""
    group.add_argument("--template", metavar="T", help=TEMPLATE)
    group.add_argument("--system", metavar="TEXT", help="system text (the template's)")
    return group


def sampler_keys(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of `SamplerConfig` that were given, but for the length."""
    return {name: value for name in SAMPLER_KEYS if (value := getattr(args, name, None)) is not None}


def check_strategy(args: argparse.Namespace) -> None:
    """Refuse an option of another strategy than the one that was asked for.

    Raises:
        UserError: there is one.
    """
    for name in ("threshold", "factor"):
        if getattr(args, name) is not None and args.strategy != name:
            raise UserError(f"--{name} belongs to --strategy {name}: ask for that, or leave --{name} out")


def print_text(text: str) -> None:
    """On a terminal so that it commands nothing, in a pipe as it is."""
    sys.stdout.write((printable(text, multiline=True) if sys.stdout.isatty() else text) + "\n")
    sys.stdout.flush()
