#!/usr/bin/env bash
# A run on one slice of Cloud TPUs, which is requested as a queued resource. (tpu7x exists on
# Kubernetes only: launch/gke.sh. For several slices: launch/tpu_multislice.sh.)
#   bash launch/tpu_pod.sh [--dry-run] COMMAND      --dry-run only prints the commands
#
#   create [FLAG...]        requests the slice, with flags of gcloud such as --spot or --network=NETWORK
#   setup                   copies the committed files to every host and installs them there
#   run [COMMAND [FLAG...]] starts `tokenbridge COMMAND` (train) on every host
#   logs [HOST]             follows the log of a host (default: 0)
#   status                  shows the state of the slice, then of the run on every host
#   stop                    tells the run to save its state and end; `run` continues from there
#   delete                  releases the slice
#
# It needs gcloud with an account and a project (CLOUDSDK_CORE_PROJECT), and the variables below. On
# every host, systemd restarts the run after a crash and when another host was told to stop, at most
# ten times a day. It does not restart it after a mistake of the user (status 2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
source launch/tpu_types.sh

command=${1:-}
[ $# -eq 0 ] || shift
need NAME tokenbridge-l # name of the queued resource and its slices
need ZONE us-east5-a    # a zone where the project has quota for such chips
tpus=(gcloud compute tpus queued-resources)
everywhere=("$NAME" --zone="$ZONE" --node=all --worker=all)

# settings: sets the variables of tpu_type; refuses a type that Cloud TPU machines do not have.
settings() {
  need TYPE v6e-64 # as the cloud names it
  tpu_type "$TYPE"
  [ -n "$RUNTIME" ] && return
  echo "${0##*/}: $TYPE is on Kubernetes only: launch/gke.sh" >&2
  exit 2
}

case $command in
  create)
    settings
    nodes=(--node-id="$NAME")
    [ -z "${SLICES:-}" ] || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
    run "${tpus[@]}" create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
      --runtime-version="$RUNTIME" "${nodes[@]}" "$@"
    ;;
  setup)
    archive=${TMPDIR:-/tmp}/tokenbridge.tar.gz
    run git archive --format=tar.gz --output="$archive" HEAD
    run "${tpus[@]}" scp "$archive" "$NAME:tokenbridge.tar.gz" "${everywhere[@]:1}"
    run "${tpus[@]}" ssh "${everywhere[@]}" --command="mkdir -p tokenbridge &&
tar -xzf tokenbridge.tar.gz -C tokenbridge && cd tokenbridge && bash launch/setup_host.sh tpu,gcs"
    ;;
  run)
    settings
    need_shared gs://my-bucket/runs/imagenet-l
    case ${1:-} in '' | -*) set -- train "$@" ;; esac
    # A systemd unit with the limits of a login. A stop signals only tokenbridge itself.
    unit=(--unit=tokenbridge --collect "--uid=\$(id -un)" "--working-directory=\$HOME/tokenbridge"
      --setenv=PYTHONUNBUFFERED=1 --property=LimitMEMLOCK=infinity
      --property=KillMode=mixed --property=TimeoutStopSec=600
      --property=Restart=on-failure --property=RestartSec=15 --property=RestartPreventExitStatus=2
      --property=StartLimitIntervalSec=86400 --property=StartLimitBurst=11)
    arguments=$(quoted "$1" --distributed --workdir="$WORKDIR" \
      --config="${CONFIG:-configs/imagenet256.py:size=${SIZE:-L}}" "${@:2}")
    run "${tpus[@]}" ssh "${everywhere[@]}" --command="sudo systemd-run ${unit[*]} \
\$HOME/tokenbridge/.venv/bin/tokenbridge $arguments"
    ;;
  logs)
    run "${tpus[@]}" ssh "$NAME" --zone="$ZONE" --node="${NODE:-0}" --worker="${1:-0}" \
      --command="sudo journalctl --unit=tokenbridge --lines=100 --follow"
    ;;
  status)
    run "${tpus[@]}" describe "$NAME" --zone="$ZONE" --format='value(state.state)'
    run "${tpus[@]}" ssh "${everywhere[@]}" \
      --command="echo \$(hostname) \$(systemctl is-active tokenbridge)"
    ;;
  stop)
    run "${tpus[@]}" ssh "${everywhere[@]}" --command="sudo systemctl stop tokenbridge"
    ;;
  delete)
    run "${tpus[@]}" delete "$NAME" --zone="$ZONE" --force --quiet
    ;;
  *)
    echo "usage: bash launch/${0##*/} [--dry-run] create|setup|run|logs|status|stop|delete" >&2
    exit 2
    ;;
esac
