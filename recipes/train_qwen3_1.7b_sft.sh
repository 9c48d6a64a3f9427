#!/usr/bin/env bash
# SFT of Qwen3-1.7B as a diffusion model: source masks are made from the instructions by themselves.
# Further key=value arguments override the recipe, for instance data.dataset_name=my.jsonl.
# One GPU: ./recipes/train_qwen3_1.7b_sft.sh      Eight: NPROC=8 ./recipes/train_qwen3_1.7b_sft.sh
set -euo pipefail
recipe="$(dirname "${BASH_SOURCE[0]}")/train_qwen3_1.7b_sft.yaml"
if [ "${NPROC:-1}" -gt 1 ]; then
  exec torchrun --nproc_per_node="$NPROC" -m unmask train "$recipe" "$@"
fi
exec unmask train "$recipe" "$@"
