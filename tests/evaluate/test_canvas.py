"""The canvas on a terminal: pieces that spell the text, nothing that commands the terminal, colours by step."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from megatron_md.diffusion.sampler import SamplerStep
from megatron_md.evaluate.canvas import OPEN, LiveCanvas, can_stream, pieces

MASK = 256


def decode(tokens: list[int]) -> str:
    """A tokenizer of bytes, and a mask token."""
    parts = bytes(token for token in tokens if token < MASK).decode(errors="replace").split("\0")
    return "".join(parts) + "<mask>" * tokens.count(MASK)


def test_pieces_spell_the_text_and_characters_are_whole() -> None:
    text = "naïve 你好 🙂!"
    tokens = list(text.encode())
    found = pieces(tokens, decode)
    assert "".join(found) == text and len(found) == len(tokens)
    assert [piece for piece in found if piece] == list(text)
    assert pieces([*b"a", 0xE4, 0xBD, *b"bc"], decode) == ["a", "\ufffd", "\ufffd", "b", "c"]
    assert pieces([0xE4, MASK, 0xA0], decode)[0] == "\ufffd"  # a neighbour is still open
    assert pieces([], decode) == []


def step_of(number: int, text: str, committed: list[int]) -> SamplerStep:
    tokens_BL = torch.tensor([[MASK if letter == "_" else ord(letter) for letter in text]])
    is_committed_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    is_committed_BL[0, committed] = True
    return SamplerStep(number, 3, tokens_BL, is_committed_BL, is_committed_BL / 2)


def colours(text: str) -> dict[str, str]:
    """The colour of each letter."""
    found: dict[str, str] = {}
    for style, letters in re.findall(r"\x1b\[([\d;]*)m([^\x1b]*)", text):
        found |= {letter: style for letter in letters if letter.isalpha()}
    return found


def test_tokens_keep_the_colour_of_their_step() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, color_system="truecolor", width=80)
    canvas = LiveCanvas(decode, MASK, console)
    frames = []
    for step in (step_of(1, "p_B_", [2]), step_of(2, "pAB_", [1]), step_of(3, "pABC", [3])):
        canvas.on_step(step)
        with console.capture() as captured:
            console.print(canvas)
        frames.append(captured.get().split("\n")[0])
    assert [frame.count(OPEN) for frame in frames] == [2, 1, 0]
    assert frames[-1].startswith("p\x1b[38;2;")  # what was given has no colour
    last = colours(frames[-1])
    assert len({last[letter] for letter in "ABC"}) == 3
    # The last one that was fixed is bold too, while steps follow.
    first = colours(frames[0])
    assert first["B"] == f"1;{last['B']}" and last["C"].startswith("38;2;")


def test_the_last_state_stays_on_the_terminal() -> None:
    output = io.StringIO()
    with LiveCanvas(decode, MASK, Console(file=output, force_terminal=True, color_system=None, width=80)) as canvas:
        canvas.on_step(step_of(1, "p_", []))
        canvas.on_step(step_of(3, "p\x1b", [1]))
    assert r"p\x1b" in output.getvalue() and "step 3 of 3" in output.getvalue()


def test_a_canvas_may_begin_behind_the_prompt_and_leave_nothing() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, color_system=None, width=80)
    with LiveCanvas(decode, MASK, console, start=2, transient=True) as canvas:
        canvas.on_step(step_of(1, "pq_A", [3]))
        with console.capture() as captured:
            console.print(canvas)
        assert f"{OPEN}A" in captured.get() and "pq" not in captured.get()
    assert output.getvalue().endswith("\x1b[2K")  # its lines are cleared


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_streaming_needs_a_terminal_with_colours(
    terminal: bool, environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    assert can_stream() is expected
