"""`megatron-md data build | index | verify | show`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from megatron_md.commands.arguments import add_encoding_arguments, encoding
from megatron_md.commands.show import add_show, answers_line, lengths_line, show
from megatron_md.data.builder import build_corpus
from megatron_md.data.chat_builtin import BUILT_IN
from megatron_md.data.chat_template import ChatTemplate
from megatron_md.data.dialogues import ChatSettings, Truncate, Turns
from megatron_md.data.entries import InputError
from megatron_md.data.index import index_corpus
from megatron_md.data.readers import DOCUMENT_BYTES
from megatron_md.data.resume import BuildProgress
from megatron_md.data.shards import Manifest, load_manifest
from megatron_md.data.survey import document_lengths, verify_corpus
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.data.writer import SHARD_TOKENS
from megatron_md.errors import UserError
from megatron_md.messages import progress, say, tell

EXAMPLES = """examples:
  megatron-md data build --input embedded --split train --tokenizer corpus/tokenizer.model --output corpus/train
  megatron-md data build --input books/ notes.jsonl --tokenizer tokenizer.model --output corpus/books --workers 8
  megatron-md data build --input dump.jsonl.zst tables/ --text-key content --tokenizer t.model --output corpus/dump
  megatron-md data build --input old-books/ --encoding latin-1 --tokenizer tokenizer.model --output corpus/old-books
  megatron-md data build --input datasets:org/name:config:train --tokenizer llada/tokenizer.json --output corpus/hub
  megatron-md data build --input old/corpus.idx --tokenizer llada/tokenizer.json --output corpus/old
  megatron-md data build --chat --input dialogues.jsonl --tokenizer llada/tokenizer.json --output corpus/chat
  megatron-md data index made-elsewhere/ --tokenizer tokenizer.model
  megatron-md data verify corpus/train
  megatron-md data show corpus/train --stats
  megatron-md data show corpus/train --row 17 --tokenizer corpus/tokenizer.model --masks uniform:0.3,0.7 --seed 1234
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add_action(name: str, summary: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        return actions.add_parser(name, help=summary, description=summary, epilog=EXAMPLES, formatter_class=raw)

    _add_build(add_action("build", "tokenise text into shards"))
    summary = "index tars of tokens that were made elsewhere: sidecars and a manifest beside them"
    index = add_action("index", summary)
    index.add_argument("input", nargs="+", metavar="DIR", help="folder of .tar files")
    index.add_argument("--tokenizer", required=True, metavar="FILE", help="what they were tokenised with")
    index.add_argument("--verify", action="store_true", help="check every hash afterwards")
    verify = add_action("verify", "check every hash and crc32")
    verify.add_argument("manifest", nargs="+", metavar="MANIFEST", help="manifest.json or its folder")
    add_show(add_action("show", "print totals; on request lengths, rows, masks"))


def _add_build(build: argparse.ArgumentParser) -> None:
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
    add_encoding_arguments(build)
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
    _add_chat(build)
    build.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise (1)")
    build.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="tokens per shard (%(default)s)"
    )
    build.add_argument("--verify", action="store_true", help="check every hash afterwards")


def _add_chat(build: argparse.ArgumentParser) -> None:
    chat = build.add_argument_group("dialogues")
    chat.add_argument(
        "--chat",
        action="store_true",
        help="read records with messages, prompt and completion, or ShareGPT's conversations, and mark the answers",
    )
    chat.add_argument(
        "--template",
        metavar="NAME",
        help=f"{', '.join(BUILT_IN)}, or a .jinja file (the tokenizer's own)",
    )
    chat.add_argument(
        "--turns",
        choices=get_args(Turns),
        help="split: one document of each of the assistant's turns, what comes before it being its prompt (the "
        "default); all: one of a dialogue, in which answers are learnt with later turns in sight",
    )
    chat.add_argument("--max-tokens", type=int, metavar="N", help="longest document; else all are taken")
    chat.add_argument(
        "--truncate",
        choices=get_args(Truncate),
        help="longer ones are left out (reject, the default), lose their first questions with what answers them "
        "(left), or their end (right)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the action that was asked for.

    Raises:
        UserError: bad input.
    """
    if args.action == "show":
        return show(args)
    if args.action == "verify":
        return max(_verify(load_manifest(path)) for path in args.manifest)
    return _index(args) if args.action == "index" or args.index else _build(args)


def _build(args: argparse.Namespace) -> int:
    if not args.output:
        raise UserError("--output is missing: the folder to create")
    start = time.perf_counter()
    with _progress() as on_progress, _saying_what_is_kept(args.output):
        manifest = build_corpus(
            args.input,
            args.tokenizer,
            args.output,
            split=args.split,
            workers=args.workers,
            shard_tokens=args.shard_tokens,
            text_key=args.text_key,
            max_document_bytes=args.max_document_bytes,
            encoding=encoding(args),
            skip_damaged=args.skip_damaged,
            chat=_chat_settings(args),
            on_progress=on_progress,
        )
    _report(args.output, manifest, time.perf_counter() - start)
    return _verify(manifest) if args.verify else 0


def _chat_settings(args: argparse.Namespace) -> ChatSettings | None:
    given = {name: getattr(args, name) for name in ("template", "turns", "max_tokens", "truncate")}
    given = {name: value for name, value in given.items() if value is not None}
    if not args.chat:
        if given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')} is for dialogues: say --chat")
        return None
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens}: must be at least 1")
    if args.truncate is not None and args.max_tokens is None:
        raise UserError("--truncate says what becomes of documents beyond --max-tokens, which is missing")
    tokenizer = Tokenizer(args.tokenizer)
    template = ChatTemplate.of(tokenizer, given.pop("template", None))
    if template.stop_ids(tokenizer) == [tokenizer.eos_token_id] and template.name != "plain":
        tell(
            f"chat template {template.name}: what ends an answer ({' '.join(template.stop_texts) or 'nothing'}) is no "
            "token of this tokenizer, so that only <eos> will end a generated one; the template plain does with that"
        )
    return ChatSettings(template, **given)


def _index(args: argparse.Namespace) -> int:
    if args.action == "build" and args.output is not None:
        raise UserError("--index takes no --output: the tars are indexed where they are")
    if args.action == "build" and args.chat:
        raise UserError("--index takes no --chat: tars of dialogues say so by their members")
    codes = [0]
    for folder in args.input:
        start = time.perf_counter()
        with _progress() as on_progress:
            manifest = index_corpus(folder, args.tokenizer, on_progress=on_progress)
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
    if manifest.kind == "chat":
        say(f"{folder}: answers: {answers_line(manifest)}; tokens/document {lengths_line(document_lengths(manifest))}")


def _verify(manifest: Manifest) -> int:
    problems = verify_corpus(manifest)
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
    start = time.perf_counter()
    with progress("starting", transient=True, lines=True) as move:

        def on_progress(done: BuildProgress) -> None:
            rate = done.tokens / (time.perf_counter() - start)
            move(text=f"{done.documents} documents, {done.tokens / 1e6:.2f}M tokens, {rate / 1e6:.2f}M tokens/s")

        yield on_progress
