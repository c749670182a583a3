#!/usr/bin/env bash
# From text to a judged model, and how long it took to the target: see README.md.
#   bash examples/speedrun/speedrun.sh                                      two CPU processes
#   bash examples/speedrun/speedrun.sh examples/speedrun/gpu.yaml 1         one process on a GPU
# Further words go to `megatron-md train`. Run it from anywhere; it needs megatron-md on PATH.
set -euo pipefail
cd "$(dirname "$0")/../.."
config=${1:-examples/tiny/demo.yaml} processes=${2:-2}
shift "$(($# < 2 ? $# : 2))"

if ! megatron-md data verify corpus/train corpus/valid > /dev/null 2>&1; then
  rm -rf corpus/train corpus/valid
  megatron-md tokenizer train --input embedded --split train --vocab 8192 --output corpus/tokenizer.model
  for split in train valid; do
    megatron-md data build --input embedded --split "$split" --tokenizer corpus/tokenizer.model --output "corpus/$split"
  done
fi

train=(megatron-md train "$config" --nproc-per-node "$processes" run_dir=runs/speedrun validation.every_steps=50
  validation.sequences=1024 "$@")
"${train[@]}" --dry-run > /dev/null # what it refuses is said before the last run is removed
rm -rf runs/speedrun
"${train[@]}"
python examples/speedrun/time_to.py runs/speedrun corpus/valid
megatron-md evaluate runs/speedrun --nelbo corpus/valid --rows 1024
