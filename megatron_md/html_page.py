"""Pages of ours: one HTML file each, in which nothing foreign is markup."""

from __future__ import annotations

import html
from collections.abc import Mapping

from megatron_md.messages import shown


def filled(page: str, values: Mapping[str, str]) -> str:
    """A page with its `{{NAME}}` replaced, in one pass: what is put in is not looked at again.

    Args:
        page: the template.
        values: HTML by name.
    """
    head, *parts = page.split("{{")
    return head + "".join(values[part.split("}}", 1)[0]] + part.split("}}", 1)[1] for part in parts)


def escaped(text: object) -> str:
    """A foreign text as HTML, in which it is text only, as `shown`."""
    return html.escape(shown(text, multiline=True))
