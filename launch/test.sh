#!/usr/bin/env bash
# Everything that is checked: format, lint, types, tests. Makes its own environment, one for every
# version of Python, in .venv-test-VERSION.
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
# A file's tests share what is slow to make: they stay on one worker.
"$bin/python" -m pytest -n 2 --dist=loadfile --no-loadscope-reorder --durations=15 "$@"
