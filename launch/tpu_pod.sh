#!/usr/bin/env bash
# A slice of Cloud TPU VMs: create it, install on every worker, run a command on all, delete it.
#   export NAME=pod ZONE=us-west4-a TYPE=v5litepod-256
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh install https://example.org/rag_mm.git
#   launch/tpu_pod.sh run train --config=configs/quickstart.py:quick --workdir=/mnt/shared/run \
#     --config.tokenizer.batch_size=256 --config.decoder.batch_size=256
#   launch/tpu_pod.sh delete
# The workdir is a folder that all workers mount, such as Filestore or a bucket with Cloud Storage FUSE. Batch sizes
# must be divisible by the number of chips.
# `run train`, `run memory build`, `run corpus build` and `run corpus neighbors` run as one program across all workers; any
# other command runs once on each. docs/training_at_scale.md has them in order.
# --dry-run before the verb only prints the command. SPOT=1 requests preemptible chips.
set -euo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
# Quotes words for any POSIX shell: the %q of bash writes $'..', which others do not read.
quote() { for word in "$@"; do printf "'%s' " "${word//\'/\'\\\'\'}"; done; }
need() { [ -n "${!1:-}" ] || { echo "launch/tpu_pod.sh: set $1 first, such as NAME=pod ZONE=us-west4-a TYPE=v5litepod-256." >&2; exit 2; }; }

dry=
[ "${1:-}" != --dry-run ] || { dry=1; shift; }
verb=${1:-}
[ -n "$verb" ] || usage
shift
need NAME
need ZONE
case $NAME in
  -*) echo "launch/tpu_pod.sh: NAME=$NAME begins like an option; choose another." >&2; exit 2 ;;
esac

on_all=(gcloud compute tpus tpu-vm ssh "$NAME" "--zone=$ZONE" --worker=all)
case $verb in
  create)
    need TYPE
    command=(gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "--zone=$ZONE"
      "--accelerator-type=$TYPE" "--runtime-version=${VERSION:-v2-alpha-tpuv5-lite}")
    [ -z "${SPOT:-}" ] || command+=(--spot)
    ;;
  install)
    [ $# -eq 1 ] || usage
    remote="git clone -- $(quote "$1")rag_mm && cd rag_mm && make tpu"
    command=("${on_all[@]}" "--command=$remote")
    ;;
  run)
    [ $# -gt 0 ] || usage
    given=
    for word in "$@"; do case $word in --coordinator | --coordinator=*) given=1 ;; esac; done
    case "$1 ${2:-}" in
      train\ * | "memory build" | "corpus build" | "corpus neighbors") [ -n "$given" ] || set -- "$@" --coordinator=auto ;;
    esac
    arguments=$(quote "$@"; echo x)  # The x keeps line ends of the last word.
    command=("${on_all[@]}" "--command=cd rag_mm && .venv/bin/rag-mm ${arguments%" x"}")
    ;;
  delete)
    command=(gcloud compute tpus queued-resources delete "$NAME" "--zone=$ZONE" --force --quiet)
    ;;
  *) usage ;;
esac

if [ -n "$dry" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
