#!/usr/bin/env bash
# Tokenizer, shards, training on two processes, a plot and a generated sample: what `make demo` runs.
# Run it from anywhere; it needs megatron-md on PATH. Finished parts of corpus/ are kept, runs/demo starts afresh.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

config=examples/tiny/demo.yaml
start=$SECONDS
say() { printf '\n== %s\n' "$*"; }

if ! megatron-md data verify corpus/train corpus/valid > /dev/null 2>&1 \
    || ! megatron-md train "$config" --dry-run > /dev/null 2>&1; then
  say 'tokenizer: 8192 pieces from the standard library'
  rm -rf corpus/train corpus/valid
  megatron-md tokenizer train --input embedded --split train --vocab 8192 --output corpus/tokenizer.model
  say 'shards: the standard library as tokens, split by file'
  for split in train valid; do
    megatron-md data build --input embedded --split "$split" --tokenizer corpus/tokenizer.model --output "corpus/$split" --workers 2
  done
fi

say 'training on two processes (tensor-parallel)'
rm -rf runs/demo
torchrun --nproc-per-node 2 -m megatron_md train "$config"

say 'what came out'
megatron-md plot runs/demo
python - <<'PYTHON'
import json

summary = json.load(open("runs/demo/summary.json"))
print(f"{summary['parameters']:,} parameters, {summary['tokens_per_second']:,.0f} tokens/s")
print(f"validation NELBO {summary['val_nelbo']:.3f} +- {summary['val_nelbo_stderr']:.3f} nats per token")
print(f"unigram entropy  {summary['unigram_entropy']:.3f} nats per token (what a model that ignores the context pays)")
PYTHON

say 'a sample: the prompt, and what the model denoises after it'
megatron-md generate runs/demo --prompt $'def __init__(self' --length 64 --steps 64

cat <<END

== done in $((SECONDS - start)) s
  runs/demo/loss.png        the losses              runs/demo/metrics.jsonl   every figure of every logged step
  runs/demo/summary.json    final figures           runs/demo/config.yaml     the resolved config
  runs/demo/checkpoints     resumes and generates   corpus/                   tokenizer and shards

Try next (in this folder, after: source .venv/bin/activate):
  megatron-md train $config --nproc-per-node 2 run_dir=runs/uniform objective.mask_schedule=uniform:0,1
  megatron-md generate runs/demo --prompt 'import ' --strategy ancestral --temperature 1
  megatron-md train examples/8b/pretrain.yaml --dry-run --world-size 64
  megatron-md train --help
END
