"""What a conversion costs: minutes and memory of Hugging Face -> Megatron -> Hugging Face, and that no byte changes.

    python benchmarks/conversion.py llada 8b --folder /a/disk/with/32/GB

Makes a folder of random bf16 weights, converts it there and back with `megatron-md convert`, compares hashes of all
files, and removes everything again, also when it fails. Each stage goes when the next one stands, so that two copies of
the model are the most that lie on the disk. Memory is that of the converting process, sampled every 20 ms: what it has
to itself (RssAnon), apart from the pages of files, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.checkpoint.hf.folder import plan_shards, write_folder
from megatron_md.checkpoint.hf.tensors import moves
from megatron_md.config import ResolvedModel

TINY = dict(layers=4, hidden=256, heads=4, ffn=512, vocab=4099, max_length=512, tied=False)
LLADA_8B = dict(layers=32, hidden=4096, heads=32, ffn=12288, vocab=126464, max_length=4096, tied=False)
SIZES: dict[str, dict[str, Any]] = {"tiny": TINY, "8b": {**LLADA_8B, "rope_theta": 500000.0}}
SAMPLE_SECONDS = 0.02


def make_folder(directory: Path, family_name: str, size: str) -> tuple[int, int]:
    """A folder of random weights, one file of at most 1 GB in memory at a time; parameters and tensors."""
    family = FAMILIES[family_name]
    model = ResolvedModel(
        **SIZES[size], qkv_bias=family_name in ("qwen2", "dream"), qk_norm=family_name in ("qwen3", "sdar")
    )  # fmt: skip
    shapes = {
        name: shape for move in moves(family, model) for name, shape in zip(move.theirs, move.shapes, strict=True)
    }
    generator = torch.Generator().manual_seed(7)

    def read(name: str) -> torch.Tensor:
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    keys = {"block_size": 4} if family.in_blocks else {}
    directory.mkdir()
    write_folder(
        directory,
        config=json.dumps(family.write_config(model, keys, model.max_length), indent=2).encode(),
        shards=plan_shards({name: 2 * math.prod(shape) for name, shape in shapes.items()}),
        read=read,
        companions={},
    )
    return sum(math.prod(shape) for shape in shapes.values()), len(shapes)


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder."""
    found = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def anonymous_bytes(process: int) -> int:
    """Memory that a process holds itself, now; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def convert(words: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak anonymous memory in bytes of `megatron-md convert`.

    Raises:
        CalledProcessError: it failed.
    """
    start, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "megatron_md", "convert", *words]
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, peak


def measure(family: str, size: str, folder: Path) -> dict[str, Any]:
    """Convert there and back below a folder; figures by name."""
    source, run, back = folder / "source", folder / "run", folder / "back"
    parameters, tensors = make_folder(source, family, size)
    expected = hashes(source)
    total = sum(path.stat().st_size for path in source.iterdir())
    into = convert([str(source), str(run), "--family", family, "--to", "megatron"])
    shutil.rmtree(source)
    out = convert([str(run), str(back), "--family", family, "--to", "hf"])
    return {
        "parameters": parameters,
        "tensors": tensors,
        "bytes": total,
        "identical": hashes(back) == expected,
        "to megatron": {"seconds": into[0], "anonymous_bytes": into[1]},
        "to hf": {"seconds": out[0], "anonymous_bytes": out[1]},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--folder", help="where to write; a temporary folder if left out")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(args.family, args.size, Path(folder))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{args.family} {args.size}: {platform.processor() or platform.machine()}, commit {commit}")
    print(f"  {found['parameters']:,} parameters, {found['tensors']} tensors, {found['bytes']:,} bytes")
    for name in ("to megatron", "to hf"):
        figures = found[name]
        print(f"  {name:12s} {figures['seconds']:7.1f} s   {figures['anonymous_bytes'] / 2**30:6.2f} GiB at most")
    print("  identical, to the byte" if found["identical"] else "  NOT identical")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
