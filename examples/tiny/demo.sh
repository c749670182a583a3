#!/usr/bin/env bash
# Text, tokenizer, shards, training on two processes, and what the model can do: what `make demo` runs.
# Run it from anywhere; it needs megatron-md on PATH. Finished parts of corpus/ are kept, runs/demo starts afresh.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

config=examples/tiny/demo.yaml
start=$SECONDS
# `say WHAT [SECONDS]`: a heading, with what it takes on two idle cores of a server.
say() { printf '\n== %s%s\n' "$1" "${2:+ (about $2 s)}"; }

if ! megatron-md data verify corpus/train corpus/valid > /dev/null 2>&1 \
    || ! megatron-md train "$config" --dry-run > /dev/null 2>&1; then
  say '1/5 tokenizer: 8192 pieces from the standard library' 20
  rm -rf corpus/train corpus/valid
  megatron-md tokenizer train --input embedded --split train --vocab 8192 --output corpus/tokenizer.model
  say '2/5 shards: the standard library as tokens, one file in twenty held out' 10
  for split in train valid; do
    megatron-md data build --input embedded --split "$split" --tokenizer corpus/tokenizer.model --output "corpus/$split" --workers 2
  done
else
  say '1/5 and 2/5: corpus/ is there already'
fi

say '3/5 training on two processes; val_nelbo is of held-out text, and falls' 170
echo 'as a page, from another terminal: .venv/bin/megatron-md report runs/demo --watch 20'
rm -rf runs/demo
torchrun --nproc-per-node 2 -m megatron_md train "$config"

say '4/5 what it has learned' 30
python examples/tiny/judge.py runs/demo corpus/valid

say '5/5 beginning and end are given, the middle is written' 10
megatron-md generate runs/demo --infill --save-trace runs/demo/replay.html \
  --prompt $'def read(self, path):\n    """[[8]]"""\n    with open(path) as file:\n        return [[6]]\n'
megatron-md report runs/demo

cat <<END

== done in $((SECONDS - start)) s; open in a browser
  $PWD/runs/demo/report.html    the run: curves, mask schedule, cost, environment
  $PWD/runs/demo/replay.html    the last text, as it was unmasked

Try next (in this folder, after: source .venv/bin/activate):
  megatron-md train $config --nproc-per-node 2 run_dir=runs/uniform objective.mask_schedule=uniform:0,1
  megatron-md report runs/demo runs/uniform
  megatron-md generate runs/demo --prompt 'import ' --strategy ancestral --temperature 0.8
  megatron-md train examples/8b/pretrain.yaml --dry-run --world-size 64
  megatron-md train --help
END
