#!/usr/bin/env bash
# A run on several slices of Cloud TPUs joined by the data-centre network: the commands of
# launch/tpu_pod.sh, for all hosts of all slices.
#   SLICES=4 bash launch/tpu_multislice.sh [--dry-run] COMMAND
#
# Needs what launch/tpu_pod.sh needs, and SLICES. Only sums of gradients should cross the slow
# network: parameters are split inside a slice (fsdp) and copied between slices (data = -1).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

need SLICES 2 # how many slices of TYPE
export SLICES
[ "$dry_run" = no ] || set -- --dry-run "$@"
exec bash launch/tpu_pod.sh "$@"
