#!/usr/bin/env bash
# Usage: note-tmux.sh [-L SOCKET] [-C REPO] TEXT
# Shows TEXT at the right of the status line of every session of the farm's tmux server, and of no other server: it is
# an option there, so that drawing it costs no process. Prints nothing.
# Exit: 0 ok, 1 tmux failed, 2 usage, 3 no server runs, 6 no tmux
set -euo pipefail

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }

find_socket() { # REPO -> the tmux socket's name of the farm of this repo
  local found name
  found=$(git -C "$1" rev-parse --git-common-dir 2>&1) || fail 2 "${found#fatal: }" 'note-tmux.sh -C REPO, or -L SOCKET'
  case $found in /*) ;; *) found=$1/$found ;; esac
  found=$(CDPATH='' cd -P -- "$found" && pwd -P)
  found=${found%/.git} name=${found##*/} name=${name//[^A-Za-z0-9_-]/-}
  found=$(printf %s "$found" | git hash-object --stdin)
  printf 'farm-%s-%s' "${name:0:30}" "${found:0:4}"
}

main() {
  local socket='' repo=. option said
  while getopts L:C:h option; do
    case $option in
      L) socket=$OPTARG ;; C) repo=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ $# -ne 1 ]; then fail 2 'which text?' 'note-tmux.sh "3 at work"'; fi
  command -v tmux >/dev/null || fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  if [ -z "$socket" ]; then socket=$(find_socket "$repo") || exit; fi
  # shellcheck disable=SC2016  # tmux expands the format: the option's text is shown as it is
  if ! said=$(tmux -u -L "$socket" set-option -g @farm_note "${1//\#/}" \; set-option -g status-right-length 120 \; \
    set-option -g status-right ' #{@farm_note} ' 2>&1); then
    case $said in *'no server running'* | *'No such file'* | *'onnection refused'* | *'server exited'*) exit 3 ;; esac
    fail 1 "tmux: $said"
  fi
}

main "$@"
