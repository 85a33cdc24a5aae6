# Names of TPU slices, and settings of the published sizes for them at the paper's batch of 2048.
# The TPU scripts source this file. `bash launch/preflight_table.sh` compiles every row;
# launch/README.md has the results.
# shellcheck shell=bash disable=SC2034

# Type and size; fsdp, remat, head_chunk, accumulation.
TPU_TABLE="
v4-32         L   8 dots 1024 1
v4-32         H   8 full 1024 1
v4-64         L   8 dots 1024 1
v4-64         H   8 dots 1024 1
v5litepod-64  L   8 dots  512 1
v5litepod-64  H  16 dots  512 1
v5litepod-256 L   8 none 1024 1
v5litepod-256 H  16 none  512 1
v5p-32        L   4 none 4096 1
v5p-32        H   8 dots 4096 1
v5p-128       L   1 none 4096 1
v5p-128       H   4 none 4096 1
v6e-64        L   8 none 1024 1
v6e-64        H  16 dots 1024 1
v6e-256       L   4 none 1024 1
v6e-256       H   8 none 1024 1
tpu7x-32      L   2 none 4096 1
tpu7x-32      H   4 none 4096 1
"

# tpu_settings TYPE SIZE: TYPE as the cloud names it, SIZE is L or H. Sets
#   CHIPS, HOSTS  their numbers in the slice; a chip of tpu7x is two devices of JAX, others are one
#   TOPOLOGY      the name for `tokenbridge preflight --topology`
#   SHAPE         the shape of the slice, in chips
#   RUNTIME       the image of Cloud TPU machines; empty if the type exists on Kubernetes only
#   ACCELERATOR   the name of the nodes on Kubernetes Engine
#   FLAGS         flags of `tokenbridge train`
# Prints one line and returns 2 if the table has no such row.
tpu_settings() {
  local row fsdp remat chunk accumulation cores
  row=$(awk -v type="$1" -v size="$2" '$1 == type && $2 == size' <<<"$TPU_TABLE")
  if [ -z "$row" ]; then
    echo "TYPE=$1 with SIZE=$2 is not in launch/tpu_types.sh, which has:" \
      "$(awk 'NF { print $1 "/" $2 }' <<<"$TPU_TABLE" | paste -s -d ' ' -)" >&2
    return 2
  fi
  read -r _ _ fsdp remat chunk accumulation <<<"$row"
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
  FLAGS=(
    --config.mesh.data=-1 --config.mesh.fsdp="$fsdp" --config.model.scan_layers=True
    --config.model.remat="$remat" --config.model.head_chunk="$chunk"
    --config.training.accumulation="$accumulation"
  )
}
