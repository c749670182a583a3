"""Writes docs/configuration.md to stdout, from the explanations that stand beside the keys in `megatron_md/config/`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_md.config import explain

COMMAND = "python docs/configuration.py > docs/configuration.md"
HEAD = f"""\
# Configuration

Generated; do not edit. After a change to a key in `megatron_md/config/`:

```bash
{COMMAND}
```

A run is one YAML file with these sections, and `section.key=value` words on the command line. A key is taken from the
command line, else from the file, else (under `model`) from the preset, else it is the default. Unknown keys, wrong
types and values out of bounds are refused before anything starts, each in one line that names the nearest known key.
`RUN/config.yaml` holds what came out of it, without the secrets of URLs. `megatron-md train --help` prints the same.
"""
KEY = re.compile(r"  (?P<key>[\w.]+): (?P<type>.*?)(?: = (?P<default>.*)| \(required\))")
SECTION = re.compile(r"(?P<name>[\w.]+): (?P<meaning>.*)")


def entries(explanation: str) -> Iterator[str]:
    """The lines of the document, from those of `explain`: a heading for a section, an item for a key."""
    yield "## Top level\n"
    lines = iter(explanation.splitlines())
    for line in lines:
        key, section = KEY.fullmatch(line), SECTION.fullmatch(line)
        if key is not None:
            default = "required" if key["default"] is None else f"default `{key['default']}`"
            yield f"- `{key['key']}` ({key['type']}; {default}): {next(lines).strip()}"
        elif section is not None:
            yield f"## {section['name']}: {section['meaning']}\n"
        elif not line:
            yield ""
        else:
            raise ValueError(f"megatron_md.config.explain() has a line of an unknown kind: {line!r}")


def render() -> str:
    """The whole document."""
    return "\n".join([HEAD, *entries(explain())]) + "\n"


if __name__ == "__main__":
    print(render(), end="")
