"""How much of a schedule's gain is calibration? NELBO by mask rate, as it is and with a temperature for each rate.

    python examples/studies/calibration.py runs/studies/windows/U_0_1/seed_1 runs/studies/windows/0.4_0.5/seed_1

A temperature per bin of the mask rate is fitted on training rows (the one of a grid with the lowest cross-entropy) and
applied to validation rows. What the temperature takes off a model's NELBO was miscalibration; what is left of the
difference between two models was not. All runs see the same rows and masks: exactly round(t L), t the middle of a bin.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import megatron_md as md
from megatron_md.config import Config, load_config
from megatron_md.data.shards import load_manifest
from megatron_md.data.stream import validation_rows
from megatron_md.diffusion.corruption import FloatArray, mask_exact_count
from megatron_md.errors import UserError

BINS = 10
TEMPERATURES = 2.0 ** (np.arange(-16, 21) / 16)  # 1 among them
BATCH = 32


@torch.no_grad()
def cross_entropies(run: Path, manifest: str, rows: int, config: Config) -> FloatArray:
    """Cross-entropy per masked token in nats, by bin of the mask rate and temperature: float64 [BINS, temperatures].

    Args:
        run: directory of the run.
        manifest: the corpus that rows are taken from.
        rows: how many.
        config: the run's config.
    """
    clean = validation_rows(load_manifest(manifest), config.data.seq_length, rows)
    tokens_RL, is_maskable_RL = clean.tokens_BL, clean.is_maskable_BL
    sums = np.zeros((BINS, len(TEMPERATURES)))
    with md.load(run) as (model, tokenizer):
        temperature_T = torch.tensor(TEMPERATURES, dtype=torch.float32, device=model.device)
        for k in range(BINS):
            masked_tokens = 0
            for start in range(0, len(tokens_RL), BATCH):
                rows_B = np.arange(start, min(start + BATCH, len(tokens_RL)))
                maskable_BL = is_maskable_RL[rows_B]
                count_B = np.rint((k + 0.5) / BINS * maskable_BL.sum(axis=1)).astype(np.int64)
                index = [(int(row), k) for row in rows_B]
                is_masked_BL = mask_exact_count(0, index, count_B, maskable_BL)
                masked_tokens += int(is_masked_BL.sum())
                tokens_BL = np.where(is_masked_BL, tokenizer.mask_token_id, tokens_RL[rows_B])
                logits_MV = model(torch.from_numpy(tokens_BL).to(model.device))[torch.from_numpy(is_masked_BL)].float()
                targets_M = torch.from_numpy(tokens_RL[rows_B][is_masked_BL]).to(model.device)
                right_M = logits_MV.gather(1, targets_M[:, None])[:, 0]
                for number, temperature in enumerate(temperature_T):
                    nll_M = torch.logsumexp(logits_MV / temperature, dim=1) - right_M / temperature
                    sums[k, number] += float(nll_M.sum(dtype=torch.float64))
            sums[k] /= max(masked_tokens, 1)
    return sums


def calibrate(run: Path, rows: int) -> dict[str, list[float]]:
    """The figures of a run by bin: `rate`, `ce` of validation rows, `temperature`, `calibrated_ce`.

    Raises:
        UserError: the run has no validation corpus.
    """
    config = load_config(run / "config.yaml")
    if config.data.valid is None:
        raise UserError(f"{run}: has no validation corpus; train it with data.valid")
    training = cross_entropies(run, config.data.corpora()[0].manifest, rows, config)
    held_out = cross_entropies(run, config.data.valid, rows, config)
    best_K = training.argmin(axis=1)
    as_it_is = int(np.argmin(np.abs(TEMPERATURES - 1.0)))
    return {
        "rate": [(k + 0.5) / BINS for k in range(BINS)],
        "ce": held_out[:, as_it_is].tolist(),
        "temperature": TEMPERATURES[best_K].tolist(),
        "calibrated_ce": held_out[np.arange(BINS), best_K].tolist(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = {str(run): calibrate(run, arguments.rows) for run in arguments.runs}
    print(f"{'rate':>6}" + "".join(f"{'CE':>10}{'T':>6}{'with T':>8}" for _ in found))
    for k in range(BINS):
        cells = (f"{f['ce'][k]:10.3f}{f['temperature'][k]:6.2f}{f['calibrated_ce'][k]:8.3f}" for f in found.values())
        print(f"{(k + 0.5) / BINS:6.2f}" + "".join(cells))
    means = (f"{np.mean(f['ce']):10.3f}{'':6}{np.mean(f['calibrated_ce']):8.3f}" for f in found.values())
    print(f"{'mean':>6}" + "".join(means))
    print("\n".join(f"column {number}: {run}" for number, run in enumerate(found, start=1)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
