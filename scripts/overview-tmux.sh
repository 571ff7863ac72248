#!/usr/bin/env bash
# Usage: overview-tmux.sh [-L SOCKET] [-C REPO]
# Makes the session `overview` on the farm's tmux server: a tile for each agent's session, as many in a window as this
# terminal has room for (Ctrl-b n: the next window). The tiles only look: the agents' panes stay where they are, keep
# their size, and take no keys from here. It is made anew when other sessions run than it shows, and attach-tmux.sh has
# it end with its last client. Prints its name.
# Exit: 0 ok, 1 tmux failed, 2 usage, 3 no agent's session runs, 6 no tmux
set -euo pipefail

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }
run_tmux() { tmux -u -L "$socket" "$@"; }

find_socket() { # REPO -> the tmux socket's name of the farm of this repo
  local found name
  found=$(git -C "$1" rev-parse --git-common-dir 2>&1) || fail 2 "${found#fatal: }" 'overview-tmux.sh -C REPO, or -L SOCKET'
  case $found in /*) ;; *) found=$1/$found ;; esac
  found=$(CDPATH='' cd -P -- "$found" && pwd -P)
  found=${found%/.git} name=${found##*/} name=${name//[^A-Za-z0-9_-]/-}
  found=$(printf %s "$found" | git hash-object --stdin)
  printf 'farm-%s-%s' "${name:0:30}" "${found:0:4}"
}

# What a tile runs: a client of the agent's session that only reads. ignore-size (tmux 3.2) leaves the size to other clients; where
# there are none it would shrink the agent's window all the same, so that this is first fixed by hand (attach-tmux.sh frees it).
print_tile() { # NAME PATH
  local path=${2//\'/\'\\\'\'}
  printf "unset TMUX; while tmux -u -S '%s' attach-session %s -t '=%s' >/dev/null; do sleep 1; done; " "$path" "$readonly" "$1"
  printf "echo '%s has ended'; exec sleep 3600" "$1"
}

fix_sizes() { # NAME...: each agent's window stays as large as it is
  local name words=()
  for name in "$@"; do words+=(set-option -w -t "=$name:" window-size manual \;); done
  run_tmux "${words[@]}"
}

count_tiles() { # -> how many tiles of 26 x 5 this terminal has room for
  local lines columns
  read -r lines columns <<<"$( (stty size </dev/tty) 2>/dev/null || echo 50 160)"
  columns=$((columns / 27)) lines=$((lines / 6))
  printf '%s' $((columns * lines < 2 ? 2 : columns * lines))
}

make_overview() { # PATH NAME...
  local path=$1 name count=0 window='' room
  shift
  room=$(count_tiles)
  for name in "$@"; do
    if [ "$count" -eq 0 ]; then
      window=$(run_tmux new-session -d -P -F '#{window_id}' -s overview -x 400 -y 200 -n agents "$(print_tile "$name" "$path")")
      run_tmux set-option -t '=overview:' @farm_shows "$*"
    elif [ $((count % room)) -eq 0 ]; then
      window=$(run_tmux new-window -d -P -F '#{window_id}' -t '=overview:' -n agents "$(print_tile "$name" "$path")")
    else
      run_tmux split-window -d -t "$window" "$(print_tile "$name" "$path")" \; select-layout -t "$window" tiled >/dev/null
    fi
    if [ $((count % room)) -eq 0 ]; then run_tmux resize-window -t "$window" -x 400 -y 200; fi
    count=$((count + 1))
  done
  for window in $(run_tmux list-windows -t '=overview:' -F '#{window_id}'); do run_tmux set-option -u -w -t "$window" window-size; done
}

main() {
  local socket='' repo=. option names path version readonly='-f read-only,ignore-size'
  while getopts L:C:h option; do
    case $option in
      L) socket=$OPTARG ;; C) repo=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  command -v tmux >/dev/null || fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  if [ -z "$socket" ]; then socket=$(find_socket "$repo") || exit; fi
  names=$(run_tmux list-panes -a -F '#{?#{@farm_path},#{session_name},}' 2>/dev/null) || names=''
  names=$(grep -v -x -e control -e '' <<<"$names" | sort -u | tr '\n' ' ') || fail 3 'no agent runs' './farm.py up'
  version=$(tmux -V)
  case $version in *\ 3.[01] | *\ 3.[01][!0-9]* | *\ [12].*) readonly=-r ;; esac
  if [ "$(run_tmux show-options -v -t '=overview:' @farm_shows 2>/dev/null)" != "${names% }" ]; then
    path=$(run_tmux display-message -p '#{socket_path}')
    run_tmux kill-session -t =overview 2>/dev/null || true
    # shellcheck disable=SC2086  # names of sessions are plain words
    fix_sizes $names
    # shellcheck disable=SC2086
    make_overview "$path" $names || fail 1 'tmux could not make the overview'
  fi
  echo overview
}

main "$@"
