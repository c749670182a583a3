"""What the demo's run has learned: bits per byte beside gzip, a held-out function filled in, texts by three strategies.

python examples/tiny/judge.py runs/demo corpus/valid
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import megatron_md as md
from megatron_md.data.corpus import documents, texts
from megatron_md.data.shards import load_manifest
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.sampler import infill
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.errors import UserError
from megatron_md.evaluate.canvas import OPEN, pieces
from megatron_md.messages import tell_error

console = Console(highlight=False, soft_wrap=True)
FUNCTION = re.compile(r"^ *def .*\n(?:(?: +\S.*| *)\n)+?(?=\n*(?: {0,4}\S))", re.MULTILINE)
MASKED = 0.3
SHORTEST, LENGTH = 90, 64  # tokens of the function, and of a text
PROMPT = "    def get_name(self, name):\n"
STRATEGIES = (
    {"strategy": "ancestral", "temperature": 0.8, "seed": 1},
    {"strategy": "entropy", "temperature": 0.7, "block": 8, "seed": 1},
    {"strategy": "threshold", "threshold": 0.5, "temperature": 0.7, "block": 16, "seed": 1},
)


def judge(run: Path, corpus: Path, held_out: Sequence[str]) -> None:
    """What a byte of held-out text costs by the frequencies of tokens, by gzip and by the model."""
    manifest = load_manifest(corpus)
    text = "".join(held_out).encode()
    found = md.evaluate(run, corpus, rows=1024, passes=1)
    entropy = json.loads((run / "summary.json").read_text())["unigram_entropy"]
    bits = found.bits_per_byte or math.nan
    table = Table("held-out text", "bits per byte", box=None, pad_edge=False)
    table.add_row("frequencies of tokens", f"{entropy / math.log(2.0) * manifest.tokens / manifest.text_bytes:.2f}")
    table.add_row(f"gzip -9, {len(text) / 1e6:.1f} MB at once", f"{8 * len(gzip.compress(text, 9)) / len(text):.2f}")
    table.add_row("this model, a row at a time", f"{bits:.2f} ± {bits * found.stderr / found.nelbo:.2f}, a bound")
    console.print(table)


def fill_in(run: Path, held_out: Sequence[str]) -> None:
    """Mask tokens of a function that the model has never seen, and have it fill them in."""
    functions = (found[0] for text in held_out for found in FUNCTION.finditer(text))
    with md.load(run) as (model, tokenizer):
        encoded = (tokenizer.encode(function).tolist() for function in functions)
        tokens = next((one for one in encoded if SHORTEST <= len(one) <= model.max_length), None)
        if tokens is None:
            raise UserError(
                f"{run}: no held-out function has {SHORTEST} to {model.max_length} tokens; take longer rows"
            )
        masked = random.Random(0).sample(range(1, len(tokens)), round(MASKED * len(tokens)))
        canvas_BL = torch.tensor([tokens], device=model.device)
        canvas_BL[0, masked] = tokenizer.mask_token_id
        config = SamplerConfig(length=len(tokens), steps=len(masked))
        sample = infill(model, canvas_BL, config, mask_token_id=tokenizer.mask_token_id)
    written = sample.tokens_BL[0].tolist()
    right = {at for at in masked if written[at] == tokens[at]}
    (commonest, _), *_ = Counter(tokens).most_common()
    console.rule(f"a function that it has not seen, {len(masked)} of {len(tokens)} tokens masked", align="left")
    console.print(drawn(canvas_BL[0].tolist(), tokenizer, {}))
    console.rule(f"filled in: {len(right)} of {len(masked)} are the author's", align="left")
    console.print(drawn(written, tokenizer, {at: "bold green" if at in right else "bold red" for at in masked}))
    console.print(f"({sum(tokens[at] == commonest for at in masked)} would be, by the function's commonest token)")


def drawn(tokens: list[int], tokenizer: Tokenizer, styles: dict[int, str]) -> Text:
    """A canvas, its open tokens as blocks."""
    text = Text()
    for at, (token, piece) in enumerate(zip(tokens, pieces(tokens, tokenizer.decode), strict=True)):
        text.append(OPEN if token == tokenizer.mask_token_id else piece, styles.get(at, ""))
    return text


def sample(run: Path) -> None:
    """One prompt, continued in several ways."""
    for options in STRATEGIES:
        text = md.generate(run, PROMPT, length=LENGTH, **options)
        words = ", ".join(f"{name} {value}" for name, value in options.items() if name not in ("strategy", "seed"))
        console.rule(f"{options['strategy']}, {words}: {text.forward_passes} passes", align="left")
        console.print(Text(PROMPT + text.text))


def main() -> None:
    """Judge the run that the command line names."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run, corpus = map(Path, sys.argv[1:])
    held_out = [document.text for document in texts(documents(split="valid"))]
    try:
        judge(run, corpus, held_out)
        fill_in(run, held_out)
        sample(run)
    except UserError as error:
        tell_error(error, "judge.py")
        sys.exit(2)


if __name__ == "__main__":
    main()
