#!/usr/bin/env bash
# Starts a run on one or several TPU slices of Google Kubernetes Engine, with launch/gke.yaml.
#   bash launch/gke.sh [--dry-run] COMMAND      --dry-run only prints the commands
#
#   run [COMMAND [FLAG...]] starts `tokenbridge COMMAND` (train) on every host
#   logs [HOST [SLICE]]     follows the log of a host (default: host 0 of slice 0)
#   status                  shows the job set and its pods
#   delete                  ends the run, which saves its state; `run` continues from there
#
# It needs kubectl for a cluster with JobSet and one node pool for each slice, an image
# (launch/Dockerfile), and the variables below. SLICES is the number of slices (1), SERVICE_ACCOUNT
# the account that may use WORKDIR (default).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
source launch/tpu_types.sh

command=${1:-}
[ $# -eq 0 ] || shift
need NAME tokenbridge-l # of the JobSet
label=jobset.sigs.k8s.io

# json ARGUMENT...: prints the arguments as strings of JSON, which are also valid YAML.
json() {
  local argument line=''
  for argument in "$@"; do
    argument=${argument//\\/\\\\}
    line+="${line:+, }\"${argument//\"/\\\"}\""
  done
  printf '%s\n' "$line"
}

case $command in
  run)
    need TYPE tpu7x-32 # as the cloud names it
    need_shared gs://my-bucket/runs/imagenet-l
    need IMAGE us-docker.pkg.dev/my-project/my-images/tokenbridge
    size=${SIZE:-L}
    tpu_type "$TYPE"
    case ${1:-} in '' | -*) set -- train "$@" ;; esac
    arguments=$(json "$1" --distributed --workdir="$WORKDIR" \
      --config="${CONFIG:-configs/imagenet256.py:size=$size}" "${@:2}")
    manifest=$(<launch/gke.yaml)
    for field in "NAME=$NAME" "SLICES=${SLICES:-1}" "HOSTS=$HOSTS" "IMAGE=$IMAGE" \
      "ACCELERATOR=$ACCELERATOR" "SHAPE=$SHAPE" "ARGUMENTS=$arguments" \
      "SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}"; do
      manifest=${manifest//"\${${field%%=*}}"/"${field#*=}"}
    done
    [ "$dry_run" = no ] || printf '%s\n' "$manifest"
    run kubectl apply --filename=- <<<"$manifest"
    ;;
  logs)
    host=batch.kubernetes.io/job-completion-index=${1:-0},$label/job-index=${2:-0}
    run kubectl logs --follow --tail=100 --selector="$label/jobset-name=$NAME,$host"
    ;;
  status)
    run kubectl get jobset "$NAME"
    run kubectl get pods --output=wide --selector="$label/jobset-name=$NAME"
    ;;
  delete)
    run kubectl delete jobset "$NAME"
    ;;
  *)
    echo "usage: bash launch/${0##*/} [--dry-run] run|logs|status|delete" >&2
    exit 2
    ;;
esac
