#!/usr/bin/env bash
# The corpora of the studies, in corpus/studies: `corpora.sh` makes python, `corpora.sh python english` both.
# English text is fetched by english.py, which needs apt-get and npm. What is there already is kept.
set -euo pipefail
studies="$(cd "$(dirname "$0")" && pwd)"

[ "$#" -gt 0 ] || set -- python
for name in "$@"; do
  folder="corpus/studies/$name"
  case "$name" in
    python) input=embedded ;;
    english)
      input="$folder/text"
      [ -d "$input" ] || python "$studies/english.py" "$input"
      ;;
    *)
      echo "corpora.sh: no corpus '$name'; there are python and english" >&2
      exit 2
      ;;
  esac
  [ -f "$folder/tokenizer.model" ] || megatron-md tokenizer train --input "$input" --split train --vocab 4096 \
    --output "$folder/tokenizer.model"
  for split in train valid; do
    megatron-md data build --input "$input" --split "$split" --tokenizer "$folder/tokenizer.model" \
      --output "$folder/$split" --workers 2
  done
done
