"""An English corpus for the studies, from Debian packages under free licences: dictionaries, quotations, a manual.

    python examples/studies/english.py corpus/studies/english/text
    megatron-md tokenizer train --input corpus/studies/english/text --split train --vocab 4096 \
        --output corpus/studies/english/tokenizer.model
    for split in train valid; do
      megatron-md data build --input corpus/studies/english/text --split $split \
          --tokenizer corpus/studies/english/tokenizer.model --output corpus/studies/english/$split
    done

`apt-get download` fetches the packages as an ordinary user; nothing is installed. Licences are those of the packages'
copyright files, which are copied beside the text.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Package: the files in it that hold the text.
PACKAGES = {
    "dict-gcide": "usr/share/dictd/gcide.dict.dz",  # Webster's of 1913, and more
    "dict-foldoc": "usr/share/dictd/foldoc.dict.dz",
    "dict-jargon": "usr/share/dictd/jargon.dict.dz",
    "debian-reference-en": "usr/share/debian-reference/debian-reference.en.txt.gz",
    "fortunes": "usr/share/games/fortunes/*",
}
EVERY = {"dict-gcide": 2}  # every second document of the largest, so that the others count for something
DOCUMENT = 20_000  # characters at least: so many documents that a held-out share of them is of every kind


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a text with their lines joined, without the marks of dictionaries.

    Pronunciations (between backslashes), braces of references, tags of sources (`[1913 Webster]`) and rules go; a
    paragraph without a word goes whole.
    """
    text = re.sub(r"\\[^\\\n]{1,60}\\", "", text)
    text = re.sub(r"\[(1913 Webster|WordNet [\d.]+|PJC|Webster [^\]\n]{1,20}|Century Dict[^\]\n]{0,12})\]", "", text)
    text = re.sub(r"[{}]|^[%=*_-]{3,}$|^%$|[\b\x0c]", "", text, flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        joined = " ".join(block.split())
        if re.search(r"[A-Za-z]{3}", joined):
            yield joined


def documents(text: str) -> Iterator[str]:
    """The text in documents of whole paragraphs."""
    held: list[str] = []
    for paragraph in paragraphs(text):
        held.append(paragraph)
        if sum(map(len, held)) >= DOCUMENT:
            yield "\n\n".join(held) + "\n"
            held = []
    if held:
        yield "\n\n".join(held) + "\n"


def read(path: Path) -> str:
    """A file's text, compressed or not (dictzip is gzip)."""
    data = gzip.decompress(path.read_bytes()) if path.suffix in (".dz", ".gz") else path.read_bytes()
    return data.decode("utf-8", errors="ignore")


def fetch(package: str, folder: Path) -> Path:
    """Download and unpack a package.

    Raises:
        SystemExit: apt-get or dpkg-deb is missing or fails; with one line.
    """
    done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True, check=False)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if done.returncode or not found:
        sys.exit(f"{package}: apt-get download failed: {(done.stderr.strip().splitlines() or ['no file came'])[-1]}")
    subprocess.run(["dpkg-deb", "-x", str(found[0]), str(folder / package)], check=True)
    print(f"{found[0].name}: {found[0].stat().st_size / 1e6:.1f} MB", flush=True)
    return folder / package


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    if output.exists():
        sys.exit(f"{output} is there already; remove it to make it anew")
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        sys.exit(f"{' and '.join(missing)} not found: the corpus is made of Debian packages")
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "text"
        made.mkdir()
        size = 0
        for package, pattern in PACKAGES.items():
            root = fetch(package, Path(temporary))
            paths = sorted(path for path in root.glob(pattern) if path.is_file() and path.suffix != ".dat")
            text = "\n\n".join(read(path) for path in paths if not path.is_symlink())
            for number, document in enumerate(documents(text)):
                if number % EVERY.get(package, 1) == 0:
                    (made / f"{package}-{number:05d}.txt").write_text(document, encoding="utf-8")
                    size += len(document)
            shutil.copy(root / f"usr/share/doc/{package}/copyright", made / f"{package}.LICENCE")
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, output)
    print(f"{output}: {size / 1e6:.1f} M characters in {len(list(output.glob('*.txt')))} documents")


if __name__ == "__main__":
    main()
