#!/usr/bin/env bash
# Makes a virtual environment and installs the package into it:
#   bash launch/setup_env.sh DIR [EXTRAS]
#   DIR     folder of the environment; an existing one of the same Python is updated
#   EXTRAS  extras of setup.py, comma-separated: test, tpu, cuda, gcs, tfds, torch
# PYTHON names the interpreter to use (3.11 or newer).
set -euo pipefail

directory=${1:?usage: bash launch/setup_env.sh DIR [EXTRAS]}
extras=${2:+[$2]}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
version='import sys; print("%d.%d" % sys.version_info[:2])'

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed; '$python' is $("$python" -V 2>&1). Set PYTHON=/path/to/python3.11" >&2
  exit 1
}
if [ -x "$directory/bin/python" ]; then
  there=$("$directory/bin/python" -c "$version") wanted=$("$python" -c "$version")
  [ "$there" = "$wanted" ] || {
    echo "$directory has Python $there, '$python' is Python $wanted: name another folder, or set PYTHON=$directory/bin/python to keep that one" >&2
    exit 1
  }
fi
# An environment whose creation was interrupted has no pip.
"$directory/bin/python" -m pip --version > /dev/null 2>&1 || "$python" -m venv "$directory"
"$directory/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root$extras"
