"""A page that replays how a canvas was denoised: one HTML file that loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from megatron_md.evaluate.canvas import Decode, hue, pieces
from megatron_md.html_page import filled
from megatron_md.messages import printable

if TYPE_CHECKING:
    from megatron_md.diffusion.sampler import SamplerStep


class Recorder:
    """Keeps what each step did to the first row of a canvas; `on_step` is the callback.

    Attributes:
        start: the canvas before the first step.
        canvas: the canvas after the last one.
        changes: (position, token, probability) of what each step fixed.
    """

    def __init__(self, mask_token_id: int) -> None:
        self.mask_token_id = mask_token_id
        self.start: list[int] = []
        self.canvas: list[int] = []
        self.changes: list[list[tuple[int, int, float]]] = []

    def on_step(self, step: SamplerStep) -> None:
        """Record a step."""
        self.canvas = step.tokens_BL[0].tolist()
        places = step.is_committed_BL[0].nonzero()[:, 0].tolist()
        change = [(at, self.canvas[at], float(step.probability_BL[0, at])) for at in places]
        if not self.changes:
            changed = set(places)
            self.start = [self.mask_token_id if at in changed else token for at, token in enumerate(self.canvas)]
        self.changes.append(change)


def trace_page(recorder: Recorder, decode: Decode, *, title: str, facts: dict[str, str]) -> str:
    """The page, with the canvas at any step, a player, and each token's step, probability and id.

    Args:
        recorder: a finished recording.
        decode: text of token ids, special ones spelt out.
        title: of the page.
        facts: what is written above the canvas, by name.

    Returns:
        HTML in which no text of a token is markup: `<` is escaped where the data lies, and the script writes text only.
    """
    final = pieces(recorder.canvas, decode)

    def shown(at: int, token: int) -> str:
        # A token that `<eos>` overwrote later is not part of the final text.
        return printable(final[at] if token == recorder.canvas[at] else decode([token]), multiline=True)

    count = len(recorder.changes)
    data: dict[str, Any] = {
        "facts": facts,
        "start": [
            None if token == recorder.mask_token_id else [token, shown(at, token)]
            for at, token in enumerate(recorder.start)
        ],
        "changes": [
            [[at, token, shown(at, token), round(probability, 4)] for at, token, probability in change]
            for change in recorder.changes
        ],
        "hues": [round(hue(step, count), 1) for step in range(1, count + 1)],
    }
    page = resources.files("megatron_md.evaluate").joinpath("trace.html").read_text(encoding="utf-8")
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data_text = json.dumps(data).replace("<", "\\u003c")
    return filled(page, {"SCRIPT": digest, "TITLE": html.escape(title), "DATA": data_text})
