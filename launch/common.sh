# Sourced by the launch scripts: what they need, and what they run or, with a first argument
# --dry-run, which is taken off here, only print.
# shellcheck shell=bash

dry_run=no
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi

# need NAME EXAMPLE: ends the script with one line if the variable is not set.
need() {
  [ -n "${!1:-}" ] && return
  echo "${0##*/}: $1 is not set; for example: export $1=$2" >&2
  exit 2
}

# quoted ARGUMENT...: the arguments as one line that a shell reads as these arguments.
quoted() {
  local line='' argument
  for argument in "$@"; do
    case $argument in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) argument="'${argument//\'/\'\\\'\'}'" ;;
    esac
    line+="${line:+ }$argument"
  done
  printf '%s\n' "$line"
}

# run COMMAND...: runs it; in a dry run prints it instead.
run() {
  if [ "$dry_run" = yes ]; then quoted "$@"; else "$@"; fi
}
