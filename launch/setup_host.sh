#!/usr/bin/env bash
# Installs the package on a fresh Ubuntu host into .venv of the checkout, with a newer Python if the
# host's is too old:
#   bash launch/setup_host.sh EXTRAS      extras of setup.py, comma-separated
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.12
  PYTHON=$(python3 -m uv python find 3.12)
  export PYTHON
fi
bash launch/setup_env.sh .venv "${1:?usage: bash launch/setup_host.sh EXTRAS}"
