#!/usr/bin/env bash
# Prints the table of launch/README.md: sizes L and H, compiled for every TPU type of
# launch/tpu_types.sh.
#   bash launch/preflight_table.sh [TYPE/SIZE ...]    for example v5litepod-64/L; default: all
# It needs `pip install -e '.[tpu]'` and some minutes of a core for each row. runs/preflight keeps
# finished rows, by settings and committed code, so a second start continues. PYTHON names the
# interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/tpu_types.sh
source launch/tpu_types.sh

python=${PYTHON:-python}
cache=runs/preflight
code=$(git rev-parse HEAD:tokenbridge_jax)
mkdir -p "$cache"
rows=("$@")
[[ $# -gt 0 ]] || mapfile -t rows < <(awk 'NF { print $1 "/" $2 }' <<<"$TPU_TABLE")

done_rows=()
for row in "${rows[@]}"; do
  type=${row%/*} size=${row#*/}
  tpu_settings "$type" "$size"
  key=$(sha256sum <<<"$code $TOPOLOGY $size ${FLAGS[*]}" | cut -c1-12)
  file=$cache/${type}_${size}_$key.json
  if [[ ! -s $file ]]; then
    status=0
    "$python" -m tokenbridge_jax.commands.preflight --config "configs/imagenet256.py:size=$size" \
      --topology "$TOPOLOGY" "${FLAGS[@]}" --nosuggest --json >"$file.part" || status=$?
    # 3: does not fit; 4: libtpu crashed. These results are rows too.
    [[ $status =~ ^[034]$ ]] || exit "$status"
    mv "$file.part" "$file"
  fi
  done_rows+=("$file")
done
"$python" -m tokenbridge_jax.preflight.text "${done_rows[@]}"
