# Functions of the launch scripts, which source this file. It removes --dry-run from the arguments;
# `run` then only prints its command.
# shellcheck shell=bash

dry_run=no
for argument in "$@"; do
  shift
  if [ "$argument" = --dry-run ]; then dry_run=yes; else set -- "$@" "$argument"; fi
done

# need NAME EXAMPLE: ends the script with one line if the variable is not set.
need() {
  [ -n "${!1:-}" ] && return
  echo "${0##*/}: $1 is not set; for example: export $1=$2" >&2
  exit 2
}

# need_shared EXAMPLE: ends the script with one line unless all hosts share WORKDIR.
need_shared() {
  need WORKDIR "$1"
  case $WORKDIR in gs://* | /*) return ;; esac
  echo "${0##*/}: WORKDIR=$WORKDIR is another folder on every host; for example: $1, or an" \
    "absolute path that all of them mount" >&2
  exit 2
}

# quoted ARGUMENT...: prints one line that a shell reads as these arguments.
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

# run COMMAND...: runs the command; in a dry run it prints the command instead.
run() {
  if [ "$dry_run" = yes ]; then quoted "$@"; else "$@"; fi
}
