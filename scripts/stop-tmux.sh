#!/usr/bin/env bash
# Usage: stop-tmux.sh [-L SOCKET] [-C REPO] [-a | NAME...]
# Ends the named sessions of the farm's tmux server (-a: all of them and the server), and no other
# server's. Their processes get a hang-up. Prints nothing. Where nothing runs there is nothing to
# do, and that is fine.
# Exit: 0 none of them is left, 1 tmux failed, 2 usage, 6 no tmux
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
      fail 2 "${common#fatal: }" 'stop-tmux.sh -C REPO, or -L SOCKET'
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

# and wait until it is gone: a server that is still ending refuses the next one its socket
stop_server() {
  local tries pid
  pid=$(tmux "${server[@]}" display-message -p '#{pid}' 2>/dev/null) || pid=''
  for ((tries = 0; tries < 500; tries++)); do
    if ! tmux "${server[@]}" kill-server 2>/dev/null; then
      # its socket is gone before it is; a dead one that init has not yet buried is gone, too
      case $(ps -o stat= -p "${pid:-0}" 2>/dev/null) in '' | Z*) return 0 ;; esac
      kill "$pid" 2>/dev/null || :
    fi
    sleep 0.01
  done
  fail 1 "the tmux server ${server[1]} does not end" "tmux ${server[*]} kill-server"
}

stop_sessions() { # NAME...: those that are there
  local live name words=()
  live=$(tmux "${server[@]}" list-sessions -F '#{session_name}' 2>/dev/null) || return 0
  for name in "$@"; do
    case $'\n'$live$'\n' in *$'\n'"$name"$'\n'*) words+=(kill-session -t "=$name" \;) ;; esac
  done
  if [ "${#words[@]}" -gt 0 ]; then tmux "${server[@]}" "${words[@]}"; fi
}

main() {
  local server=() socket='' repo=. all='' option
  while getopts L:C:ah option; do
    case $option in
      L) socket=$OPTARG ;; C) repo=$OPTARG ;; a) all=yes ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ -z "$all" ] && [ $# -eq 0 ]; then
    fail 2 'which session?' 'stop-tmux.sh NAME, or stop-tmux.sh -a for all'
  fi
  command -v tmux >/dev/null ||
    fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  find_server "$repo" "$socket"
  if [ -n "$all" ]; then stop_server; else stop_sessions "$@"; fi
}

main "$@"
