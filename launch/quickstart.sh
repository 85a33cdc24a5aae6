#!/usr/bin/env bash
# The whole line on handwritten digits, on the CPU: images -> autoencoder -> index shards -> model ->
# samples. Makes its own environment in .venv; leaves pictures and everything else in WORKDIR.
#   bash launch/quickstart.sh [WORKDIR]     (runs/quickstart; started again, it goes on or is done)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$(date +%s)
workdir=${1:-runs/quickstart}

echo "== installing into .venv"
bash launch/setup_env.sh .venv
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Two single-threaded devices, each with half of a batch, use two cores better than one device with
# two threads does: 1.5 times the images a second in training.
export JAX_NUM_CPU_DEVICES=2 XLA_FLAGS="--xla_cpu_multi_thread_eigen=false ${XLA_FLAGS:-}"
tokenbridge=.venv/bin/tokenbridge

echo "== 1/4 train-vae: an autoencoder for digits"
"$tokenbridge" train-vae --config configs/digits.py --workdir "$workdir"
echo "== 2/4 tokenize: digits -> indices"
"$tokenbridge" tokenize --workdir "$workdir"
echo "== 3/4 train: a distribution over indices"
"$tokenbridge" train --workdir "$workdir"
echo "== 4/4 sample: 1,000 new digits"
"$tokenbridge" sample --workdir "$workdir" --num_images 1000
echo "== evaluate: how far these are from the real ones"
"$tokenbridge" evaluate generation --workdir "$workdir" --images "$workdir/samples/samples.npz" --reference data
.venv/bin/python launch/score_digits.py --workdir "$workdir" --started "$started"
