#!/usr/bin/env bash
# Adapt Qwen3-1.7B to diffusion on plain text: every token can be masked.
# Further key=value arguments override the recipe, for instance data.dataset_name=my.txt.
# One GPU: ./recipes/train_qwen3_1.7b.sh      Eight: NPROC=8 ./recipes/train_qwen3_1.7b.sh
set -euo pipefail
recipe="$(dirname "${BASH_SOURCE[0]}")/train_qwen3_1.7b.yaml"
if [ "${NPROC:-1}" -gt 1 ]; then
  exec torchrun --nproc_per_node="$NPROC" -m unmask train "$recipe" "$@"
fi
exec unmask train "$recipe" "$@"
