"""Measures docs/convergence/: the same small run on several layouts and precisions, step by step.

    python docs/convergence.py [FOLDER]       about ten minutes on two cores; runs that are there are kept

FOLDER (runs/convergence) keeps corpus and runs. Curves and the picture go to docs/convergence/.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

OUTPUT = Path(__file__).parent / "convergence"
STEPS = 200
CONFIG = f"""\
seed: 7
model: {{layers: 4, hidden: 64, heads: 4, kv_heads: 4, ffn: 128, init_std: 0.1}}
data: {{seq_length: 64}}
objective: {{mask_schedule: paper}}
optimizer: {{lr: 3e-3, lr_schedule: {{name: cosine, min_lr: 3e-4, warmup_steps: 20}}}}
train: {{steps: {STEPS}, global_batch_size: 16, micro_batch_size: 4, device: cpu}}
validation: {{every_steps: {STEPS}, sequences: 256}}
checkpoint: {{every_steps: {STEPS}}}
log: {{every_steps: 1, tensorboard: false}}
"""
# Name: processes, and what differs from one process in fp32.
RUNS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "micro-batches of 1": (1, ["train.micro_batch_size=1"]),
    "data 2": (2, []),
    "data 2, plain optimizer": (2, ["parallel.distributed_optimizer=false"]),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "tensor 2, sequence": (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"]),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
    "pipeline 2, interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "context 2": (2, ["parallel.context=2"]),
    "tensor 2, pipeline 2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "one process, bf16": (1, ["train.precision=bf16"]),
}
REFERENCE = "one process"


def megatron_md(*words: str) -> None:
    """A command, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "megatron_md", *words], check=True, env=environment, stdin=subprocess.DEVNULL)


def make_corpus(folder: Path) -> list[str]:
    """Python's standard library in 1,024 pieces, and the words that name it."""
    model = str(folder / "tokenizer.model")
    if not Path(model).exists():
        megatron_md(
            "tokenizer", "train", "--input", "embedded", "--split", "train", "--vocab", "1024", "--output", model
        )
    words = [f"data.tokenizer={model}"]
    for split in ("train", "valid"):
        corpus = folder / split
        if not (corpus / "manifest.json").exists():
            megatron_md(
                "data", "build", "--input", "embedded", "--split", split, "--tokenizer", model, "--output", str(corpus)
            )
        words.append(f"data.{split}={corpus / 'manifest.json'}")
    return words


def curve(run: Path) -> list[dict[str, float]]:
    """What a run logged, step by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def draw(curves: dict[str, list[dict[str, float]]], output: Path) -> None:
    """Losses on top of each other, and how far each is from one process."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    reference = [record["loss"] for record in curves[REFERENCE]]
    steps = range(1, len(reference) + 1)
    for name, records in curves.items():
        losses = [record["loss"] for record in records]
        above.plot(steps, losses, lw=1, label=name, **({"color": "black"} if "bf16" in name else {}))
        if name != REFERENCE:
            gaps = [abs(ours / one - 1) for ours, one in zip(losses, reference, strict=True)]
            below.plot(steps, [gap or float("nan") for gap in gaps], lw=1, color=above.lines[-1].get_color())
    above.set_ylabel("training loss, nats")
    below.set(ylabel="relative distance from one process", xlabel="step", yscale="log")
    below.axhline(1e-5, color="black", lw=0.8, ls=":")
    above.legend(fontsize=8, ncols=2)
    figure.savefig(output, dpi=110)


def main() -> None:
    """Train, and write the curves."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/convergence").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    corpus = make_corpus(folder)
    curves, table = {}, []
    for name, (processes, words) in RUNS.items():
        run = folder / name.replace(", ", "_").replace(" ", "-")
        megatron_md("train", str(config), "--nproc-per-node", str(processes), f"run_dir={run}", *corpus, *words)
        curves[name] = curve(run)
        table.append((name, json.loads((run / "summary.json").read_text())["val_nelbo"]))
    OUTPUT.mkdir(exist_ok=True)
    with (OUTPUT / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves])
        for number, records in enumerate(zip(*curves.values(), strict=True), start=1):
            writer.writerow([number, *(record["loss"] for record in records)])
        writer.writerow(["val_nelbo", *(value for _, value in table)])
    draw(curves, OUTPUT / "curves.png")


if __name__ == "__main__":
    main()
