#!/usr/bin/env bash
# Handwritten digits on the CPU: images -> autoencoder -> index shards -> model -> samples. It makes
# its own environment in .venv and writes pictures and all other files to WORKDIR.
#   bash launch/quickstart.sh [WORKDIR]     (default: runs/quickstart; a second start continues)
set -euo pipefail
case ${1:-} in -*)
  echo "usage: bash launch/quickstart.sh [WORKDIR]" >&2
  exit 2
  ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$(date +%s)
workdir=${1:-runs/quickstart}

echo "== installing into .venv"
bash launch/setup_env.sh .venv
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# On two cores, two single-threaded devices with half a batch each train 1.5 times as many images a
# second as one device with two threads.
export JAX_NUM_CPU_DEVICES=2 XLA_FLAGS="--xla_cpu_multi_thread_eigen=false ${XLA_FLAGS:-}"
tokenbridge=.venv/bin/tokenbridge

echo "== 1/4 train-vae: an autoencoder for digits"
echo "   (Both trainings first list the network's parameters. \"peak\" is the fastest matrix product of"
echo "   this machine, and \"MFU\" in later lines the share of it that the training reaches.)"
"$tokenbridge" train-vae --config configs/digits.py --workdir "$workdir"
echo "== 2/4 tokenize: digits -> indices"
"$tokenbridge" tokenize --workdir "$workdir"
echo "== 3/4 train: a distribution over indices"
"$tokenbridge" train --workdir "$workdir"
echo "== 4/4 sample: 1,000 new digits"
"$tokenbridge" sample --workdir "$workdir" --num_images 1000
echo "== evaluate: the distance between these and the real digits"
"$tokenbridge" evaluate generation --workdir "$workdir" \
  --images "$workdir/samples/samples.npz" --reference data
.venv/bin/python launch/score_digits.py --workdir "$workdir" --started "$started"
