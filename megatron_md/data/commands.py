"""`megatron-md data build | index | verify`; `megatron_md.commands.data` adds `show`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_md.data.builder import build_shards
from megatron_md.data.corpus import EMBEDDED, documents
from megatron_md.data.entries import InputError
from megatron_md.data.index import index_shards
from megatron_md.data.readers import DOCUMENT_BYTES, HUB, Reading
from megatron_md.data.resume import BuildProgress
from megatron_md.data.shards import Manifest, load_manifest
from megatron_md.data.verify import verify
from megatron_md.data.writer import SHARD_TOKENS
from megatron_md.errors import UserError
from megatron_md.messages import say, tell

LINE_SECONDS = 10.0
EXAMPLES = """examples:
  megatron-md data build --input embedded --split train --tokenizer corpus/tokenizer.model --output corpus/train
  megatron-md data build --input books/ notes.jsonl --tokenizer tokenizer.model --output corpus/books --workers 8
  megatron-md data build --input dump.jsonl.zst tables/ --text-key content --tokenizer t.model --output corpus/dump
  megatron-md data build --input datasets:org/name:config:train --tokenizer llada/tokenizer.json --output corpus/hub
  megatron-md data build --input old/corpus.idx --tokenizer llada/tokenizer.json --output corpus/old
  megatron-md data index made-elsewhere/ --tokenizer tokenizer.model
  megatron-md data verify corpus/train
"""


def add_arguments(parser: argparse.ArgumentParser) -> Any:
    """Declare the arguments; returns argparse's collection of actions, to which others can be added."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    summary = "tokenise text into shards"
    build = actions.add_parser("build", help=summary, description=summary, epilog=EXAMPLES, formatter_class=raw)
    build.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files (.txt .md .py .jsonl .tar, also .gz or .zst; .parquet; Megatron's .idx), folders of them, "
        "datasets:NAME[:CONFIG[:SPLIT]] of the Hugging Face hub, or 'embedded'",
    )
    build.add_argument(
        "--split", choices=["all", "train", "valid"], default="all", help="documents to write, by a hash of their names"
    )
    build.add_argument("--tokenizer", required=True, metavar="FILE", help="SentencePiece model or tokenizer.json")
    build.add_argument(
        "--output", metavar="DIR", help="folder to create; an earlier build is replaced, an interrupted one goes on"
    )
    build.add_argument("--text-key", default="text", metavar="NAME", help="field or column of the text (text)")
    build.add_argument(
        "--max-document-bytes",
        type=int,
        default=DOCUMENT_BYTES,
        metavar="N",
        help="longer documents (or JSON lines) are rejected (%(default)s)",
    )
    build.add_argument(
        "--skip-damaged", action="store_true", help="reject what cannot be read of a damaged file, instead of stopping"
    )
    build.add_argument(
        "--index", action="store_true", help="the inputs are folders of tokenised tars: index them where they are"
    )
    build.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise (1)")
    build.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="tokens per shard (%(default)s)"
    )
    build.add_argument("--verify", action="store_true", help="check every hash afterwards")
    summary = "index tars of tokens that were made elsewhere: sidecars and a manifest beside them"
    index = actions.add_parser("index", help=summary, description=summary, epilog=EXAMPLES, formatter_class=raw)
    index.add_argument("input", nargs="+", metavar="DIR", help="folder of .tar files")
    index.add_argument("--tokenizer", required=True, metavar="FILE", help="what they were tokenised with")
    index.add_argument("--verify", action="store_true", help="check every hash afterwards")
    summary = "check every hash and crc32"
    action = actions.add_parser("verify", help=summary, description=summary, epilog=EXAMPLES, formatter_class=raw)
    action.add_argument("manifest", nargs="+", metavar="MANIFEST", help="manifest.json or its folder")
    return actions


def run(args: argparse.Namespace) -> int:
    """Run the action that was asked for."""
    if args.action == "index" or (args.action == "build" and args.index):
        return _index(args)
    if args.action == "build":
        return _build(args)
    return max(_verify(load_manifest(path)) for path in args.manifest)


def _build(args: argparse.Namespace) -> int:
    if not args.output:
        raise UserError("--output is missing: the folder to create")
    for name in ("workers", "shard_tokens", "max_document_bytes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    inputs = [path if path == EMBEDDED or path.startswith(HUB) else Path(path).resolve().name for path in args.input]
    reading = Reading(args.text_key, args.max_document_bytes)
    start = time.perf_counter()
    with _progress() as on_progress, _saying_what_is_kept(args.output):
        manifest = build_shards(
            documents(args.input, args.split, reading=reading, skip_damaged=args.skip_damaged),
            args.tokenizer,
            args.output,
            workers=args.workers,
            shard_tokens=args.shard_tokens,
            source={"inputs": inputs, "split": args.split},
            on_progress=on_progress,
        )
    _report(args.output, manifest, time.perf_counter() - start)
    return _verify(manifest) if args.verify else 0


def _index(args: argparse.Namespace) -> int:
    if args.action == "build" and args.output is not None:
        raise UserError("--index takes no --output: the tars are indexed where they are")
    codes = [0]
    for folder in args.input:
        start = time.perf_counter()
        with _progress() as on_progress:
            manifest = index_shards(folder, args.tokenizer, on_progress=on_progress)
        _report(folder, manifest, time.perf_counter() - start)
        codes.append(_verify(manifest) if args.verify else 0)
    return max(codes)


def _report(folder: str, manifest: Manifest, seconds: float) -> None:
    rejected = manifest.source["rejected"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    say(
        f"{folder}: {manifest.documents} documents, {manifest.tokens} tokens, "
        f"{manifest.text_bytes / 1e6:.2f} MB of text in {len(manifest.shards)} shard(s); "
        f"rejected: {reasons or 'none'}; {seconds:.1f} s, {manifest.tokens / seconds / 1e6:.2f}M tokens/s"
    )


def _verify(manifest: Manifest) -> int:
    problems = verify(manifest)
    for problem in problems:
        tell(problem)
    verdict = f"{len(problems)} problem(s)" if problems else "sound"
    say(f"{manifest.location}: {len(manifest.shards)} shard(s), {manifest.documents} documents: {verdict}")
    return 1 if problems else 0


@contextmanager
def _saying_what_is_kept(output: str) -> Iterator[None]:
    """Say after an interruption or a damaged input that the build can go on, where it can."""
    try:
        yield
    except (KeyboardInterrupt, InputError, OSError):
        partial = Path(os.path.abspath(output) + ".partial")
        if partial.is_dir():
            tell(f"{partial} keeps what is done: the same command goes on from there")
        raise


@contextmanager
def _progress() -> Iterator[Callable[[BuildProgress], None]]:
    """Progress of a build on stderr: a bar on a terminal, else a plain line every ten seconds."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    start = time.perf_counter()
    console = Console(stderr=True)

    def describe(done: BuildProgress) -> str:
        rate = done.tokens / (time.perf_counter() - start)
        return f"{done.documents} documents, {done.tokens / 1e6:.2f}M tokens, {rate / 1e6:.2f}M tokens/s"

    if not console.is_terminal:
        last = start

        def print_line(done: BuildProgress) -> None:
            nonlocal last
            if time.perf_counter() - last >= LINE_SECONDS:
                last = time.perf_counter()
                tell(describe(done))

        yield print_line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda done: bar.update(task, description=describe(done))
