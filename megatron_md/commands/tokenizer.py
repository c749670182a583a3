"""`megatron-md tokenizer train | import`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_md.commands.arguments import add_encoding_arguments, encoding
from megatron_md.data.corpus import documents, texts
from megatron_md.data.readers import Reading
from megatron_md.data.tokenizer import JSON_NAME, TRAINING_BYTES, Tokenizer, train_tokenizer
from megatron_md.errors import UserError
from megatron_md.messages import say

EXAMPLES = """examples:
  megatron-md tokenizer train --input embedded --split train --output corpus/tokenizer.model
  megatron-md tokenizer train --input books/ code/ notes.txt --vocab 32000 --output tokenizer.model
  megatron-md tokenizer train --input old-books/ --encoding latin-1 --output tokenizer.model
  megatron-md tokenizer import LLaDA-8B-Base --mask-token '<|mdm_mask|>' --output corpus/llada
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
    add_encoding_arguments(train)
    train.add_argument("--vocab", type=int, default=8192, metavar="N", help="number of pieces (8192)")
    train.add_argument(
        "--sample-bytes", type=int, default=TRAINING_BYTES, metavar="N", help="text to train on (%(default)s)"
    )
    train.add_argument("--output", required=True, metavar="FILE", help="model file to write")
    summary = "take over a tokenizer.json of Hugging Face and settle its special tokens"
    taken = actions.add_parser("import", help=summary, description=summary, epilog=EXAMPLES, formatter_class=raw)
    taken.add_argument("tokenizer", metavar="PATH", help="tokenizer.json or its folder")
    for kind in ("mask", "eos", "pad"):
        taken.add_argument(
            f"--{kind}-token", metavar="TOKEN", help="an added token; by default as its tokenizer_config.json says"
        )
    taken.add_argument("--output", required=True, metavar="DIR", help="folder to write tokenizer.json into")


def run(args: argparse.Namespace) -> int:
    """Run the action that was asked for."""
    return _import(args) if args.action == "import" else _train(args)


def _import(args: argparse.Namespace) -> int:
    tokenizer = Tokenizer(
        args.tokenizer, mask_token=args.mask_token, eos_token=args.eos_token, pad_token=args.pad_token
    )
    if tokenizer.path.suffix != ".json":
        raise UserError(f"{tokenizer.path}: not a tokenizer.json; a SentencePiece model is used as it is")
    target = Path(args.output) / JSON_NAME
    tokenizer.save(target)
    say(
        f"{target}: {tokenizer.vocab_size} tokens, mask {tokenizer.mask_token_id}, eos {tokenizer.eos_token_id}, "
        f"pad {tokenizer.pad_token_id}, sha256 {tokenizer.sha256[:12]}"
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    corpus = texts(documents(args.input, args.split, reading=Reading(encoding=encoding(args))))
    tokenizer = train_tokenizer(corpus, args.vocab, args.output, training_bytes=args.sample_bytes)
    seconds = time.perf_counter() - start
    say(f"{args.output}: {tokenizer.vocab_size} pieces in {seconds:.1f} s, sha256 {tokenizer.sha256[:12]}")
    return 0
