#!/usr/bin/env bash
# Runs all checks: format, lint, types, tests. It makes its own environment .venv-test-VERSION, one
# for each version of Python.
#   bash launch/test.sh [PYTEST ARGUMENTS]
# PYTHON names the interpreter to use (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment=.venv-test-$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
bash launch/setup_env.sh "$environment" test
bin=$environment/bin

"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/shellcheck" launch/*.sh launch/slurm.sbatch .ci/run
# The tests of a file share objects that are slow to make, so they run on the same worker. A worker
# that crashes ends the run: with another one in its place, pytest-xdist may wait without end.
"$bin/python" -m pytest -n 2 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0 \
  --durations=15 "$@"
