#!/usr/bin/env bash
# Usage: stop-tmux.sh [-L SOCKET] [-C REPO] [-a | NAME...]
# Ends the named sessions of the farm's tmux server (-a: all of them and the server), and no other server's.
# Their processes get a hang-up. Prints nothing. Where nothing runs there is nothing to do, and that is fine.
# Exit: 0 none of them is left, 1 tmux failed, 2 usage, 6 no tmux
set -euo pipefail

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }

find_socket() { # REPO -> the tmux socket's name of the farm of this repo
  local found name
  found=$(git -C "$1" rev-parse --git-common-dir 2>&1) || fail 2 "${found#fatal: }" 'stop-tmux.sh -C REPO, or -L SOCKET'
  case $found in /*) ;; *) found=$1/$found ;; esac
  found=$(CDPATH='' cd -P -- "$found" && pwd -P)
  found=${found%/.git} name=${found##*/} name=${name//[^A-Za-z0-9_-]/-}
  found=$(printf %s "$found" | git hash-object --stdin)
  printf 'farm-%s-%s' "${name:0:30}" "${found:0:4}"
}

stop_server() { # and wait until it is gone: a server that is still ending refuses the next one its socket
  local turn
  for ((turn = 0; turn < 200; turn++)); do
    if ! tmux -L "$1" kill-server 2>/dev/null; then return; fi
    sleep 0.01
  done
  fail 1 "the tmux server $1 does not end" "tmux -L $1 kill-server"
}

stop_sessions() { # SOCKET NAME...: those that are there
  local socket=$1 live name words=()
  shift
  live=$(tmux -L "$socket" list-sessions -F '#{session_name}' 2>/dev/null) || return 0
  for name in "$@"; do
    case $'\n'$live$'\n' in *$'\n'"$name"$'\n'*) words+=(kill-session -t "=$name" \;) ;; esac
  done
  if [ "${#words[@]}" -gt 0 ]; then tmux -L "$socket" "${words[@]}"; fi
}

main() {
  local socket='' repo=. all='' option
  while getopts L:C:ah option; do
    case $option in
      L) socket=$OPTARG ;; C) repo=$OPTARG ;; a) all=yes ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ -z "$all" ] && [ $# -eq 0 ]; then fail 2 'which session?' 'stop-tmux.sh NAME, or stop-tmux.sh -a for all'; fi
  command -v tmux >/dev/null || fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  if [ -z "$socket" ]; then socket=$(find_socket "$repo") || exit; fi
  if [ -n "$all" ]; then stop_server "$socket"; else stop_sessions "$socket" "$@"; fi
}

main "$@"
