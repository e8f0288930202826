#!/usr/bin/env bash
# One CPU machine: `launch/local.sh [--dry-run] COMMAND ...` runs rag-mm with flags tuned for the locked jax version.
#   launch/local.sh train --config=configs/quickstart.py:quick --workdir=runs/quickstart
set -euo pipefail
dry=
[ "${1:-}" != --dry-run ] || { dry=1; shift; }
command="$(dirname "$0")/../.venv/bin/rag-mm"
# Makes a training step on a CPU a fifth faster (2.46 -> 2.0 s). jax exits on flags that it does not know, so this is
# set only here, where requirements.lock pins jax.
export XLA_FLAGS="--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE ${XLA_FLAGS:-}"
# Each step allocates buffers of hundreds of MB. Huge pages, and not returning memory to the system, avoid page faults,
# which took another fifth of a step. Variables that are already set win.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
if [ -n "$dry" ]; then
  printf '%q ' env "XLA_FLAGS=$XLA_FLAGS" "GLIBC_TUNABLES=$GLIBC_TUNABLES" \
    "MALLOC_MMAP_THRESHOLD_=$MALLOC_MMAP_THRESHOLD_" "MALLOC_TRIM_THRESHOLD_=$MALLOC_TRIM_THRESHOLD_" "$command" "$@"
  echo
  exit 0
fi
[ -x "$command" ] || { echo "launch/local.sh: there is no .venv; run make first." >&2; exit 2; }
exec "$command" "$@"
