"""Every --help has an example of its own command; all of them parse, and the files of ours that they name exist."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_md import cli

ROOT = Path(__file__).parent.parent
LAUNCHER = re.compile(r"torchrun --nproc-per-node \d+ -m megatron_md")


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its actions."""
    yield parser
    for part in parser._actions:
        if isinstance(part, argparse._SubParsersAction):
            for action in part.choices.values():
                yield from parsers(action)


def all_parsers() -> Iterator[argparse.ArgumentParser]:
    yield cli.build_parser(None)
    for name in cli.COMMANDS:
        (command,) = (part.choices[name] for part in cli.build_parser(name)._actions if part.dest == "command")
        yield from parsers(command)


def examples(parser: argparse.ArgumentParser) -> list[str]:
    """The command lines under `examples:`."""
    _, heading, after = parser.format_help().partition("\nexamples:\n")
    assert heading, f"{parser.prog} --help has no examples"
    return [line.strip() for line in after.partition("\n\n")[0].splitlines()]


def own_words(example: str) -> list[str]:
    """What follows `megatron-md` in a command line, however it is started."""
    command = LAUNCHER.sub("megatron-md", example).split(" | ")[-1]
    program, *words = shlex.split(command, comments=True)
    assert program == "megatron-md", example
    return words


PARSERS = {parser.prog: parser for parser in all_parsers()}
EXAMPLES = sorted({example for parser in PARSERS.values() for example in examples(parser)})


@pytest.mark.parametrize("prog", PARSERS)
def test_every_command_and_action_has_an_example_of_its_own(prog: str) -> None:
    assert any(re.search(rf"\b{prog}\b", LAUNCHER.sub("megatron-md", example)) for example in examples(PARSERS[prog]))


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_command_line(example: str) -> None:
    subprocess.run(["bash", "-n", "-c", example], check=True)  # such as a remark in brackets is not
    if example.startswith("bash "):
        assert (ROOT / example.split()[1]).is_file()
        return
    words = own_words(example)
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            cli.parse(words)
        assert stop.value.code == 0
    else:
        assert cli.parse(words).command == words[0]
    for word in words:
        assert not word.startswith("examples/") or (ROOT / word).exists(), f"{word}: no such file"
