"""What an estimator of the NELBO costs: forward passes for equal error, on fixed rows of a trained model.

    python benchmarks/estimators.py runs/demo corpus/valid --rows 64 --passes 8 --seeds 4

For each estimator: its error from the masks alone at `--passes` passes, squared, times the forward passes that it took
(masked rows through the model); relative to `plain` that is the share of forward passes which it needs for the same
error. Seeds repeat the measurement; the spread over them is printed. `stratified_t` and `plain` have a target of their
own, the mean of CE(t) over [eps, 1], and a heavy tail: at eps = 1e-3 a draw may weigh 1000.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

from megatron_md import parallel
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.estimators import Estimator, EstimatorName
from megatron_md.diffusion.nelbo import NelboReport, evaluate_nelbo
from megatron_md.diffusion.scoring import ScoredRows, Scorer
from megatron_md.evaluate.load import load_model
from megatron_md.evaluate.rows import evaluation_rows
from megatron_md.run.saved import Placement, open_run

NAMES: tuple[EstimatorName, ...] = ("plain", "stratified_t", "exact", "complementary", "neyman")
EPS = 1e-3


def measure(
    scorer: Scorer, rows: ScoredRows, mask_token_id: int, *, passes: int, seed: int, pilot: int
) -> dict[str, NelboReport]:
    """Each estimator's report at one seed; `neyman` gets its density from a pilot with a seed of its own."""
    density = evaluate_nelbo(
        scorer, rows, Estimator("exact", 10_000 + seed), mask_token_id=mask_token_id, passes=pilot
    ).neyman_density()
    return {
        name: evaluate_nelbo(
            scorer,
            rows,
            Estimator(name, seed, EPS, density if name == "neyman" else ()),
            mask_token_id=mask_token_id,
            passes=passes,
        ).report()
        for name in NAMES
    }


def cost(report: NelboReport) -> float:
    """Forward passes x squared error: what does not change with the number of passes."""
    return report.forward_passes * report.mask_stderr**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_path", metavar="RUN")
    parser.add_argument("data", metavar="DATA", help="a manifest or text files", nargs="+")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--pilot", type=int, default=4, help="passes of the pilot for neyman, which are not counted")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    saved = open_run(args.run_path, Placement(device="cpu"))
    saved = replace(saved, config=replace(saved.config, train=replace(saved.config.train, micro_batch_size=8)))
    tokenizer = Tokenizer(saved.tokenizer)
    rows = evaluation_rows(args.data, [saved.config], tokenizer, count=args.rows)
    with parallel.session(saved.config) as world:
        scorer = load_model(saved, world, tokenizer)
        found = [
            measure(scorer, rows, tokenizer.mask_token_id, passes=args.passes, seed=seed, pilot=args.pilot)
            for seed in range(args.seeds)
        ]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"{saved.checkpoint}, {rows.tokens_RL.shape} rows x tokens, {args.passes} passes, {args.seeds} seeds, eps {EPS}"
    )
    print(f"commit {commit}, {platform.machine()}\n")
    print("estimator       mean estimate  error of one pass  forward passes for equal error  least  most")
    table = {}
    for name in NAMES:
        shares = [cost(reports[name]) / statistics.mean(cost(r["plain"]) for r in found) for reports in found]
        one_pass = statistics.mean(r[name].mask_stderr * r[name].passes ** 0.5 for r in found)
        table[name] = {
            "nelbo": statistics.mean(r[name].nelbo for r in found),
            "error_of_one_pass": one_pass,
            "forward_passes": statistics.mean(shares),
            "least": min(shares),
            "most": max(shares),
        }
        print(
            f"{name:<14s} {table[name]['nelbo']:>14.4f} {one_pass:>18.4f} {statistics.mean(shares):>31.3f} "
            f"{min(shares):>6.3f} {max(shares):>5.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"commit": commit, "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
