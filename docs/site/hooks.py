"""The documentation's pages, which are read on GitHub too, as pages of a site.

What the pages link to outside `docs/` becomes part of the site: documents as pages, source files as listings under
`repository/`. `llms.txt` lists the pages, `llms-full.txt` has them all as they are written.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
# Inline code, which stays; a link; brackets side by side, which are no reference.
INLINE = re.compile(r"`[^`\n]+`|\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)|(?P<brackets>\] \[)")
ITEM = re.compile(r" *(?:[-*+]|\d+\.) ")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".toml": "toml", ".json": "json"}
LISTING = """\
---
title: {path}
search: {{exclude: true}}
---
# {path}

~~~~~{language}
{text}
~~~~~
"""


def outside_fences(change: Callable[[str], str], markdown: str) -> str:
    """A document with its prose changed, its fenced blocks as they are."""
    parts = FENCED.split(markdown)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))


def repository_path(page: str) -> str:
    """Where in the repository a page of the site comes from."""
    return page.removeprefix("repository/").removesuffix(".listing.md") if _is_outside(page) else f"docs/{page}"


def site_path(path: str) -> str:
    """Where in the site's sources a file of the repository is."""
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.listing.md"


def _is_outside(page: str) -> bool:
    return page.startswith("repository/")


def linked(markdown: str, path: str) -> list[str]:
    """Files of the repository that a document at `path` links to."""
    prose = "".join(FENCED.split(markdown)[::2])
    targets = [match["target"] for match in INLINE.finditer(prose)]
    found = [_resolved(target, path) for target in targets if target is not None and "://" not in target]
    return [path for path in found if (ROOT / path).is_file()]


def _resolved(target: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def for_site(markdown: str, page: str) -> str:
    """A page as Python-Markdown and the site want it: blank lines before lists, links to the site's own files."""
    path = repository_path(page)

    def inline(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None:
            return r"] \[" if match["brackets"] else match[0]
        found = _resolved(target, path)
        if "://" in target or not (ROOT / found).is_file():
            return match[0]
        relative = posixpath.relpath(site_path(found), posixpath.dirname(page) or ".")
        return f"]({relative}{match['anchor'] or ''})"

    return outside_fences(lambda prose: INLINE.sub(inline, _with_blank_lines(prose)), markdown)


def _with_blank_lines(prose: str) -> str:
    """A list right after a line of text gets the blank line that GitHub does not need."""
    lines: list[str] = []
    is_in_list = False
    for line in prose.split("\n"):
        is_item = ITEM.match(line) is not None
        if is_item and not is_in_list and lines and lines[-1].strip():
            lines.append("")
        is_in_list = is_item or (is_in_list and (not line.strip() or line.startswith(" ")))
        lines.append(line)
    return "\n".join(lines)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to outside `docs/`, and what that links to."""
    open_files = list(files.documentation_pages())
    while open_files:
        page = open_files.pop()
        for path in linked(page.content_string, repository_path(page.src_uri)):
            name = site_path(path)
            if files.get_file_from_path(name) is None:
                added = File.generated(config, name, content=content(path), inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(added)
                if path.endswith(".md"):
                    open_files.append(added)
    pages = list(nav_pages(config.nav))
    texts = [(ROOT / "docs" / page).read_text() for _, page in pages]
    files.append(File.generated(config, "llms-full.txt", content="\n".join(texts)))
    files.append(File.generated(config, "llms.txt", content=llms(config, pages, texts)))
    return files


def nav_pages(nav: Any) -> Iterator[tuple[str, str]]:
    """Title and file of each page in the navigation, which has sections."""
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, str):
                yield title, target
            else:
                yield from nav_pages(target)


def llms(config: MkDocsConfig, pages: list[tuple[str, str]], texts: list[str]) -> str:
    """The list of pages for language models (llmstxt.org): title, address, heading."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Pages", ""]
    for (title, page), text in zip(pages, texts, strict=True):
        heading, _, _ = text.partition("\n")
        lines.append(f"- [{title}]({page.removesuffix('.md')}.html): {heading.removeprefix('# ')}")
    return "\n".join([*lines, "", "## Optional", "", "- [All pages in one file, as Markdown](llms-full.txt)", ""])


def content(path: str) -> str:
    """A file of the repository as a page: a document as it is, anything else as a listing."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(Path(path).suffix, "make" if path == "Makefile" else "text")
    return LISTING.format(path=path, language=language, text=text.rstrip("\n"))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Prepare every page."""
    is_listing = page.file.src_uri.endswith(".listing.md")
    return markdown if is_listing else for_site(markdown, page.file.src_uri)
