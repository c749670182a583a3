"""Strict tar reading: sound tars of every format pass, every kind of damage is named with its place."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from megatron_md.data.tar import BLOCK, TarError, read_members

MEMBERS = [("a.txt", b"x" * 700), ("b.txt", b""), ("c.txt", b"z" * 512)]
# Where headers begin: 512 for each, and the data in whole blocks.
HEADERS = [0, 1536, 2048]
END = 3072


def make(format: int = tarfile.USTAR_FORMAT) -> bytearray:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in MEMBERS:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return bytearray(file.getvalue())


def read(data: bytes) -> list[tuple[str, bytes]]:
    return [(member.name, content.read()) for member, content in read_members(io.BytesIO(data), Path("x.tar"))]


def set_size(data: bytearray, header: int, size: bytes) -> None:
    """Change the size a header declares, and make its checksum fit again."""
    data[header + 124 : header + 136] = size
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + BLOCK])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sound_tars_pass_with_and_without_padding(format: int) -> None:
    assert read(make(format)) == MEMBERS
    assert read(make(format)[: END + 2 * BLOCK]) == MEMBERS


def test_offsets_are_those_of_the_data() -> None:
    data = make()
    for member, _ in read_members(io.BytesIO(data), Path("x.tar")):
        assert data[member.offset : member.offset + member.size] == dict(MEMBERS)[member.name]


def test_every_cut_is_named() -> None:
    data = make()
    for cut in range(0, END + 2 * BLOCK, 64):
        with pytest.raises(TarError) as caught:
            read(data[:cut])
        message = str(caught.value)
        if cut in (*HEADERS, END):
            assert "no end marker: the file is cut at a member boundary" in message
        elif any(header < cut < header + BLOCK for header in HEADERS) or END < cut < END + BLOCK:
            assert "the file ends inside a header" in message
        elif cut >= END:
            assert "the end marker is incomplete" in message
        else:
            assert "the file ends inside member" in message
        assert message.startswith("x.tar: ")


@pytest.mark.parametrize("header", HEADERS)
def test_every_flipped_bit_of_a_header_is_named(header: int) -> None:
    for offset in range(BLOCK):
        data = make()
        data[header + offset] ^= 0x04
        # Blanks and zeros around the checksum itself are the same to every reader.
        if 148 + 6 <= offset < 156:
            continue
        with pytest.raises(TarError, match=rf"damaged header \(.*\) at byte {header}, "):
            read(data)


@pytest.mark.parametrize(("first", "stop"), [(0, 1536), (1536, 2048), (2048, 3072)])
def test_a_zeroed_member_is_named_unless_it_looks_like_the_end(first: int, stop: int) -> None:
    data = make()
    data[first:stop] = bytes(stop - first)
    if stop == END:
        # Nothing but zeros to the end of the record: a sound, shorter tar to everybody without an index.
        assert read(data) == MEMBERS[:2]
        return
    with pytest.raises(TarError, match=rf"zeroed member, or bytes after the end marker at byte {first}"):
        read(data)


def test_bytes_after_the_end_are_named() -> None:
    for data in (make() + b"x", make() + make(), make()[: END + BLOCK] + b"x" * BLOCK):
        with pytest.raises(TarError, match=r"bytes after the end marker at byte 3072, after member 'c\.txt'"):
            read(data)
    with pytest.raises(TarError, match=r"\d+ zero bytes at the end, more than an end marker"):
        read(make() + bytes(tarfile.RECORDSIZE))


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12])
def test_sizes_beyond_belief_are_named_without_memory(size: bytes) -> None:
    data = make()
    set_size(data, 2048, size)
    with pytest.raises(TarError, match=r"declares -?\d+ bytes of data|the file ends inside member 'c\.txt'"):
        read(data)
    with pytest.raises(TarError, match=r"declares|ends inside"):
        for _ in read_members(io.BytesIO(data), Path("x.tar")):
            pass


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"size": "9" * 30}, "declares 9999"),
        ({"size": "-5"}, "declares -5"),
        ({"size": "5000000"}, "the file ends inside member"),
        ({"comment": "x" * (1 << 17)}, "an extended header of"),
    ],
)
def test_pax_headers_are_checked(records: dict[str, str], message: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = records
        tar.addfile(info)
    with pytest.raises(TarError, match=message):
        read(file.getvalue())


def test_malformed_pax_header_is_named() -> None:
    for content in (b"99 path=x\n", b"x path=a\n", b"0 a=b\n", b"path\n"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            info = tarfile.TarInfo("pax")
            info.type, info.size = tarfile.XHDTYPE, len(content)
            tar.addfile(info, io.BytesIO(content))
        with pytest.raises(TarError, match="malformed extended header"):
            read(file.getvalue())


def test_a_pax_path_cannot_hide_an_unsafe_name() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"path": "../../x"}
        tar.addfile(info)
    [(member, _)] = list(read_members(io.BytesIO(file.getvalue()), Path("x.tar")))
    assert (member.name, member.problem) == ("../../x", "unsafe name")
