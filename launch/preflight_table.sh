#!/usr/bin/env bash
# Prints the table of launch/README.md: sizes L and H, compiled for every TPU type of
# launch/tpu_types.sh.
#   bash launch/preflight_table.sh [TYPE/SIZE ...]    for example v5litepod-64/L; default: all
# It needs `pip install -e '.[tpu]'` and some minutes of a core for each row. `auto` picks the
# settings. runs/preflight keeps finished rows, by committed code, so a second start continues.
# PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/tpu_types.sh
source launch/tpu_types.sh

python=${PYTHON:-python}
cache=runs/preflight
code=$(git rev-parse HEAD:tokenbridge_jax)
mkdir -p "$cache"
rows=("$@")
[[ $# -gt 0 ]] || mapfile -t rows < <(for type in $TPU_TYPES; do printf '%s\n' "$type"/{L,H}; done)

done_rows=()
for row in "${rows[@]}"; do
  type=${row%/*} size=${row#*/}
  tpu_type "$type"
  key=$(sha256sum <<<"$code $TOPOLOGY $size" | cut -c1-12)
  file=$cache/${type}_${size}_$key.json
  if [[ ! -s $file ]]; then
    status=0
    "$python" -m tokenbridge_jax.commands.preflight --config "configs/imagenet256.py:size=$size" \
      --topology "$TOPOLOGY" --json >"$file.part" || status=$?
    # 3: does not fit; 4: libtpu crashed. These results are rows too.
    [[ $status =~ ^[034]$ ]] || exit "$status"
    mv "$file.part" "$file"
  fi
  done_rows+=("$file")
done
"$python" -m tokenbridge_jax.preflight.text "${done_rows[@]}"
