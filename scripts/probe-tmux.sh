#!/usr/bin/env bash
# Usage: probe-tmux.sh [-L SOCKET] [-C REPO]
# Prints a line for each session of the farm's tmux server, the panes that a person added left out:
#   name, pane_id, pid, dead (0|1), exit_status, signal, last_output (epoch), path, TAB between
# `-` stands where there is no exit status or no signal; backslash, tab, newline and CR in a path
# are escaped.
# Exit: 0 ok, 1 tmux failed, 2 usage, 3 no server runs, 6 no tmux
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done

say() { printf '%s\n' "farm: $1" ${2:+"  try: $2"} >&2; } # WHAT [HINT]
fail() { say "$2" "${3-}"; exit "$1"; } # CODE WHAT [HINT]

# Sets server, how tmux reaches the farm's own: by SOCKET (a name or a path), else as spawn-tmux.sh
# has written down, else by the name that it would give it.
find_server() { # REPO SOCKET
  local socket=$2 name owner='' common=''
  if [ -z "$socket" ]; then
    common=$(git -C "$1" rev-parse --git-common-dir 2>&1) ||
      fail 2 "${common#fatal: }" 'probe-tmux.sh -C REPO, or -L SOCKET'
    common=$(cd -P -- "$1" && cd -P -- "$common" && pwd -P)
    IFS=$'\t' read -r socket _ owner 2>/dev/null <"$common/farm/tmux" || :
    if [ "$owner" != "$common" ] || ! [ -d "${socket%/*}" ]; then
      name=${common%/.git} socket=$(printf %s "$name" | git hash-object --stdin)
      name=${name##*/} name=${name//[^A-Za-z0-9_-]/-}
      socket=farm-${name:0:30}-${socket:0:4}
    fi
  fi
  case $socket in */*) server=(-S "$socket") ;; *) server=(-L "$socket") ;; esac
}

main() {
  local server=() socket='' repo=. option format output name pane pid dead status signal activity
  local path
  while getopts L:C:h option; do
    case $option in
      L) socket=$OPTARG ;; C) repo=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  command -v tmux >/dev/null ||
    fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  find_server "$repo" "$socket"
  format='#{session_name} #{pane_id} #{pane_pid} #{pane_dead}'
  format="$format #{?#{==:#{pane_dead_status},},-,#{pane_dead_status}}"
  format="$format #{?#{==:#{pane_dead_signal},},-,#{pane_dead_signal}}"
  format="$format #{window_activity} #{@farm_path}"
  if ! output=$(tmux -u "${server[@]}" list-panes -a -F "$format" 2>&1); then
    case $output in
      *'no server running'* | *'No such file'* | *'onnection refused'*) exit 3 ;;
      *'server exited'* | *'no current target'*) exit 3 ;;
    esac
    fail 1 "tmux: $output"
  fi
  while IFS=' ' read -r name pane pid dead status signal activity path; do
    if [ -z "$path" ]; then continue; fi
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$name" "$pane" "$pid" "$dead" "$status" "$signal" \
      "$activity" "$path"
  done <<<"$output"
}

main "$@"
