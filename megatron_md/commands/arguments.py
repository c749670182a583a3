"""Arguments that several commands have."""

from __future__ import annotations

import argparse


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
    parser.add_argument(
        "--trust", action="store_true", help="load a checkpoint that has no manifest, and import what RUN's config says"
    )
