"""`megatron-md data show`: a corpus' totals, lengths, rows, masks; of dialogues, what is prompt and what is answer."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from megatron_md.batch import BatchPosition, BoolArray, CleanBatch, Int64Array, Rows
from megatron_md.commands.arguments import check_folder_of, positive
from megatron_md.config import ChatConfig, Config, DataConfig
from megatron_md.config.loader import apply_overrides, validate
from megatron_md.data.chat_rows import DialogueStream
from megatron_md.data.shards import Manifest, load_manifest
from megatron_md.data.stream import WINDOW_SHARDS, RowStream, SequenceStream, cut
from megatron_md.data.survey import document_lengths, token_counts, unigram_entropy
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.errors import UserError
from megatron_md.files import replace_file
from megatron_md.messages import printable, shown

BAR_WIDTH = 40
MAX_SEQ_LENGTH = 1 << 24
ASSUMED = (
    "masks as in a run on this corpus alone whose global batches all have {} rows (no train.batch_ramp) of full length "
    "(no data.random_length_fraction), with a curriculum at its start"
)
ASSUMED_OF_DIALOGUES = (
    "masks as in a run on this corpus alone whose global batches all have {} rows (no train.batch_ramp), with a "
    "curriculum at its start"
)
ANSWER_STYLE, MASKED_STYLE, HEADING_STYLE = "green", "bold white on red", "bold cyan"


def add_show(show: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
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
    show.add_argument(
        "--chat",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of dialogues, as in the run's data.chat: rows=packed eos_padding=one",
    )
    show.add_argument("--counts", type=Path, metavar="FILE", help="write how often each token occurs, as a JSON list")
    show.add_argument("--max-tokens", type=positive, metavar="N", help="as the run's data.max_tokens (all tokens)")
    keys = {
        "seed": (1234, "seed"),
        "seq-length": (256, "data.seq_length"),
        "window-shards": (WINDOW_SHARDS, "data.window_shards"),
        "global-batch-size": (16, "train.global_batch_size, over which mask rates are stratified"),
    }
    for name, (default, key) in keys.items():
        show.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"as the run's {key} ({default})")


def show(args: argparse.Namespace) -> int:
    """Print what was asked for.

    Raises:
        UserError: bad input.
    """
    for name in ("seq_length", "window_shards", "global_batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.seq_length > MAX_SEQ_LENGTH:
        raise UserError(f"--seq-length {args.seq_length}: at most {MAX_SEQ_LENGTH} tokens can be shown as a row")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: must be at least 0 and below 2**63, as in a run")
    check_folder_of(args.counts, "--counts ")
    if args.counts is not None and len(args.manifest) > 1:
        raise UserError("--counts takes one corpus")
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
        if args.counts is not None:
            replace_file(args.counts, json.dumps(token_counts(manifest).tolist()) + "\n")
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
    if manifest.kind == "chat":
        match manifest.source:
            case {"chat": {"template": {"name": name}} as chat}:
                # Its Jinja is long, and in the manifest.
                facts["source"] = {**manifest.source, "chat": {**chat, "template": name}}
        facts["answers"] = answers_line(manifest)
        facts["lengths"] = lengths_line(document_lengths(manifest))
    console.print(Text(shown(manifest.location)))
    for name, value in facts.items():
        console.print(Text(shown(f"  {name:<16} {value}")))


def _show_stats(console: Console, manifest: Manifest) -> None:
    lengths = document_lengths(manifest)
    console.print(f"  {'tokens/document':<16} {lengths_line(lengths)}")
    console.print(f"  {'unigram entropy':<16} {unigram_entropy(manifest):.4f} nats/token")
    for first, last, count in length_histogram(lengths):
        bar = "█" * max(1, round(BAR_WIDTH * count / len(lengths))) if count else ""
        console.print(f"  {f'{first}-{last}' if last > first else first!s:>16} {count:>10} {bar}")


def lengths_line(lengths: Int64Array) -> str:
    """The spread of documents' lengths."""
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 0.99, 1]).round().astype(int)
    named = zip(("min", "10%", "50%", "90%", "99%", "max"), quantiles, strict=True)
    return ", ".join(f"{name}: {count}" for name, count in named)


def answers_line(manifest: Manifest) -> str:
    """How much of a corpus of dialogues is answers."""
    return f"{manifest.answer_tokens} tokens, {manifest.answer_tokens / max(1, manifest.tokens):.1%} of all"


def length_histogram(lengths: Int64Array) -> list[tuple[int, int, int]]:
    """(shortest, longest, documents) of bins that double: 0, 1, 2-3, 4-7, ... up to the longest document."""
    # frexp: a length of b binary digits falls into bin b.
    counts = np.bincount(np.frexp(lengths.astype(np.float64))[1])
    return [(2**bits // 2, max(0, 2**bits - 1), count) for bits, count in enumerate(counts.tolist())]


def _show_rows(console: Console, manifest: Manifest, args: argparse.Namespace) -> None:
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer is not None and tokenizer.sha256 != manifest.tokenizer_sha256:
        raise UserError(f"--tokenizer {args.tokenizer}: {manifest.location} was made with another one")
    stream, chat = _row_stream(manifest, args)
    if args.masks:
        console.print((ASSUMED if chat is None else ASSUMED_OF_DIALOGUES).format(args.global_batch_size))
    for g in args.row:
        rows = stream.rows([g])
        if chat is not None:
            rows = cut(rows, _row_length(stream, chat, g, args))
        is_masked_L, rate = np.zeros(rows.tokens_BL.shape[1], dtype=np.bool_), None
        if args.masks:
            is_masked_L, rate = masks_of_row(rows, args.masks, args.seed, args.global_batch_size, manifest.mask_id)
        _show_row(console, rows, is_masked_L, rate, tokenizer, is_chat=chat is not None)


def _row_stream(manifest: Manifest, args: argparse.Namespace) -> tuple[RowStream, ChatConfig | None]:
    """The rows of a run on this corpus, and the keys of `data.chat` that they depend on: None for a corpus of text.

    Raises:
        UserError: these keys are not sound, or the corpus has no use for them.
    """
    options: dict[str, Any] = {"seed": args.seed, "seq_length": args.seq_length, "keep_going": True}
    options["max_tokens"] = args.max_tokens
    if manifest.kind == "text":
        if args.chat:
            raise UserError(f"--chat {args.chat[0]}: {manifest.location} is a corpus of text")
        return SequenceStream(manifest, window_shards=args.window_shards, **options), None
    keys: dict[str, object] = {}
    overridden = apply_overrides(keys, args.chat)
    chat = validate(ChatConfig, keys, "--chat", overridden)
    return DialogueStream(manifest, chat, **options), chat


def _row_length(stream: RowStream, chat: ChatConfig, g: int, args: argparse.Namespace) -> int:
    """Tokens of row g in a run with constant batches."""
    from megatron_md.train.progress import row_length_at

    size = args.global_batch_size
    config = Config(data=DataConfig(seq_length=args.seq_length, chat=chat))
    return row_length_at(config, g - g % size, size, stream)


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
    console: Console,
    rows: Rows,
    is_masked_L: BoolArray,
    rate: float | None,
    tokenizer: Tokenizer | None,
    *,
    is_chat: bool,
) -> None:
    """Print one row, document by document; masked tokens and answers are coloured, or bracketed without colours."""
    masked = f", t = {rate:.4f}, {int(is_masked_L.sum())} masked" if rate is not None else ""
    maskable = int(rows.is_maskable_BL.sum())
    console.print(Text(f"row {rows.sample_index_B[0]}: {maskable} maskable tokens{masked}", style=HEADING_STYLE))
    assert rows.cu_seqlens is not None
    # By how a run of tokens is treated: as any text or prompt, as an answer, as masked.
    styles = ("", ANSWER_STYLE, MASKED_STYLE)
    brackets = (("", ""), ("⟪", "⟫"), ("⟦", "⟧")) if console.color_system is None else (("", ""),) * 3
    treatment_L = np.where(is_masked_L, 2, rows.is_maskable_BL[0] & is_chat)
    for number, (begin, end) in enumerate(pairwise(rows.cu_seqlens[0].tolist()), start=1):
        is_text = bool(rows.is_maskable_BL[0, begin:end].any())
        kind = f"document {number}" if is_text else "left out: damaged, or padding" if rows.damaged else "padding"
        console.print(Text(f"── {kind}, positions {begin} to {end - 1}", style=HEADING_STYLE))
        if not is_text:
            continue
        line = Text()
        # Runs of equally treated tokens, as one token may be a part of a character only.
        cuts = np.flatnonzero(np.diff(treatment_L[begin:end])) + 1 + begin
        for first, stop in pairwise([begin, *cuts.tolist(), end]):
            tokens_n = rows.tokens_BL[0, first:stop]
            text = (
                printable(tokenizer.decode(tokens_n, show_special=True), multiline=True)
                if tokenizer
                else " ".join(map(str, tokens_n))
            )
            opening, closing = brackets[treatment_L[first]]
            line.append(f"{opening}{text}{closing}", style=styles[treatment_L[first]])
            line.append("" if tokenizer else " ")
        console.print(line)
