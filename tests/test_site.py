"""The documentation as a site: it builds without a warning, is whole without a network, and fits a telephone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.site_in_browser import NAMES, browser, measure
from tests.test_docs import ROOT, blocks

DOCUMENTS = sorted(path.name for path in ROOT.glob("docs/*.md"))
LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """What a page links to and loads, its anchors, and how many elements of each kind its article has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self.elements: Counter[str] = Counter()
        self.is_in_article = path.suffix != ".html"
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "article":
            self.is_in_article = True
        if self.is_in_article:
            self.elements[tag] += 1
        for name, value in attrs:
            if value is None:
                continue
            if name == "id":
                self.anchors.add(value)
            if (tag, name) in LOADS and not (tag == "link" and ("rel", "canonical") in attrs):
                self.loads.add(value)
            elif name == "href":
                self.links.add(value)

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self.is_in_article = False


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    if find_spec("mkdocs") is None or find_spec("material") is None or find_spec("mkdocstrings") is None:
        pytest.skip("the site's packages are not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_document_is_a_page_in_the_navigation_and_in_llms_txt(site: Path, pages: dict[Path, Page]) -> None:
    home, listed = pages[site / "index.html"], (site / "llms.txt").read_text()
    full = (site / "llms-full.txt").read_text()
    for name in DOCUMENTS:
        page = name.replace(".md", ".html")
        assert site / page in pages and page in home.links | {"./index.html", "index.html"}, name
        assert f"({page})" in listed and (ROOT / "docs" / name).read_text() in full, name


def test_every_link_within_the_site_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for link in page.links | page.loads:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            found = (path.parent / unquote(target.path)).resolve() if target.path else path
            assert found.exists(), f"{path.relative_to(site)}: {link}"
            if target.fragment and found in pages:
                anchors = pages[found].anchors
                assert unquote(target.fragment) in anchors, f"{path.relative_to(site)}: {link}"


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        elsewhere = [link for link in page.loads if urlsplit(link).scheme not in ("", "data") or urlsplit(link).netloc]
        assert not elsewhere, f"{path.relative_to(site)}: {elsewhere}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)[\s\"']*(https?:)?//", style.read_text()), style.name


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "api.md"])
def test_a_page_has_the_elements_that_github_shows(
    name: str, site: Path, pages: dict[Path, Page], tmp_path: Path
) -> None:
    """Python-Markdown and CommonMark differ, most of all in lists."""
    markdown_it = pytest.importorskip("markdown_it")
    reference = tmp_path / "reference"
    reference.write_text(
        markdown_it.MarkdownIt("commonmark").enable("table").render((ROOT / "docs" / name).read_text())
    )
    expected, found = Page(reference).elements, pages[site / name.replace(".md", ".html")].elements
    for element in ("h1", "h2", "h3", "h4", "ul", "ol", "li", "tr", "td", "th", "img", "strong", "em", "pre"):
        assert found[element] == expected[element], element


def test_the_code_of_the_page_on_extending_is_that_of_the_examples() -> None:
    lines = {line for path in ROOT.glob("examples/plugin/*.py") for line in path.read_text().splitlines()}
    for body in blocks(ROOT / "docs/extending.md", "python"):
        for line in body.splitlines():
            assert line.removesuffix(" ...") in lines or line.startswith("md.convert("), line


def test_the_pictures_are_those_that_their_script_draws(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(ROOT / "docs/pictures.py"), str(tmp_path)], check=True, env=environment)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in (ROOT / "docs/pictures").iterdir()}, (
        "docs/pictures is out of date: python docs/pictures.py"
    )


@pytest.mark.skipif(browser() is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
def test_pages_fit_a_telephone_and_are_legible_in_light_and_dark(site: Path, tmp_path: Path) -> None:
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    names = [name.replace(".md", ".html") for name in DOCUMENTS] + ["repository/index.html"]
    for name, found in measure(copy, names, 390, tmp_path / "profile").items():
        assert found["width"] <= 390 and not found["wide"], f"{name}: {found['wide']}"
        assert not found["broken"], f"{name}: pictures that do not load: {found['broken']}"
        # Luminance of text less that of paper, of 255: dark on light, and light on dark.
        assert found["contrast"]["default"] < -150 and found["contrast"]["slate"] > 100, f"{name}: {found['contrast']}"
