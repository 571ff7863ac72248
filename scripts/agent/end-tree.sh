#!/usr/bin/env bash
# Usage: end-tree.sh [-k] [-s SECONDS] PID
# Ends a process and all below it: SIGTERM, and SIGKILL to what is left after SECONDS (default 10).
# -k: no SIGTERM for PID itself, a sandbox, which would kill all in it; it ends as they have ended.
# The caller has started PID and not yet waited for it, so that its number cannot be another's by
# now.
# Exit: 0 ended, 1 something is left, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"

# PID... -> these and what is below them, one a line, zombies left out
find_tree() {
  ps -A -o pid= -o ppid= -o stat= | awk -v roots=" $* " '
    { parent[$1] = $2; state[$1] = $3 }
    END {
      for (pid in parent) {
        for (up = pid; up in parent && up > 1 && index(roots, " " up " ") == 0; up = parent[up]) { }
        if (index(roots, " " up " ") && state[pid] !~ /^Z/) { print pid }
      }
    }'
}

send() { kill "-$1" "${@:2}" 2>/dev/null || true; }

main() {
  local seconds=10 option tree turn spared=''
  while getopts ks:h option; do
    case $option in
      s) seconds=$OPTARG ;; k) spared=yes ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  case ${1:-} in
    '' | *[!0-9]* | 0 | 1) die 2 'which process?' 'end-tree.sh PID' ;;
  esac
  tree=$(find_tree "$1")
  if [ -n "$spared" ]; then spared=$1; fi
  # shellcheck disable=SC2046  # one number a word
  [ "$seconds" -eq 0 ] || send TERM $(grep -vxF "${spared:-none}" <<<"$tree")
  for ((turn = 0; turn < seconds * 10; turn++)); do
    # shellcheck disable=SC2086  # as above
    tree=$(find_tree $tree)
    if [ -z "$tree" ]; then return; fi
    sleep 0.1
  done
  # shellcheck disable=SC2086  # as above
  send KILL $tree
  sleep 0.1
  # shellcheck disable=SC2086  # as above
  [ -z "$(find_tree $tree)" ]
}

main "$@"
