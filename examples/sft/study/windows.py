"""Which window of mask rates suits fine-tuning, by likelihood and by generation: docs/finetuning.md has the result.

A small model, pretrained on Python's standard library, is fine-tuned on 20,000 made-up instructions (reverse letters,
add numbers, look a key up), for each window and three seeds, on the CPU. Every run is judged twice on 500 instructions
that it has not seen: by generation (the answer, letter for letter) and by likelihood (the right answer against three
wrong ones, and the bound on its log-likelihood).

    python examples/sft/study/windows.py runs/sft [--workers 2]

What is done already is not done again: kill it and start it anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

HERE = Path(__file__).parent
WINDOWS = {"U[0, 1]": "uniform:0,1", "[0.45, 0.55]": "uniform:0.45,0.55", "[0.5, 1]": "uniform:0.5,1",
           "[0.3, 0.8]": "uniform:0.3,0.8"}  # fmt: skip
SEEDS = (1, 2, 3)
TRAINED, JUDGED = 20_000, 500
LETTERS = "bcdfghjklmnpqrstvwxz"
ANSWER_TOKENS = 8
Task = dict[str, Any]


def reverse(draw: random.Random) -> tuple[str, str, list[str]]:
    """Letters backwards; wrong answers exchange two of them."""
    word = draw.sample(LETTERS, draw.randint(3, 6))
    wrong = []
    while len(wrong) < 3:
        other = word[::-1]
        i, j = draw.sample(range(len(word)), 2)
        other[i], other[j] = other[j], other[i]
        wrong += ["".join(other)] * ("".join(other) not in wrong)
    return f"reverse {''.join(word)}", "".join(word[::-1]), wrong


def add(draw: random.Random) -> tuple[str, str, list[str]]:
    """A sum; wrong answers are near it."""
    a, b = draw.randint(0, 99), draw.randint(0, 19)
    near = [a + b + offset for offset in (-10, -2, -1, 1, 2, 10) if a + b + offset >= 0]
    return f"add {a} {b}", str(a + b), [str(value) for value in draw.sample(near, 3)]


def find(draw: random.Random) -> tuple[str, str, list[str]]:
    """The value of a key; wrong answers are the other values, and one that does not occur."""
    keys, values = draw.sample(LETTERS, 3), draw.sample(LETTERS, 4)
    pairs = " ".join(f"{key}={value}" for key, value in zip(keys, values[:3], strict=True))
    right = draw.randrange(3)
    return f"find {keys[right]} in {pairs}", values[right], [value for value in values if value != values[right]]


TASKS: tuple[Callable[[random.Random], tuple[str, str, list[str]]], ...] = (reverse, add, find)


def examples(count: int, seed: int, judged: set[str]) -> Iterator[Task]:
    """So many instructions that are not among the judged ones; only sums, which are few, come twice."""
    draw, seen = random.Random(seed), set(judged)
    while count:
        task = TASKS[draw.randrange(len(TASKS))]
        prompt, answer, wrong = task(draw)
        if prompt in judged or (prompt in seen and task is not add):
            continue
        seen.add(prompt)
        count -= 1
        yield {"task": task.__name__, "prompt": prompt, "answer": answer, "wrong": wrong}


def write_tasks(folder: Path) -> None:
    """train.jsonl and valid.jsonl as conversations, and judged.jsonl with the wrong answers beside the right ones."""
    judged = list(examples(JUDGED, 0, set()))
    trained = list(examples(TRAINED, 1, {task["prompt"] for task in judged}))
    folder.mkdir(parents=True, exist_ok=True)
    for name, tasks in (("train", trained), ("valid", judged)):
        lines = ({"prompt": task["prompt"], "completion": task["answer"]} for task in tasks)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "judged.jsonl").write_text("".join(json.dumps(task) + "\n" for task in judged))


def command(*words: str | Path) -> None:
    """`megatron-md WORDS` on one core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_md", *map(str, words)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"megatron-md {' '.join(map(str, words))}\n{done.stderr}")


def prepare(runs: Path, corpus: Path) -> None:
    """The corpora and the base model, unless they are there."""
    if not (corpus / "judged.jsonl").exists():
        write_tasks(corpus)
    tokenizer = corpus / "tokenizer.model"
    if not tokenizer.exists():
        command(
            "tokenizer", "train", "--input", "embedded", "--split", "train", "--vocab", "512", "--output", tokenizer
        )
    if not (corpus / "text").exists():
        command("data", "build", "--input", "embedded", "--split", "train", "--tokenizer", tokenizer,
                "--output", corpus / "text")  # fmt: skip
    for split in ("train", "valid"):
        if not (corpus / split).exists():
            command("data", "build", "--chat", "--template", "plain", "--input", corpus / f"{split}.jsonl",
                    "--tokenizer", tokenizer, "--output", corpus / split)  # fmt: skip
    command("train", HERE / "base.yaml", f"run_dir={runs / 'base'}", f"data.train={corpus / 'text'}",
            f"data.tokenizer={tokenizer}")  # fmt: skip


def tune(runs: Path, corpus: Path, window: str, seed: int) -> None:
    """Fine-tune and judge one run; its line goes to RUNS/judged/NAME.json."""
    name = f"{WINDOWS[window].replace(':', '-')}-{seed}"
    if (runs / "judged" / f"{name}.json").exists():
        return
    command("train", HERE / "task.yaml", f"run_dir={runs / name}", f"objective.mask_schedule={WINDOWS[window]}",
            f"seed={seed}", f"checkpoint.load={runs / 'base'}", f"data.train={corpus / 'train'}",
            f"data.valid={corpus / 'valid'}", f"data.tokenizer={corpus / 'tokenizer.model'}")  # fmt: skip
    judge_apart(runs, corpus, name, window)


def judge_apart(runs: Path, corpus: Path, name: str, window: str) -> None:
    """`judge` in a process of its own."""
    subprocess.run([sys.executable, __file__, str(runs), "--corpus", str(corpus), "--judge", name, window], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def judge(runs: Path, corpus: Path, name: str, window: str) -> None:
    """Exact match of generated answers, accuracy among four answers, and nats of the right one, by task."""
    import megatron_md as md
    from megatron_md.data.chat_template import ChatTemplate
    from megatron_md.data.entries import Message
    from megatron_md.diffusion.conditional import ConditionalEstimator
    from megatron_md.evaluate.conditional import Question, conditional_log_likelihoods

    tasks = [json.loads(line) for line in (corpus / "judged.jsonl").read_text().splitlines()]
    questions, prompts = [], []
    with md.load(runs / name) as (model, tokenizer):
        template = ChatTemplate.of(tokenizer, "plain")
        for task in tasks:
            user = Message("user", task["prompt"])
            answers = []
            for answer in (task["answer"], *task["wrong"]):
                encoded = template.encode(tokenizer, [user, Message("assistant", answer)])
                answers.append(encoded.tokens[encoded.is_answer].tolist())
            prompts.append(template.render([user], add_generation_prompt=True))
            prompt = template.encode(tokenizer, [user], add_generation_prompt=True).tokens
            questions.append(Question(prompt.tolist(), answers))
        likelihoods = conditional_log_likelihoods(
            model, questions, ConditionalEstimator(draws=32), mask_token_id=tokenizer.mask_token_id
        )
    texts = md.generate(runs / name, prompts, length=ANSWER_TOKENS, eos="stop", batch_size=64)
    found: dict[str, Any] = {"window": window, "run": name}
    for kind in (task.__name__ for task in TASKS):
        chosen = [i for i, task in enumerate(tasks) if task["task"] == kind]
        found[kind] = {
            "exact": fmean(texts[i].text.strip() == tasks[i]["answer"] for i in chosen),
            "choice": fmean(np.argmax([a.log_likelihood for a in likelihoods[i]]) == 0 for i in chosen),
            "nats": fmean(-likelihoods[i][0].log_likelihood for i in chosen),
        }
    (runs / "judged").mkdir(exist_ok=True)
    (runs / "judged" / f"{name}.json").write_text(json.dumps(found) + "\n")


def table(runs: Path) -> str:
    """Mean over seeds and their range, as Markdown."""
    records = [json.loads(path.read_text()) for path in sorted((runs / "judged").glob("*.json"))]
    kinds = [task.__name__ for task in TASKS]
    lines = [f"| window | seeds | {' | '.join(f'{kind}: exact, choice, nats' for kind in kinds)} |"]
    lines.append("|---|---|" + "---|" * len(kinds))
    for window in ("before", *WINDOWS):
        own = [record for record in records if record["window"] == window]
        if own:
            cells = [", ".join(spread([record[kind][key] for record in own])
                               for key in ("exact", "choice", "nats")) for kind in kinds]  # fmt: skip
            lines.append(f"| {window} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean, and in parentheses the range."""
    return f"{fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else f"{values[0]:.2f}"


def draw(runs: Path, picture: Path) -> None:
    """Exact match and choice of each seed, by window, one panel a task."""
    import matplotlib.pyplot as plt

    records = [json.loads(path.read_text()) for path in sorted((runs / "judged").glob("*.json"))]
    figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis, kind in zip(axes, (task.__name__ for task in TASKS), strict=True):
        for key, marker, shift in (("exact", "o", -0.1), ("choice", "s", 0.1)):
            points = [(list(WINDOWS).index(record["window"]) + shift, record[kind][key])
                      for record in records if record["window"] in WINDOWS]  # fmt: skip
            label = {"exact": "generation: exact match", "choice": "likelihood: right of four"}[key]
            axis.plot(*zip(*points, strict=True), marker, alpha=0.7, label=label)
        axis.set_xticks(range(len(WINDOWS)), list(WINDOWS), fontsize=8)
        axis.set_title(kind)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("share of instructions")
    axes[-1].legend(fontsize=8)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """All runs, some at a time, then table and picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--corpus", type=Path, default=Path("corpus/sft"), help="folder of the corpora (corpus/sft)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--judge", nargs=2, metavar=("NAME", "WINDOW"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.judge:
        return judge(args.runs, args.corpus, *args.judge)
    prepare(args.runs, args.corpus)
    if not (args.runs / "judged/base.json").exists():
        judge_apart(args.runs, args.corpus, "base", "before")
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(tune, args.runs, args.corpus, window, seed) for seed in SEEDS for window in WINDOWS]
        for job in jobs:
            job.result()
    draw(args.runs, args.runs / "windows.png")
    print(table(args.runs))


if __name__ == "__main__":
    main()
