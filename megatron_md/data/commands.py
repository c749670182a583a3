"""`megatron-md data build | verify`; `megatron_md.commands.data` adds `show`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_md.data.builder import build_shards
from megatron_md.data.corpus import EMBEDDED, documents
from megatron_md.data.shards import Manifest, load_manifest, verify
from megatron_md.data.writer import SHARD_TOKENS, BuildProgress

LINE_SECONDS = 10.0
EXAMPLES = """examples:
  megatron-md data build --input embedded --split train --tokenizer corpus/tokenizer.model --output corpus/train
  megatron-md data build --input books/ notes.jsonl --tokenizer tokenizer.model --output corpus/books --workers 8
  megatron-md data verify corpus/train
"""


def add_arguments(parser: argparse.ArgumentParser) -> Any:
    """Declare the arguments; returns argparse's collection of actions, to which others can be added."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    summary = "tokenise text into shards"
    build = actions.add_parser("build", help=summary, description=summary, epilog=EXAMPLES, formatter_class=raw)
    build.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="text files, folders of them, or 'embedded'"
    )
    build.add_argument(
        "--split", choices=["all", "train", "valid"], default="all", help="documents to write, by a hash of their names"
    )
    build.add_argument("--tokenizer", required=True, metavar="FILE", help="SentencePiece model")
    build.add_argument("--output", required=True, metavar="DIR", help="folder to create; an earlier build is replaced")
    build.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise (1)")
    build.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="tokens per shard (%(default)s)"
    )
    build.add_argument("--verify", action="store_true", help="check every hash afterwards")
    summary = "check every hash and crc32"
    action = actions.add_parser("verify", help=summary, description=summary, epilog=EXAMPLES, formatter_class=raw)
    action.add_argument("manifest", nargs="+", metavar="MANIFEST", help="manifest.json or its folder")
    return actions


def run(args: argparse.Namespace) -> int:
    """Run the action that was asked for."""
    if args.action == "build":
        return _build(args)
    return max(_verify(load_manifest(path)) for path in args.manifest)


def _build(args: argparse.Namespace) -> int:
    for name in ("workers", "shard_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    inputs = [path if path == EMBEDDED else Path(path).resolve().name for path in args.input]
    start = time.perf_counter()
    with _progress() as on_progress:
        manifest = build_shards(
            documents(args.input, args.split),
            args.tokenizer,
            args.output,
            workers=args.workers,
            shard_tokens=args.shard_tokens,
            source={"inputs": inputs, "split": args.split},
            on_progress=on_progress,
        )
    seconds = time.perf_counter() - start
    rejected = manifest.source["rejected"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    print(
        f"{args.output}: {manifest.documents} documents, {manifest.tokens} tokens, "
        f"{manifest.text_bytes / 1e6:.2f} MB of text in {len(manifest.shards)} shard(s); "
        f"rejected: {reasons or 'none'}; {seconds:.1f} s, {manifest.tokens / seconds / 1e6:.2f}M tokens/s"
    )
    return _verify(manifest) if args.verify else 0


def _verify(manifest: Manifest) -> int:
    problems = verify(manifest)
    for problem in problems:
        print(problem, file=sys.stderr)
    verdict = f"{len(problems)} problem(s)" if problems else "sound"
    print(f"{manifest.location}: {len(manifest.shards)} shard(s), {manifest.documents} documents: {verdict}")
    return 1 if problems else 0


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
                print(describe(done), file=sys.stderr, flush=True)

        yield print_line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda done: bar.update(task, description=describe(done))
