"""Compressed files: every cut is noticed, several frames are one file, bombs stay small."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from megatron_md.data.entries import Document, InputError, Rejection
from tests.data.test_readers import TEXTS, json_lines, read, zstd


def test_several_compressed_frames_are_one_file(tmp_path: Path) -> None:
    halves = [json_lines(TEXTS[:1]), json_lines(TEXTS[1:])]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(map(zstd, halves)))
    assert [entry.text for entry in read(tmp_path) if isinstance(entry, Document)] == TEXTS * 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_cut_of_a_compressed_file_is_noticed(tmp_path: Path, suffix: str) -> None:
    data = (gzip.compress if suffix == ".gz" else zstd)(json_lines([str(n**9) * 90 for n in range(300)]))
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in range(1, len(data), len(data) // 30):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"a\.jsonl.*damaged or cut compressed data after \d+ bytes"):
            read(path)
    path.write_bytes(data[:-1])
    *before, last = read(path, skip_damaged=True)
    assert len(before) > 200 and isinstance(last, Rejection) and last.reason == "damaged file"
    assert last.name == path.name and "restore the file" in last.detail


READ_ALL = """
import resource, sys
from megatron_md.data.corpus import documents
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
for path in sys.argv[1:]:
    *_, last = documents([path], skip_damaged=True)
    print(last.name, last.reason)
print(peak() - before)
"""


def test_bombs_stay_small(tmp_path: Path) -> None:
    """In a process of its own, whose memory grows by less than half of a bomb, whatever the bomb is."""
    pytest.importorskip("zstandard")
    size, expected = 192 << 20, {"tar": "decompression bomb", "txt": "too long", "jsonl": "decompression bomb"}
    header = tarfile.TarInfo("x.txt")
    header.size = size
    bombs = []
    for kind in expected:
        start = header.tobuf() if kind == "tar" else b""
        for suffix in (".gz", ".zst"):
            bombs.append(tmp_path / f"bomb.{kind}{suffix}")
            if suffix == ".zst":
                bombs[-1].write_bytes(zstd(start + bytes(size)))
                continue
            with gzip.open(bombs[-1], "wb") as file:
                file.write(start)
                for _ in range(size >> 20):
                    file.write(bytes(1 << 20))
    assert max(bomb.stat().st_size for bomb in bombs) < 1 << 20
    program = [sys.executable, "-c", READ_ALL, *map(str, bombs)]
    *said, megabytes = subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [f"{bomb.name} {expected[bomb.suffixes[0][1:]]}" for bomb in bombs]
    assert float(megabytes) < 90
