#!/usr/bin/env bash
# Usage: probe-tmux.sh [-L SOCKET] [-C REPO]
# Prints one line for each session of the farm's tmux server, the panes that a person added left out:
#   name<TAB>pane_id<TAB>pid<TAB>dead (0|1)<TAB>exit_status<TAB>signal<TAB>last_output (epoch)<TAB>path
# `-` stands where there is no exit status or no signal; backslash, tab, newline and CR in a path are escaped.
# Exit: 0 ok, 1 tmux failed, 2 usage, 3 no server runs, 6 no tmux
set -euo pipefail

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }

find_socket() { # REPO -> the tmux socket's name of the farm of this repo
  local found name
  found=$(git -C "$1" rev-parse --git-common-dir 2>&1) || fail 2 "${found#fatal: }" 'probe-tmux.sh -C REPO, or -L SOCKET'
  case $found in /*) ;; *) found=$1/$found ;; esac
  found=$(CDPATH='' cd -P -- "$found" && pwd -P)
  found=${found%/.git} name=${found##*/} name=${name//[^A-Za-z0-9_-]/-}
  found=$(printf %s "$found" | git hash-object --stdin)
  printf 'farm-%s-%s' "${name:0:30}" "${found:0:4}"
}

main() {
  local socket='' repo=. option format output name pane pid dead status signal activity path
  while getopts L:C:h option; do
    case $option in
      L) socket=$OPTARG ;; C) repo=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  command -v tmux >/dev/null || fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  if [ -z "$socket" ]; then socket=$(find_socket "$repo") || exit; fi
  format='#{session_name} #{pane_id} #{pane_pid} #{pane_dead} #{?#{==:#{pane_dead_status},},-,#{pane_dead_status}}'
  format="$format #{?#{==:#{pane_dead_signal},},-,#{pane_dead_signal}} #{window_activity} #{@farm_path}"
  if ! output=$(tmux -u -L "$socket" list-panes -a -F "$format" 2>&1); then
    case $output in *'no server running'* | *'No such file'* | *'onnection refused'* | *'server exited'*) exit 3 ;; esac
    fail 1 "tmux: $output"
  fi
  while IFS=' ' read -r name pane pid dead status signal activity path; do
    if [ -z "$path" ]; then continue; fi
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$name" "$pane" "$pid" "$dead" "$status" "$signal" "$activity" "$path"
  done <<<"$output"
}

main "$@"
