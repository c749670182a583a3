"""`megatron-md data build | index | verify | show`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from megatron_md.batch import BatchPosition, BoolArray, CleanBatch, Int64Array, Rows
from megatron_md.data.builder import build_corpus
from megatron_md.data.entries import InputError
from megatron_md.data.index import index_corpus
from megatron_md.data.readers import DOCUMENT_BYTES
from megatron_md.data.resume import BuildProgress
from megatron_md.data.shards import Manifest, load_manifest
from megatron_md.data.stream import WINDOW_SHARDS, SequenceStream
from megatron_md.data.survey import document_lengths, unigram_entropy, verify_corpus
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.data.writer import SHARD_TOKENS
from megatron_md.errors import UserError
from megatron_md.messages import printable, progress, say, shown, tell

BAR_WIDTH = 40
MAX_SEQ_LENGTH = 1 << 24
ASSUMED = (
    "masks as in a run on this corpus alone whose global batches all have {} rows (no train.batch_ramp) of full length "
    "(no data.random_length_fraction), with a curriculum at its start"
)
MASKED_STYLE, HEADING_STYLE = "bold white on red", "bold cyan"
EXAMPLES = """examples:
  megatron-md data build --input embedded --split train --tokenizer corpus/tokenizer.model --output corpus/train
  megatron-md data build --input books/ notes.jsonl --tokenizer tokenizer.model --output corpus/books --workers 8
  megatron-md data build --input dump.jsonl.zst tables/ --text-key content --tokenizer t.model --output corpus/dump
  megatron-md data build --input datasets:org/name:config:train --tokenizer llada/tokenizer.json --output corpus/hub
  megatron-md data build --input old/corpus.idx --tokenizer llada/tokenizer.json --output corpus/old
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
    _add_show(add_action("show", "print totals; on request lengths, rows, masks"))


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


def _add_show(show: argparse.ArgumentParser) -> None:
    show.add_argument("manifest", nargs="+", metavar="MANIFEST", help="manifest.json or its folder")
    show.add_argument("--stats", action="store_true", help="read everything: lengths of documents, unigram entropy")
    show.add_argument(
        "--row", type=int, action="append", default=[], metavar="G", help="print row G of the training order"
    )
    show.add_argument(
        "--masks",
        metavar="SCHEDULE",
        help="mark the tokens of these rows that a run with constant batches masks: uniform:0,1",
    )
    show.add_argument("--tokenizer", metavar="FILE", help="print text instead of token ids")
    keys = {
        "seed": (1234, "seed"),
        "seq-length": (256, "data.seq_length"),
        "window-shards": (WINDOW_SHARDS, "data.window_shards"),
        "global-batch-size": (16, "train.global_batch_size, over which mask rates are stratified"),
    }
    for name, (default, key) in keys.items():
        show.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"as the run's {key} ({default})")


def run(args: argparse.Namespace) -> int:
    """Run the action that was asked for.

    Raises:
        UserError: bad input.
    """
    if args.action == "show":
        return _show(args)
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
            skip_damaged=args.skip_damaged,
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


def _show(args: argparse.Namespace) -> int:
    for name in ("seq_length", "window_shards", "global_batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.seq_length > MAX_SEQ_LENGTH:
        raise UserError(f"--seq-length {args.seq_length}: at most {MAX_SEQ_LENGTH} tokens can be shown as a row")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: must be at least 0 and below 2**63, as in a run")
    if args.masks and not args.row:
        raise UserError("--masks marks the tokens of rows: name them with --row G")
    if min(args.row, default=0) < 0:
        raise UserError(f"--row {min(args.row)}: rows are numbered from 0")
    if max(args.row, default=0) >= 2**63:
        raise UserError(f"--row {max(args.row)}: must be below 2**63")
    console = Console(highlight=False, soft_wrap=True)
    for path in args.manifest:
        manifest = load_manifest(path)
        _show_totals(console, manifest)
        if args.stats:
            _show_stats(console, manifest)
        if args.row:
            _show_rows(console, manifest, args)
    return 0


def _show_totals(console: Console, manifest: Manifest) -> None:
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    per_token = manifest.text_bytes / max(1, manifest.tokens)
    facts = {
        "sha256": manifest.sha256,
        "source": manifest.source,
        "tokenizer": f"sha256 {manifest.tokenizer_sha256[:12]}, {manifest.vocab_size} pieces, {manifest.dtype}",
        "shards": f"{len(manifest.shards)}, {size:.2f} MB",
        "documents": f"{manifest.documents}",
        "tokens": f"{manifest.tokens}, {per_token:.3f} bytes of text each",
    }
    console.print(Text(shown(manifest.location)))
    for name, value in facts.items():
        console.print(Text(shown(f"  {name:<16} {value}")))


def _show_stats(console: Console, manifest: Manifest) -> None:
    lengths = document_lengths(manifest)
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).round().astype(int)
    named = zip(("min", "10%", "50%", "90%", "max"), quantiles, strict=True)
    console.print(f"  {'tokens/document':<16} {', '.join(f'{name}: {count}' for name, count in named)}")
    console.print(f"  {'unigram entropy':<16} {unigram_entropy(manifest):.4f} nats/token")
    for first, last, count in length_histogram(lengths):
        bar = "█" * max(1, round(BAR_WIDTH * count / len(lengths))) if count else ""
        console.print(f"  {f'{first}-{last}' if last > first else first!s:>16} {count:>10} {bar}")


def length_histogram(lengths: Int64Array) -> list[tuple[int, int, int]]:
    """(shortest, longest, documents) of bins that double: 0, 1, 2-3, 4-7, ... up to the longest document."""
    # frexp: a length of b binary digits falls into bin b.
    counts = np.bincount(np.frexp(lengths.astype(np.float64))[1])
    return [(2**bits // 2, max(0, 2**bits - 1), count) for bits, count in enumerate(counts.tolist())]


def _show_rows(console: Console, manifest: Manifest, args: argparse.Namespace) -> None:
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer is not None and tokenizer.sha256 != manifest.tokenizer_sha256:
        raise UserError(f"--tokenizer {args.tokenizer}: {manifest.location} was made with another one")
    stream = SequenceStream(
        manifest, seed=args.seed, seq_length=args.seq_length, window_shards=args.window_shards, keep_going=True
    )
    if args.masks:
        console.print(ASSUMED.format(args.global_batch_size))
    for g in args.row:
        rows = stream.rows([g])
        is_masked_L, rate = np.zeros(args.seq_length, dtype=np.bool_), None
        if args.masks:
            is_masked_L, rate = masks_of_row(rows, args.masks, args.seed, args.global_batch_size, manifest.mask_id)
        _show_row(console, rows, is_masked_L, rate, tokenizer)


def masks_of_row(
    rows: Rows, schedule: str, seed: int, global_batch_size: int, mask_token_id: int
) -> tuple[BoolArray, float]:
    """is_masked_L of a single row and its mask rate, from the very code that corrupts it in training.

    Args:
        rows: one row.
        schedule: the run's `objective.mask_schedule`; a curriculum is taken at its start.
        seed: the run's seed.
        global_batch_size: rows per step, of which g's batch is the (g // size)-th.
        mask_token_id: the mask token.

    Raises:
        UserError: the schedule is malformed.
    """
    from megatron_md.config import ObjectiveConfig
    from megatron_md.diffusion.objective import build_objective

    objective = build_objective(ObjectiveConfig(mask_schedule=schedule), seed=seed, mask_token_id=mask_token_id)
    g = int(rows.sample_index_B[0])
    position = BatchPosition(g - g % global_batch_size, global_batch_size)
    corrupted = objective.corrupt(CleanBatch(**vars(rows), position=position))
    is_masked_L = np.zeros(rows.tokens_BL.shape[1], dtype=np.bool_)
    is_masked_L[corrupted.positions_M] = True
    return is_masked_L, float(corrupted.mask_rate_B[0])


def _show_row(
    console: Console, rows: Rows, is_masked_L: BoolArray, rate: float | None, tokenizer: Tokenizer | None
) -> None:
    """Print one row, document by document; masked tokens are coloured, and bracketed where there are no colours."""
    masked = f", t = {rate:.4f}, {int(is_masked_L.sum())} masked" if rate is not None else ""
    maskable = int(rows.is_maskable_BL.sum())
    console.print(Text(f"row {rows.sample_index_B[0]}: {maskable} maskable tokens{masked}", style=HEADING_STYLE))
    assert rows.cu_seqlens is not None
    opening, closing = ("", "") if console.color_system else ("⟦", "⟧")
    for number, (begin, end) in enumerate(pairwise(rows.cu_seqlens[0].tolist()), start=1):
        is_text = bool(rows.is_maskable_BL[0, begin])
        kind = f"document {number}" if is_text else "left out: damaged, or padding" if rows.damaged else "padding"
        console.print(Text(f"── {kind}, positions {begin} to {end - 1}", style=HEADING_STYLE))
        if not is_text:
            continue
        line = Text()
        # Runs of equally treated tokens, as one token may be a part of a character only.
        cuts = np.flatnonzero(np.diff(is_masked_L[begin:end])) + 1 + begin
        for first, stop in pairwise([begin, *cuts.tolist(), end]):
            tokens_n = rows.tokens_BL[0, first:stop]
            text = (
                printable(tokenizer.decode(tokens_n, show_special=True), multiline=True)
                if tokenizer
                else " ".join(map(str, tokens_n))
            )
            separator = "" if tokenizer else " "
            if is_masked_L[first]:
                line.append(f"{opening}{text}{closing}", style=MASKED_STYLE)
            else:
                line.append(text)
            line.append(separator)
        console.print(line)
