"""Time in training steps, tokens, FLOPs and money until a run's validation first reached each target in bits per byte.

python examples/speedrun/time_to.py RUN CORPUS [--targets 1.85 1.6] [--price MONEY]
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path

from megatron_md.data.shards import load_manifest
from megatron_md.errors import UserError
from megatron_md.messages import tell_error
from megatron_md.report.cost import training_flops
from megatron_md.report.recorded import Recorded, read_run
from megatron_md.train.records import is_number


def rows(run: Recorded, bits_per_nat: float, targets: list[float], price: float | None) -> list[str]:
    """A row of a Markdown table for each target; validations and saves are not in its time.

    Args:
        run: what the run wrote.
        bits_per_nat: bits per byte of a nat per token on the validation corpus.
        targets: in bits per byte.
        price: of an hour of one process' device.

    Raises:
        UserError: the run was never validated.
    """
    judged = [record for record in run.records if is_number(record.get("val_nelbo"))]
    if not judged:
        raise UserError(f"{run.path}: was never validated; train it with validation.every_steps")
    processes = run.found.environment.get("world_size", 1)
    found = []
    for target in targets:
        first = next((record for record in judged if record["val_nelbo"] * bits_per_nat <= target), None)
        if first is None:
            lowest = min(record["val_nelbo"] for record in judged) * bits_per_nat
            found.append(f"| {target} | never; lowest {lowest:.3f} |")
            continue
        seconds = training_seconds(run, first["step"])
        flops = (training_flops(run) or math.nan) * first["tokens"] / run.records[-1]["tokens"]
        cost = "" if price is None else f" {price * seconds / 3600 * processes:.4f} |"
        spent = f"{seconds:.0f} s | {first['step']} | {first['tokens'] / 1e6:.2f}M | {flops:.1e}"
        found.append(f"| {target} | {spent} | {first['val_nelbo'] * bits_per_nat:.3f} |{cost}")
    return found


def training_seconds(run: Recorded, step: int) -> float:
    """What the steps up to `step` took."""
    lines = pairwise([{"tokens": 0}, *run.records])
    return sum(
        (line["tokens"] - last["tokens"]) / line["tokens_per_second"] for last, line in lines if line["step"] <= step
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--targets", type=float, nargs="+", default=[1.85, 1.6], help="bits per byte")
    parser.add_argument("--price", type=float, help="of a device-hour")
    args = parser.parse_args()
    try:
        manifest = load_manifest(args.corpus)
        bits_per_nat = manifest.tokens / manifest.text_bytes / math.log(2.0)
        found = rows(read_run(args.run), bits_per_nat, args.targets, args.price)
    except UserError as error:
        tell_error(error, "time_to.py")
        sys.exit(2)
    money = "" if args.price is None else " cost |"
    print(f"| bits per byte | time | step | tokens | FLOPs | there |{money}")
    print("|---" * (6 + (args.price is not None)) + "|")
    print("\n".join(found))


if __name__ == "__main__":
    main()
