# Names of TPU slices, for the TPU scripts, which source this file. `train` itself picks settings for
# a slice. `bash launch/preflight_table.sh` compiles sizes L and H for every type; launch/README.md
# has the results.
# shellcheck shell=bash disable=SC2034

TPU_TYPES="v4-32 v4-64 v5litepod-64 v5litepod-256 v5p-32 v5p-128 v6e-64 v6e-256 tpu7x-32"

# tpu_type TYPE: TYPE as the cloud names it. Sets
#   CHIPS, HOSTS  their numbers in the slice; a chip of tpu7x is two devices of JAX, others are one
#   TOPOLOGY      the name for `tokenbridge preflight --topology`
#   SHAPE         the shape of the slice, in chips
#   RUNTIME       the image of Cloud TPU machines; empty if the type exists on Kubernetes only
#   ACCELERATOR   the name of the nodes on Kubernetes Engine
# Prints one line and returns 2 if there is no such type.
tpu_type() {
  local cores
  if [[ " $TPU_TYPES " != *" $1 "* ]]; then
    echo "TYPE=$1 is not in launch/tpu_types.sh, which has: $TPU_TYPES" >&2
    return 2
  fi
  case $1 in # Some types are named by their number of cores. A chip has two.
    v4-*) cores=2 RUNTIME=tpu-ubuntu2204-base ACCELERATOR=tpu-v4-podslice ;;
    v5litepod-*) cores=1 RUNTIME=v2-alpha-tpuv5-lite ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p-*) cores=2 RUNTIME=v2-alpha-tpuv5 ACCELERATOR=tpu-v5p-slice ;;
    v6e-*) cores=1 RUNTIME=v2-alpha-tpuv6e ACCELERATOR=tpu-v6e-slice ;;
    tpu7x-*) cores=2 RUNTIME='' ACCELERATOR=tpu7x ;;
  esac
  CHIPS=$((${1##*-} / cores))
  HOSTS=$((CHIPS / 4))
  case $ACCELERATOR:$CHIPS in
    *v5-lite*:64 | *v6e*:64) SHAPE=8x8 ;;
    *v5-lite*:256 | *v6e*:256) SHAPE=16x16 ;;
    *:16) SHAPE=2x2x4 ;;
    *:32) SHAPE=2x4x4 ;;
    *:64) SHAPE=4x4x4 ;;
  esac
  TOPOLOGY=$1
}
