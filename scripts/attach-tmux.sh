#!/usr/bin/env bash
# Usage: attach-tmux.sh [-L SOCKET] [-C REPO] NAME
# Shows the session NAME of the farm's tmux server in this terminal; leave it with Ctrl-b d. Nothing is nested: from a
# client of that same server it switches over, and from inside another tmux the terminal itself goes there, and comes
# back to where it was when you leave.
# Exit: 0 left again (or on the way there), 1 tmux failed, 2 usage, 3 no such session, 6 no tmux
set -euo pipefail

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }

find_socket() { # REPO -> the tmux socket's name of the farm of this repo
  local found name
  found=$(git -C "$1" rev-parse --git-common-dir 2>&1) || fail 2 "${found#fatal: }" 'attach-tmux.sh -C REPO, or -L SOCKET'
  case $found in /*) ;; *) found=$1/$found ;; esac
  found=$(CDPATH='' cd -P -- "$found" && pwd -P)
  found=${found%/.git} name=${found##*/} name=${name//[^A-Za-z0-9_-]/-}
  found=$(printf %s "$found" | git hash-object --stdin)
  printf 'farm-%s-%s' "${name:0:30}" "${found:0:4}"
}

quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; } # TEXT -> one word for a shell

# From another tmux server: its client becomes one of the farm's, and that of its old session again afterwards.
go_over() { # SOCKET_PATH TMUX_COMMAND...
  local path=$1 back there='' word
  shift
  back=$(tmux display-message -p '#{session_id}')
  for word in "$@"; do there="$there $(quote "$word")"; done
  exec tmux detach-client -E "tmux -u -S $(quote "$path")$there; exec tmux -S $(quote "${TMUX%%,*}") attach-session -t '$back'"
}

main() {
  local socket='' repo=. option path after
  while getopts L:C:h option; do
    case $option in
      L) socket=$OPTARG ;; C) repo=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ $# -ne 1 ]; then fail 2 'which session?' 'attach-tmux.sh NAME'; fi
  command -v tmux >/dev/null || fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  if [ -z "$socket" ]; then socket=$(find_socket "$repo") || exit; fi
  case $1 in *[!A-Za-z0-9_-]*) fail 3 "no session $1" probe-tmux.sh ;; esac
  if ! tmux -L "$socket" has-session -t "=$1" 2>/dev/null; then fail 3 "no session $1" probe-tmux.sh; fi
  path=$(tmux -L "$socket" display-message -p '#{socket_path}')
  # The overview ends with its last client; an agent's window, whose size it has fixed, follows this terminal.
  after=(set-option -u -w -t "=$1:" window-size)
  if [ "$1" = overview ]; then after=(set-option -t "=overview:" destroy-unattached on); fi
  if [ -z "${TMUX-}" ]; then exec tmux -u -L "$socket" attach-session -t "=$1" \; "${after[@]}"; fi
  if [ "${TMUX%%,*}" -ef "$path" ]; then exec tmux switch-client -t "=$1" \; "${after[@]}"; fi
  if [ -n "$(tmux list-clients -F x 2>/dev/null)" ]; then go_over "$path" attach-session -t "=$1" ';' "${after[@]}"; fi
  unset TMUX
  exec tmux -u -L "$socket" attach-session -t "=$1" \; "${after[@]}"
}

main "$@"
