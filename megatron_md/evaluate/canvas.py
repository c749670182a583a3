"""A canvas on a terminal while it is unmasked: each token in the colour of the step that fixed it."""

from __future__ import annotations

import colorsys
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megatron_md.messages import printable

if TYPE_CHECKING:
    from megatron_md.diffusion.sampler import SamplerStep

Decode = Callable[[list[int]], str]

OPEN = "░"
BROKEN = "\ufffd"
LONGEST_CHARACTER = 4  # bytes, and so tokens, of a character in UTF-8
FRAMES_PER_SECOND = 12
FIRST_HUE, LAST_HUE = 210.0, 390.0  # blue for the first step, by red to orange for the last
RAMP = 24  # cells of the legend


def can_stream() -> bool:
    """Whether standard output is a terminal that shows colours and moves its cursor."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not Console().is_dumb_terminal


def pieces(tokens: Sequence[int], decode: Decode) -> list[str]:
    """What each token adds to the text; the first of several that spell one character has it, the others nothing."""
    found: list[str] = []
    while len(found) < len(tokens):
        rest = list(tokens[len(found) : len(found) + LONGEST_CHARACTER])
        for size in range(1, len(rest) + 1):
            text = decode(rest[:size])
            if BROKEN not in text:
                break
        else:
            size, text = 1, decode(rest[:1])
        found += [text, *[""] * (size - 1)]
    return found


def hue(step: int, steps: int) -> float:
    """Of the colour of a step, in degrees."""
    return (FIRST_HUE + (LAST_HUE - FIRST_HUE) * (step - 1) / max(1, steps - 1)) % 360.0


def _colour(step: int, steps: int) -> str:
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue(step, steps) / 360.0, 0.6, 0.8))
    return f"rgb({red},{green},{blue})"


class LiveCanvas:
    """Shows the first row of a canvas while the block lasts, and leaves its last state; `on_step` is the callback."""

    def __init__(
        self,
        decode: Decode,
        mask_token_id: int,
        console: Console | None = None,
        *,
        start: int = 0,
        transient: bool = False,
    ) -> None:
        """Prepare a canvas.

        Args:
            decode: text of tokens.
            mask_token_id: what open positions hold.
            console: where to show it; standard output by default.
            start: first position to show.
            transient: leave nothing behind.
        """
        self._decode, self._mask_token_id, self._start = decode, mask_token_id, start
        self._state: tuple[list[int], list[int], int, int] = ([], [], 0, 1)
        console = console or Console(highlight=False)
        self._live = Live(self, console=console, refresh_per_second=FRAMES_PER_SECOND, transient=transient)

    def __enter__(self) -> LiveCanvas:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def on_step(self, step: SamplerStep) -> None:
        """Take over the canvas after a step; a thread draws it."""
        tokens, is_committed = (row_BL[0, self._start :].tolist() for row_BL in (step.tokens_BL, step.is_committed_BL))
        fixed = self._state[1] or [0] * len(tokens)
        fixed = [step.step if new else old for new, old in zip(is_committed, fixed, strict=True)]
        self._state = tokens, fixed, step.step, step.steps

    def __rich__(self) -> Text:
        """The canvas, and below it the step and the colours of all steps."""
        tokens, fixed, step, steps = self._state
        text = Text()
        if not tokens:
            return text
        for token, at, piece in zip(tokens, fixed, pieces(tokens, self._decode), strict=True):
            if token == self._mask_token_id:
                text.append(OPEN, "dim")
            else:
                style = _colour(at, steps) + (" bold" if at == step < steps else "") if at else ""
                text.append(printable(piece, multiline=True), style)
        text.append(f"\n\nstep {step} of {steps}  1 ", "dim")
        for cell in range(RAMP):
            text.append("━", _colour(1 + round(cell * (steps - 1) / (RAMP - 1)), steps))
        text.append(f" {steps}", "dim")
        return text
