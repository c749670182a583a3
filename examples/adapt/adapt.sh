#!/usr/bin/env bash
# From a causal model to a denoiser, against a denoiser from scratch: all of README.md on Python's standard library, for
# three seeds. Run it from anywhere; it needs megatron-md on PATH. Some 45 minutes on two cores (an estimate). Words that are given
# go to every training run: `bash examples/adapt/adapt.sh train.steps=20` is a trial.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
corpus=corpus/adapt

if ! megatron-md data verify $corpus/train $corpus/valid > /dev/null 2>&1; then
  rm -rf $corpus
  megatron-md tokenizer train --input embedded --split train --vocab 2048 --output $corpus/tokenizer.model
  for split in train valid; do
    megatron-md data build --input embedded --split $split --tokenizer $corpus/tokenizer.model --output $corpus/$split
  done
fi

rm -rf runs/adapt
megatron-md train examples/adapt/causal.yaml "$@"
megatron-md convert runs/adapt/causal runs/adapt/llama --family llama --to hf
megatron-md convert runs/adapt/llama runs/adapt/start --family llama --to megatron

start='checkpoint.load=runs/adapt/start checkpoint.load_only=model'
for seed in 1 2 3; do
  denoiser="examples/adapt/denoiser.yaml seed=$seed"
  megatron-md train $denoiser run_dir=runs/adapt/scratch-$seed "$@" &
  megatron-md train $denoiser run_dir=runs/adapt/adapted-$seed $start "$@"
  megatron-md train $denoiser run_dir=runs/adapt/annealed-$seed $start objective.attention_annealing=0.2 "$@"
  wait $!
done

python - <<'PYTHON'
import json
from pathlib import Path

for run in sorted(Path("runs/adapt").glob("*-[0-9]")):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    curve = {record["step"]: record["val_nelbo"] for record in records if "val_nelbo" in record}
    scratch = json.loads((run.parent / f"scratch-{run.name[-1]}" / "summary.json").read_text())["val_nelbo"]
    first = next((step for step, nelbo in curve.items() if nelbo <= scratch), None)
    print(f"{run.name}: val_nelbo {curve[max(curve)]:.3f}; scratch's last one, {scratch:.3f}, is reached by step {first}")
PYTHON
