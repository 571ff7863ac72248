#!/usr/bin/env bash
# Usage: run-gate.sh PIDFILE COMMAND
# Become COMMAND, run by bash in the current folder without a standard input, after saying who it is: PIDFILE
# appears by one rename and holds pid<TAB>start, where start is field 22 of /proc/PID/stat, or elsewhere `ps -o lstart=`.
# Exit: COMMAND's own, 1 PIDFILE cannot be written, 2 usage
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
die() { printf 'farm: %s\n  try: %s\n' "$1" "$2" >&2; exit "${3:-1}"; }

# The process's name, which may hold blanks and brackets, ends at the last `)`; field 22 is the 20th word after it.
start_identity() {
  local stat
  if [ -r "/proc/$$/stat" ]; then
    read -r stat <"/proc/$$/stat"
    # shellcheck disable=SC2086 # the numbers are to be split
    set -- ${stat##*) }
    printf '%s' "${20}"
  else
    LC_ALL=C ps -o lstart= -p "$$"
  fi
}

main() {
  local pidfile command start
  case ${1-} in -h) usage; exit 0 ;; esac
  [ $# -eq 2 ] || die "a pid file and a command are needed" "run-gate.sh -h" 2
  pidfile=$1 command=$2
  start=$(start_identity)
  { printf '%s\t%s\n' "$$" "$start" >"$pidfile.$$" && mv -f "$pidfile.$$" "$pidfile"; } ||
    die "cannot write $pidfile" "ls -ld \"\$(dirname $pidfile)\""
  exec bash -c -- "$command" </dev/null
}
main "$@"
