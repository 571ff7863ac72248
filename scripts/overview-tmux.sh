#!/usr/bin/env bash
# Usage: overview-tmux.sh [-L SOCKET] [-C REPO]
# Makes the session `overview` on the farm's tmux server: a tile for each agent's session, as many
# in a window as this terminal has room for (Ctrl-b n: the next window). The tiles only look: the
# agents' panes stay where they are, keep their size, and take no keys from here. It is made anew
# when other sessions run than it shows, and attach-tmux.sh has it end with its last client. Prints
# its name.
# Exit: 0 ok, 1 tmux failed, 2 usage, 3 no agent's session runs, 6 no tmux
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done

say() { printf '%s\n' "farm: $1" ${2:+"  try: $2"} >&2; } # WHAT [HINT]
fail() { say "$2" "${3-}"; exit "$1"; } # CODE WHAT [HINT]
run_tmux() { tmux -u "${server[@]}" "$@"; }

# Sets server, how tmux reaches the farm's own: by SOCKET (a name or a path), else as spawn-tmux.sh
# has written down, else by the name that it would give it.
find_server() { # REPO SOCKET
  local socket=$2 name owner='' common=''
  if [ -z "$socket" ]; then
    common=$(git -C "$1" rev-parse --git-common-dir 2>&1) ||
      fail 2 "${common#fatal: }" 'overview-tmux.sh -C REPO, or -L SOCKET'
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

# What a tile runs: a client of the agent's session that only reads. ignore-size (tmux 3.2) leaves
# the size to other clients; where there are none it would shrink the agent's window all the same,
# so that this is first fixed by hand (attach-tmux.sh frees it).
print_tile() { # NAME PATH
  local path=${2//\'/\'\\\'\'}
  printf "unset TMUX; while tmux -u -S '%s' attach-session %s -t '=%s' >/dev/null" \
    "$path" "$readonly" "$1"
  printf '; do sleep 1; done; '
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
  local path=$1 name count=0 window='' room tile
  shift
  room=$(count_tiles)
  for name in "$@"; do
    tile=$(print_tile "$name" "$path")
    if [ "$count" -eq 0 ]; then
      window=$(run_tmux new-session -d -P -F '#{window_id}' -s overview -x 400 -y 200 -n agents \
        "$tile")
      run_tmux set-option -t '=overview:' @farm_shows "$*"
    elif [ $((count % room)) -eq 0 ]; then
      window=$(run_tmux new-window -d -P -F '#{window_id}' -t '=overview:' -n agents "$tile")
    else
      run_tmux split-window -d -t "$window" "$tile" \; select-layout -t "$window" tiled >/dev/null
    fi
    if [ $((count % room)) -eq 0 ]; then run_tmux resize-window -t "$window" -x 400 -y 200; fi
    count=$((count + 1))
  done
  for window in $(run_tmux list-windows -t '=overview:' -F '#{window_id}'); do
    run_tmux set-option -u -w -t "$window" window-size
  done
}

main() {
  local server=() socket='' repo=. option names path version readonly='-f read-only,ignore-size'
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
  names=$(run_tmux list-panes -a -F '#{?#{@farm_path},#{session_name},}' 2>/dev/null) || names=''
  names=$(grep -v -x -e control -e '' <<<"$names" | sort -u | tr '\n' ' ') ||
    fail 3 'no agent runs' './farm.py up'
  version=$(tmux -V)
  case $version in *\ 3.[01] | *\ 3.[01][!0-9]* | *\ [12].*) readonly=-r ;; esac
  if [ "$(run_tmux show-options -v -t '=overview:' @farm_shows 2>/dev/null)" != "${names% }" ]; then
    path=$(run_tmux display-message -p '#{socket_path}')
    run_tmux kill-session -t =overview 2>/dev/null || true
    # shellcheck disable=SC2086  # names of sessions are plain words
    fix_sizes $names
    # shellcheck disable=SC2086  # as above
    make_overview "$path" $names || fail 1 'tmux could not make the overview'
  fi
  echo overview
}

main "$@"
