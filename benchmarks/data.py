"""Tokens per second of the data layer on one core, against Megatron's IndexedDataset and stock webdataset.

    python benchmarks/data.py
    python benchmarks/data.py --build tokenizer.model --workers 2
    python benchmarks/data.py --memory 20

Readers of the same made-up documents (lengths log-normal) take turns, so that a noisy machine is noisy for all of them.
Ours does all its work: documents in random order, crc32 of each, packed with <eos> into rows of L, document
boundaries and which tokens may be masked, int64 out, a new stream every time. IndexedDataset and webdataset do less:
sequential, no checks, no packing, no boundaries. Files are in the page cache. Rates are per second of CPU time, which
other processes disturb less than the clock does; the clock's are printed beside them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_md.data.builder import build_shards
from megatron_md.data.corpus import EMBEDDED, documents
from megatron_md.data.shards import Manifest, load_manifest
from megatron_md.data.stream import SequenceStream
from megatron_md.data.writer import Tokenised, Vocabulary, write_corpus

VOCABULARY = Vocabulary(50_000, 2, 3, 1, "0" * 64)
ROWS = 8
RESUME_STEPS, RESUME_BATCH = (10, 10_000, 1_000_000), 128
Reader = Callable[[], int]


def made_up_documents(tokens: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Documents of some 600 tokens, a few of them very long, `tokens` in all."""
    random = np.random.default_rng(seed)
    while tokens > 0:
        length = min(tokens, 1 + int(random.lognormal(5.7, 1.2)))
        yield random.integers(4, VOCABULARY.size, length, dtype=np.uint16)
        tokens -= length


def write_shards(tokens: int, folder: Path, shard_tokens: int) -> Manifest:
    batches = ([Tokenised(document, 0)] for document in made_up_documents(tokens))
    return write_corpus(batches, VOCABULARY, folder, shard_tokens=shard_tokens)


def write_indexed(tokens: int, prefix: Path) -> Any:
    # Imported here, so that the builder's processes, which import this file, need not wait for it.
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in made_up_documents(tokens):
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return IndexedDataset(str(prefix))


def readers(manifest: Manifest, indexed: Any, seq_length: int) -> dict[str, Reader]:
    """Each reads everything once and returns the number of tokens that it has seen."""
    import webdataset

    shards = [str(manifest.directory / shard.name) for shard in manifest.shards]

    def ours() -> int:
        stream = SequenceStream(manifest, seed=time.perf_counter_ns(), seq_length=seq_length)
        count = 0
        for g in range(0, stream.rows_per_epoch, ROWS):
            rows = stream.rows(range(g, min(g + ROWS, stream.rows_per_epoch)))
            assert rows.tokens_BL.dtype == np.int64 and len(rows.cu_seqlens or ()) == len(rows.tokens_BL)
            count += rows.tokens_BL.size
        return count

    def indexed_views() -> int:
        return sum(len(indexed[number]) for number in range(len(indexed)))

    def indexed_int64() -> int:
        return sum(len(indexed[number].astype(np.int64)) for number in range(len(indexed)))

    def stock() -> int:
        samples = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None)
        return sum(np.frombuffer(sample["tokens.bin"], "<u2").astype(np.int64).size for sample in samples)

    return {
        "ours, everything": ours,
        "IndexedDataset, sequential, int64": indexed_int64,
        "IndexedDataset, sequential, tokens not touched": indexed_views,
        "webdataset, blocks, int64": stock,
    }


def compare(args: argparse.Namespace, folder: Path) -> None:
    manifest = write_shards(args.tokens, folder / "shards", args.shard_tokens)
    contenders = readers(manifest, write_indexed(args.tokens, folder / "indexed"), args.seq_length)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for repeat in range(args.repeats + 1):
        for name, reader in contenders.items():
            cpu, clock = time.process_time(), time.perf_counter()
            count = reader()
            assert count >= args.tokens, f"{name} saw {count} of {args.tokens} tokens"
            if repeat:  # the first round fills the page cache
                rates[name].append((count / (time.process_time() - cpu), count / (time.perf_counter() - clock)))
    print(
        f"{manifest.tokens / 1e6:.0f}M tokens in {manifest.documents} documents and {len(manifest.shards)} shards, "
        f"rows of {args.seq_length}, {args.repeats} repeats"
    )
    ours = rates["ours, everything"]
    for name, values in rates.items():
        cpu, clock = (statistics.median(value) / 1e6 for value in zip(*values, strict=True))
        ratio = statistics.median(mine[0] / other[0] for mine, other in zip(ours, values, strict=True))
        print(
            f"  {name:48s} {cpu:7.1f}M tokens/s of one core ({clock:7.1f}M by the clock)   ours is {ratio:.2f}x as fast"
        )


def measure_resume(args: argparse.Namespace, folder: Path) -> None:
    """From an open manifest to the first global batch, early and after hundreds of epochs of a small corpus."""
    manifest = write_shards(1_300_000, folder / "small", 26_000)
    medians = []
    for step in RESUME_STEPS:
        seconds = []
        for seed in range(2 * args.repeats + 1):
            start = time.perf_counter()
            stream = SequenceStream(manifest, seed=seed, seq_length=512)
            stream.rows(range(step * RESUME_BATCH, (step + 1) * RESUME_BATCH))
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds))
        epoch = step * RESUME_BATCH // stream.rows_per_epoch
        print(
            f"resume at step {step:,} (epoch {epoch:,} of {len(manifest.shards)} shards): "
            f"{medians[-1] * 1e3:.1f} ms for {RESUME_BATCH} rows, {medians[-1] / medians[0]:.2f}x the first"
        )


def measure_build(args: argparse.Namespace, folder: Path) -> None:
    """Builds Python's standard library from text; the time holds the start of the processes."""
    start, before = time.perf_counter(), os.times()
    manifest = build_shards(documents([EMBEDDED]), args.build, folder / "built", workers=args.workers)
    seconds = time.perf_counter() - start
    times = [now - then for now, then in zip(os.times()[:4], before[:4], strict=True)]
    own, cpu = sum(times[:2]), sum(times)  # of this process, and with those that it has waited for
    print(
        f"builder, SentencePiece of {manifest.vocab_size} pieces, {args.workers} processes: "
        f"{manifest.text_bytes / 1e6:.1f} MB of text in {seconds:.1f} s: "
        f"{manifest.text_bytes / seconds / 1e6:.2f} MB/s, {manifest.tokens / seconds / 1e6:.2f}M tokens/s; "
        f"{cpu:.1f} s of CPU time ({own:.2f} s of it in the process that reads and writes): "
        f"{manifest.tokens / cpu / 1e6:.2f}M tokens/s of one core"
    )


def measure_memory(args: argparse.Namespace, folder: Path) -> None:
    """Resident memory over many epochs; the indexes of the windows in use count."""
    path = folder / "shards"
    manifest = load_manifest(path) if path.exists() else write_shards(args.tokens, path, args.shard_tokens)
    stream = SequenceStream(manifest, seed=0, seq_length=args.seq_length)
    process, samples, rows = psutil.Process(), [], args.memory * stream.rows_per_epoch
    for g in range(0, rows, ROWS):
        stream.rows(range(g, g + ROWS))
        if g % max(ROWS, rows // 100 // ROWS * ROWS) == 0:
            memory = process.memory_full_info()
            samples.append((memory.rss / 1e6, memory.uss / 1e6))
    print(f"memory over {args.memory} epochs ({rows * args.seq_length / 1e9:.2f}G tokens), {len(samples)} samples:")
    quarter = len(samples) // 4
    for name, values in zip(("resident", "of it not shared"), zip(*samples, strict=True), strict=True):
        parts = [values[first : first + quarter] for first in range(0, 4 * quarter, quarter)]
        print(f"  {name}: largest in each quarter " + ", ".join(f"{max(part):.0f}" for part in parts) + " MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--shard-tokens", type=int, default=4_000_000)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--build", metavar="TOKENIZER", help="measure the builder with this SentencePiece model")
    parser.add_argument("--workers", type=int, default=2, help="processes of the builder")
    parser.add_argument("--memory", type=int, default=0, metavar="EPOCHS", help="watch memory over so many epochs")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = (
        f"Python {platform.python_version()}, numpy {np.__version__}, webdataset {metadata.version('webdataset')}"
    )
    print(f"{processor()}, {os.cpu_count()} cores, {versions}, commit {commit}")
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))
        measure_resume(args, Path(folder))
        if args.memory:
            measure_memory(args, Path(folder))
        if args.build:
            measure_build(args, Path(folder))


def processor() -> str:
    """Name of the CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
