#!/usr/bin/env bash
# Everything that is checked: format, lint, types, tests. Makes its own environment in .venv-test.
#   bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh .venv-test test
bin=.venv-test/bin

"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/shellcheck" launch/*.sh launch/slurm.sbatch .ci/run
# A file's tests share what is slow to make: they stay on one worker.
"$bin/python" -m pytest -n 2 --dist=loadfile --no-loadscope-reorder --durations=15 "$@"
