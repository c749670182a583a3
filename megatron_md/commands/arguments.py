"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megatron_md.data.chat_builtin import BUILT_IN
from megatron_md.data.encoding import Encoding, Errors
from megatron_md.errors import UserError

if TYPE_CHECKING:
    from megatron_md.run.saved import Placement


TEMPLATE = f"chat template: {', '.join(BUILT_IN)} or a .jinja file (the tokenizer's own)"


def positive(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every command takes that loads a trained model."""
    parser.add_argument("run_path", metavar="RUN", help="run directory or checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--tensor", type=positive, metavar="N", help="tensor-parallel size (all processes)")
    parser.add_argument("--pipeline", type=positive, default=1, metavar="N", help="pipeline-parallel size (1)")
    parser.add_argument(
        "--weights", choices=("model", "ema"), default="model", help="RUN's weights, or their average (train.ema_decay)"
    )
    parser.add_argument(
        "--trust", action="store_true", help="load a checkpoint that has no manifest, and import what RUN's config says"
    )


def placement(args: argparse.Namespace) -> Placement:
    """What was said to `add_model_arguments` of where to load the model."""
    from megatron_md.run.saved import Placement  # imports packages that `doctor` may find missing

    return Placement(args.tensor, args.pipeline, args.device, args.trust, args.weights)


def add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how the bytes of text files become text."""
    parser.add_argument(
        "--encoding", metavar="NAME", help="of text files and JSON, such as latin-1 (UTF-8, and what a .py declares)"
    )
    parser.add_argument(
        "--errors",
        choices=get_args(Errors),
        default="strict",
        help="bytes not in it: leave out the document (strict, the default), make them U+FFFD, or leave them out",
    )


def encoding(args: argparse.Namespace) -> Encoding:
    """What was said to `add_encoding_arguments`.

    Raises:
        UserError: there is no such encoding.
    """
    return Encoding(args.encoding, args.errors)


def check_folder_of(path: Path | None, name: str = "") -> None:
    """Check that a file that will be written has a place.

    Raises:
        UserError: there is no such folder.
    """
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{name}{path}: the folder {path.parent} does not exist")
