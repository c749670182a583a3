#!/usr/bin/env bash
# One node, all of its GPUs. The same command resumes; Ctrl-C and SIGTERM save a checkpoint first (exit code 75).
set -euo pipefail
exec megatron-md train "$(dirname "$0")/pretrain.yaml" --nproc-per-node "${GPUS:-8}" "$@"
