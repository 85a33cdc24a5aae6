#!/usr/bin/env bash
# A run on several slices of Cloud TPUs, connected by the data-centre network: the commands of
# launch/tpu_pod.sh, on all hosts of all slices.
#   SLICES=4 bash launch/tpu_multislice.sh [--dry-run] COMMAND
#
# It needs the programs and variables of launch/tpu_pod.sh, and SLICES. Only sums of gradients
# should cross the slow network, so `train` splits parameters within a slice only (fsdp), and every
# slice has a copy of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

need SLICES 2 # the number of slices of TYPE
export SLICES
[ "$dry_run" = no ] || set -- --dry-run "$@"
exec bash launch/tpu_pod.sh "$@"
