"""Indexing of tars made elsewhere: ours come out the same; the damages and abuses are named, nothing is executed."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megatron_md.batch import DamagedDocument
from megatron_md.data.builder import build_shards
from megatron_md.data.entries import Document
from megatron_md.data.index import index_corpus
from megatron_md.data.shards import ShardError, load_manifest
from megatron_md.data.stream import SequenceStream
from megatron_md.data.survey import verify_corpus
from megatron_md.data.tokenizer import Tokenizer
from tests.data.small_corpus import all_documents

SIZES = {"shard_tokens": 6000, "block_bytes": 2000}
Members = list[tuple[str, bytes]]


@pytest.fixture
def tars(tokenizer: Tokenizer, code: list[Document], tmp_path: Path) -> Path:
    """A folder with the bare tars of a build, whose own folder is `built`."""
    build_shards(code[:40], tokenizer.path, tmp_path / "built", **SIZES)
    (tmp_path / "tars").mkdir()
    for path in (tmp_path / "built").glob("*.tar"):
        shutil.copy(path, tmp_path / "tars")
    return tmp_path / "tars"


def pair(key: str, documents: list[list[int]], dtype: str = "<u2") -> Members:
    tokens = np.concatenate([np.array(tokens, dtype) for tokens in documents])
    lengths = np.array([len(tokens) for tokens in documents], "<u4")
    return [(f"{key}.tokens.bin", tokens.tobytes()), (f"{key}.lengths.bin", lengths.tobytes())]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_our_own_tars_are_indexed_as_they_were_built(tars: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = index_corpus(tars, tokenizer.path)
    for name in [*(shard.name for shard in manifest.shards), *(shard.index for shard in manifest.shards)]:
        assert (tars / name).read_bytes() == (tmp_path / "built" / name).read_bytes()
    assert manifest.documents == 40 and manifest.source["indexed"] is True and verify_corpus(manifest) == []
    assert (tars / "rejected.jsonl").exists() is False
    with pytest.raises(ValueError, match=r"manifest\.json: exists; check it with `data verify`"):
        index_corpus(tars, tokenizer.path)


def test_tars_of_stock_webdataset_in_any_order_and_width(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [[5, 6, 7], [], [8], [9, 10]]
    (tmp_path / "tars").mkdir()
    with webdataset.TarWriter(str(tmp_path / "tars" / "other.tar")) as writer:
        for key, part in (("x", documents[:2]), ("y", documents[2:])):
            (_, tokens), (_, lengths) = pair(key, part, "<u4")
            # The writer sorts the members of a sample: lengths come first.
            writer.write({"__key__": key, "tokens.bin": tokens, "lengths.bin": lengths})
    manifest = index_corpus(tmp_path / "tars", tokenizer.path)
    assert all_documents(manifest) == documents and manifest.dtype == "uint32"
    assert manifest.text_bytes == sum(len(tokenizer.decode(tokens).encode()) for tokens in documents)


def layout(path: Path) -> list[tuple[int, int, int]]:
    """Header, data begin and data end of every member."""
    with tarfile.open(path) as tar:
        return [(info.offset, info.offset_data, info.offset_data + info.size) for info in tar]


def damage(path: Path, kind: str) -> None:
    """One of the six damages, at the third member (the second block of documents)."""
    header, begin, end = layout(path)[2]
    data = bytearray(path.read_bytes())
    if kind == "cut at a member boundary":
        del data[header:]
    elif kind == "cut inside a header":
        del data[header + 100 :]
    elif kind == "cut inside data":
        del data[begin + 100 :]
    elif kind == "flipped header byte":
        data[header + 3] ^= 1
    elif kind == "zeroed member":
        data[header:end] = bytes(end - header)
    else:
        data[begin + 1] ^= 0x40
    path.write_bytes(data)


DAMAGES = {
    "cut at a member boundary": ("no end marker: the file is cut at a member boundary", "bytes instead of"),
    "cut inside a header": ("the file ends inside a header", "bytes instead of"),
    "cut inside data": ("the file ends inside member", "bytes instead of"),
    "flipped header byte": ("damaged header", "damaged header"),
    "zeroed member": ("a zeroed member", "is damaged: its crc32 differs"),
    "flipped data byte": ("holds token", "is damaged: its crc32 differs"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_six_damages_before_indexing(tars: Path, tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    built = np.load(tmp_path / "built" / "shard-000001.index.npy")
    path = tars / "shard-000001.tar"
    first = int(np.searchsorted(built["offset"], layout(path)[2][0]))
    damage(path, kind)
    before = sorted(file.name for file in tars.iterdir())
    with pytest.raises(ShardError, match=r"shard-000001\.tar: ") as caught:
        index_corpus(tars, tokenizer.path)
    assert DAMAGES[kind][0] in str(caught.value)
    assert f"document {first}" in str(caught.value) or f"documents from {first} on" in str(caught.value)
    assert sorted(file.name for file in tars.iterdir()) == before


def documents_behind(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The index of a shard, its documents from the third member on, and those in that member."""
    index = np.load(path.with_suffix(".index.npy"))
    behind = np.flatnonzero(index["offset"] >= layout(path)[2][0])
    return index, behind, behind[index["offset"][behind] < layout(path)[2][2]]


@pytest.mark.parametrize("kind", DAMAGES)
def test_six_damages_after_indexing(tars: Path, tokenizer: Tokenizer, kind: str) -> None:
    manifest = index_corpus(tars, tokenizer.path)
    path = tars / "shard-000001.tar"
    index, behind, block = documents_behind(path)
    damage(path, kind)
    problems = verify_corpus(manifest)
    assert all("shard-000001.tar: " in problem and DAMAGES[kind][1] in problem for problem in problems)
    if kind.startswith("cut"):
        # The first document of the cut block may lie wholly before the cut.
        sound = int(index["offset"][behind[0]] + 2 * index["tokens"][behind[0]] <= path.stat().st_size)
        assert len(problems) == 1
        assert f"; document {behind[sound]} and {len(behind) - sound - 1} after it are lost" in problems[0]
    elif kind == "flipped header byte":
        assert len(problems) == 1 and f"before document {behind[0]}" in problems[0]
    else:
        damaged = block if kind == "zeroed member" else block[:1]
        assert len(problems) == len(damaged)
        assert all(f": document {number} (" in text for number, text in zip(damaged, problems, strict=True))


@pytest.mark.parametrize("kind", DAMAGES)
def test_six_damages_on_the_way_to_training(tars: Path, tokenizer: Tokenizer, kind: str) -> None:
    """A cut shard stops a run with the documents that it lacks; of the others, served + left out = the total."""
    manifest = index_corpus(tars, tokenizer.path)
    path = tars / "shard-000001.tar"
    index, behind, block = documents_behind(path)
    damage(path, kind)
    stream = SequenceStream(manifest, seed=1, seq_length=64, window_shards=2, keep_going=True)
    if kind.startswith("cut"):
        lost = [n for n in behind if index["offset"][n] + 2 * index["tokens"][n] > path.stat().st_size]
        message = rf"shard-000001\.tar: .* instead of \d+; document {lost[0]} and {len(lost) - 1} after it are lost;"
        for refused in (lambda: load_manifest(tars), lambda: stream.rows(range(stream.rows_per_epoch))):
            with pytest.raises(ShardError, match=message):
                refused()
        return
    rows = stream.rows(range(stream.rows_per_epoch))
    # No document lies in a header, and none is found by it.
    damaged = {"flipped header byte": block[:0], "zeroed member": block, "flipped data byte": block[:1]}[kind]
    assert rows.damaged == {
        DamagedDocument(manifest.sha256, path.name, number, int(index["tokens"][number])) for number in damaged.tolist()
    }
    left_out = int(index["tokens"][damaged].sum()) + len(damaged)
    assert rows.is_maskable_BL.sum() + left_out == manifest.tokens + manifest.documents


def test_a_flip_that_only_a_checksum_can_tell(tars: Path, tokenizer: Tokenizer) -> None:
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(tars.glob("*.tar")))
    path = tars / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[layout(path)[0][1]] ^= 1
    path.write_bytes(data)
    (tars / "SHA256SUMS").write_text(sums)
    with pytest.raises(ShardError, match=r"shard-000000\.tar: its sha256 is not that of SHA256SUMS"):
        index_corpus(tars, tokenizer.path)
    data[layout(path)[0][1]] ^= 1
    path.write_bytes(data)
    assert index_corpus(tars, tokenizer.path).documents == 40
    (tars / "manifest.json").unlink()
    (tars / "SHA256SUMS").write_text(sums + "what\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS: line \d+ is not"):
        index_corpus(tars, tokenizer.path)


class Bait:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize(
    "name", ["evil.pyd", "evil.pickle", "x.json", "../a.tokens.bin", "/a.tokens.bin", "b/../../a.tokens.bin"]
)
def test_foreign_members_are_refused_and_nothing_is_executed(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    bait = pickle.dumps(Bait(tmp_path / "executed"))
    write_tar(tmp_path / "tars" / "a.tar", [*pair("x", [[5], [6]]), (name, bait)])
    with pytest.raises(ShardError, match=r"a\.tar: member '.*' at document 2: (unsafe name|neither \.tokens\.bin)"):
        index_corpus(tmp_path / "tars", tokenizer.path)
    assert [file.name for file in tmp_path.rglob("*")] == ["tars", "a.tar"]


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
                                  tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE])  # fmt: skip
def test_members_that_are_no_regular_files_are_refused(tokenizer: Tokenizer, tmp_path: Path, type: bytes) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("x.tokens.bin")
        info.type, info.linkname = type, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ShardError, match=r"a\.tar: member 'x\.tokens\.bin' at document 0: not a regular file"):
        index_corpus(tmp_path / "tars", tokenizer.path)


CAPPED = """
import resource, sys
from pathlib import Path
from megatron_md.data.corpus import documents
from megatron_md.data.index import index_corpus
from megatron_md.data.tokenizer import Tokenizer

Tokenizer(sys.argv[1])
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20),) * 2)
try:
    bytearray(80 << 20)
    sys.exit("the cap does not hold")
except MemoryError:
    pass
for folder in sys.argv[2:]:
    try:
        index_corpus(folder, sys.argv[1])
    except ValueError as error:
        print(str(error).removeprefix(f"{folder}/"))
    print(*(f"{entry.name} {entry.reason}" for entry in documents([folder], skip_damaged=True)))
"""


def test_abuse_is_refused_under_a_memory_cap(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """64 MiB beyond the imports; the members claim or hold (as holes in the file) more than that."""
    abuses = {
        "huge": ("x.tokens.bin", (8 << 30) - 1, 0),
        "claim": ("x.tokens.bin", 1 << 30, 0),
        "pickle": ("evil.pickle", 256 << 20, 256 << 20),
        "pyd": ("evil.pyd", 256 << 20, 256 << 20),
        "lengths": ("x.lengths.bin", 256 << 20, 256 << 20),
        "pax": ("x.tokens.bin", 256 << 20, 256 << 20),
    }
    for name, (member, claimed, held) in abuses.items():
        header = tarfile.TarInfo(member)
        header.size, header.type = claimed, tarfile.XHDTYPE if name == "pax" else tarfile.REGTYPE
        (tmp_path / name).mkdir()
        with (tmp_path / name / "a.tar").open("wb") as file:
            file.write(header.tobuf(tarfile.USTAR_FORMAT))
            file.truncate(512 + held + (1024 if held else 0))
    (tmp_path / "gzip").mkdir()
    (tmp_path / "gzip" / "a.tar").write_bytes(gzip.compress(bytes(64 << 20)))
    folders = [str(tmp_path / name) for name in (*abuses, "gzip")]
    words = [sys.executable, "-c", CAPPED, str(tokenizer.path), *folders]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = [
        ("8589934591 bytes in one member, 1073741824 at most", "not text"),
        ("the file ends inside member 'x.tokens.bin'", "not text"),
        ("member 'evil.pickle' at document 0: neither .tokens.bin nor .lengths.bin", "evil.pickle not text"),
        ("member 'evil.pyd' at document 0: neither .tokens.bin nor .lengths.bin", "evil.pyd not text"),
        ("268435456 bytes in one member, 16777216 at most", "not text"),
        ("an extended header of 268435456 bytes", "damaged tar"),
        ("damaged header", "damaged tar"),
    ]
    lines = done.stdout.splitlines()
    for line, part in zip(lines, itertools.chain(*expected), strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (pair("x", [[5]])[:1], r"member 'x\.tokens\.bin' has no partner .* documents from 0 on are lost"),
        ([*pair("x", [[5]]), *pair("y", [[5]])[1:]], "'y.lengths.bin' has no partner .* documents from 1 on"),
        ([pair("x", [[5]])[0], *pair("y", [[5]])], r"member 'x\.tokens\.bin' has no partner"),
        ([*pair("x", [[5]]), *pair("x", [[5]])], "sample key 'x' occurs twice, at document 1"),
        ([pair("x", [[5, 6]])[0], pair("x", [[5]] * 3)[1]], "4 bytes do not fit the 3 tokens of its lengths"),
        ([pair("x", [[5]])[0], ("x.lengths.bin", b"\1\0\0")], "3 bytes is no list of uint32"),
        ([*pair("x", [[5]]), *pair("y", [[5]], "<u4")], "4 bytes per token, but 2 before it"),
        (pair("x", [[5], [330]]), r"document 1 holds token 330, outside the vocabulary of 330"),
        ([], "holds no document"),
    ],
)
def test_contradictions_are_named(tokenizer: Tokenizer, tmp_path: Path, members: Members, message: str) -> None:
    write_tar(tmp_path / "tars" / "a.tar", members)
    with pytest.raises(ShardError, match=rf"a\.tar: .*{message}"):
        index_corpus(tmp_path / "tars", tokenizer.path)


def test_a_folder_without_tars_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"no \.tar file in this folder"):
            index_corpus(folder, tokenizer.path)
