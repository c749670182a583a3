"""The page of a trace: replayed changes give the canvas, and no token becomes markup."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from typing import Any

import torch

from megatron_md.diffusion.sampler import SamplerStep
from megatron_md.evaluate.trace import Recorder, trace_page

MASK = 0
WORDS = [
    "<mask>",
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "{{DATA}}",
    "\x1b[31m",
    "&lt;",
    "naïve\n",
    "<eos>",
]


def decode(tokens: list[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def recorded(*canvases: list[int]) -> Recorder:
    recorder = Recorder(MASK)
    for number, (old, new) in enumerate(itertools.pairwise(canvases), start=1):
        tokens_BL, before_BL = torch.tensor([new]), torch.tensor([old])
        probability_BL = torch.full(tokens_BL.shape, number / 8)
        recorder.on_step(SamplerStep(number, len(canvases) - 1, tokens_BL, tokens_BL != before_BL, probability_BL))
    return recorder


CANVASES = [
    [5, 0, 0, 0, 0, 0, 6],
    [5, 1, 0, 0, 0, 3, 6],
    [5, 1, 0, 0, 0, 3, 6],  # a step that commits nothing
    [5, 1, 2, 7, 0, 7, 6],  # `<eos>` overwrites what followed
    [5, 1, 2, 7, 4, 7, 6],
]


def page_and_data(**keys: Any) -> tuple[str, dict[str, Any]]:
    page = trace_page(recorded(*CANVASES), decode, **{"title": "a", "facts": {"run": "x"}, **keys})
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return page, json.loads(data)


def test_replaying_the_changes_gives_the_canvas_of_every_step() -> None:
    _, data = page_and_data()
    canvas = [None if cell is None else cell[0] for cell in data["start"]]
    assert canvas == [token or None for token in CANVASES[0]]
    assert len(data["changes"]) == len(data["hues"]) == len(CANVASES) - 1
    for change, expected in zip(data["changes"], CANVASES[1:], strict=True):
        for at, token, text, probability in change:
            assert probability in (0.125, 0.25, 0.375, 0.5)
            canvas[at] = token
            assert text == WORDS[token].replace("\x1b", r"\x1b")
        assert canvas == [token or None for token in expected]


def test_no_text_is_markup() -> None:
    hostile = "</title><script>alert(1)</script>"
    page, data = page_and_data(title=hostile, facts={hostile: hostile})
    assert data["facts"] == {hostile: hostile}
    assert len(re.findall(r"<script", page)) == 2 and "<img" not in page and "<!--" not in page
    assert page.count("</title>") == 1 and page.count("alert(1)</script>") == 0


def test_the_page_loads_nothing_and_runs_its_own_script_only() -> None:
    page, _ = page_and_data()
    assert not re.search(r"https?:|\bsrc=|<link|@import|url\(", page.replace("src=x onerror", ""))
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy"\s+content="(.*?)"', page)
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in script and "{{" not in page.replace(r"{{DATA}}", "", 1)
