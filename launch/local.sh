#!/usr/bin/env bash
# One machine: `launch/local.sh [--dry-run] COMMAND ...` is rag-mm with what only a locked environment may set.
#   launch/local.sh train --config=configs/quickstart.py:quick --workdir=runs/quickstart
set -euo pipefail
dry=
[ "${1:-}" != --dry-run ] || { dry=1; shift; }
command="$(dirname "$0")/../.venv/bin/rag-mm"
# On a CPU this takes a fifth off a training step (2.46 -> 2.0 s). jax stops at a flag that it does not know, so it is
# set here only, where requirements.lock says which jax.
export XLA_FLAGS="--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE ${XLA_FLAGS:-}"
# A program's buffers of hundreds of MB are made anew each step: in large pages, and kept by the process, they cost no
# page faults, which were another fifth of a step. Variables that are set win.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
if [ -n "$dry" ]; then
  printf '%q ' env "XLA_FLAGS=$XLA_FLAGS" "GLIBC_TUNABLES=$GLIBC_TUNABLES" \
    "MALLOC_MMAP_THRESHOLD_=$MALLOC_MMAP_THRESHOLD_" "MALLOC_TRIM_THRESHOLD_=$MALLOC_TRIM_THRESHOLD_" "$command" "$@"
  echo
  exit 0
fi
[ -x "$command" ] || { echo "launch/local.sh: there is no .venv yet; run make first." >&2; exit 2; }
exec "$command" "$@"
