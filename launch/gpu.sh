#!/usr/bin/env bash
# One machine with NVIDIA GPUs: `launch/gpu.sh [--dry-run] COMMAND ...` runs rag-mm with GPU settings.
#   launch/gpu.sh train --config=configs/quickstart.py:quick --workdir=runs/quickstart
# One process. `train` uses one GPU; for all, append --coordinator=localhost:8476 --num-processes=1 --process-id=0.
set -euo pipefail
dry=
[ "${1:-}" != --dry-run ] || { dry=1; shift; }
[ $# -gt 0 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
# Gives jax most of the GPU memory and overlaps collectives with compute. Variables that are already set win.
environment=(
  "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
  "XLA_FLAGS=${XLA_FLAGS:---xla_gpu_enable_latency_hiding_scheduler=true}"
)
command=(env "${environment[@]}" "$(dirname "$0")/../.venv/bin/rag-mm" "$@")
if [ -n "$dry" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
[ -x "$(dirname "$0")/../.venv/bin/rag-mm" ] || { echo "launch/gpu.sh: there is no .venv; run make first, then .venv/bin/pip install '.[gpu]'." >&2; exit 2; }
exec "${command[@]}"
