#!/usr/bin/env bash
# Starts a run on one host: one process on all its GPUs (or on the platform of JAX_PLATFORMS). In
# the checkout, after `bash launch/setup_env.sh .venv cuda`:
#   WORKDIR=runs/imagenet-l bash launch/gpu_host.sh [--dry-run] [COMMAND [FLAG...]]
# runs `tokenbridge COMMAND` (train), and restarts it after a crash, at most ten times. On SIGTERM
# or Ctrl-C the process saves its state and ends with status 75. The log goes to the screen and to
# LOG (tokenbridge.log).
#
# For several hosts without a scheduler, run the same on each host, with JAX_NUM_PROCESSES (the
# number of hosts), JAX_PROCESS_ID (the number of this host, from 0) and
# JAX_COORDINATOR_ADDRESS=HOST:PORT (a free port of host 0).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
need WORKDIR runs/imagenet-l

distributed=()
if [ -n "${JAX_COORDINATOR_ADDRESS:-}" ]; then
  need JAX_NUM_PROCESSES 2
  need JAX_PROCESS_ID 0
  distributed=(--distributed)
fi
case ${1:-} in '' | -*) set -- train "$@" ;; esac
command=(.venv/bin/tokenbridge "$1" ${distributed[@]+"${distributed[@]}"}
  --workdir="$WORKDIR" --config="${CONFIG:-configs/imagenet256.py:size=${SIZE:-L}}" "${@:2}")
if [ "$dry_run" = yes ]; then
  quoted "${command[@]}"
  exit
fi
exec > >(tee -i -a "${LOG:-tokenbridge.log}") 2>&1

# On a signal the process saves and ends, and then this script ends. The process has its own process
# group (set -m), so that Ctrl-C reaches it only once, through this script: a second signal would
# stop it before it has saved.
set -m
stop() {
  trap '' TERM INT
  status=0
  kill -TERM "$child" 2>/dev/null || true
  wait "$child" || status=$?
  exit "$status"
}
crashes=0
while true; do
  "${command[@]}" </dev/null &
  child=$!
  trap stop TERM INT
  status=0
  wait "$child" || status=$?
  case $status in
    0 | 2 | 130) exit "$status" ;;
    75) ;; # Another host was told to stop. This one continues when that host is back.
    *) crashes=$((crashes + 1)) ;;
  esac
  [ "$crashes" -le 10 ] || exit "$status"
  echo "${0##*/}: status $status at $(date), crashes: $crashes; starting again"
  sleep 15 &
  child=$!
  wait "$child" || true
done
