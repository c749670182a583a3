"""`megatron-md tokenizer train`."""

from __future__ import annotations

import argparse
import time

from megatron_md.data.corpus import documents, texts
from megatron_md.data.tokenizer import TRAINING_BYTES, train_tokenizer

EXAMPLES = """examples:
  megatron-md tokenizer train --input embedded --split train --output corpus/tokenizer.model
  megatron-md tokenizer train --input books/ code/ notes.txt --vocab 32000 --output tokenizer.model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    summary = "train a SentencePiece tokenizer that keeps text and code exactly"
    train = actions.add_parser("train", help=summary, description=summary, epilog=EXAMPLES, formatter_class=raw)
    train.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="text files, folders of them, or 'embedded'"
    )
    train.add_argument("--split", choices=["all", "train", "valid"], default="all", help="documents to use (all)")
    train.add_argument("--vocab", type=int, default=8192, metavar="N", help="number of pieces (8192)")
    train.add_argument(
        "--sample-bytes", type=int, default=TRAINING_BYTES, metavar="N", help="text to train on (%(default)s)"
    )
    train.add_argument("--output", required=True, metavar="FILE", help="model file to write")


def run(args: argparse.Namespace) -> int:
    """Train and write the tokenizer."""
    start = time.perf_counter()
    corpus = texts(documents(args.input, args.split))
    tokenizer = train_tokenizer(corpus, args.vocab, args.output, training_bytes=args.sample_bytes)
    seconds = time.perf_counter() - start
    print(f"{args.output}: {tokenizer.vocab_size} pieces in {seconds:.1f} s, sha256 {tokenizer.sha256[:12]}")
    return 0
