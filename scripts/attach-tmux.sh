#!/usr/bin/env bash
# Usage: attach-tmux.sh [-L SOCKET] [-C REPO] NAME
# Shows the session NAME of the farm's tmux server in this terminal; leave it with Ctrl-b d. Nothing
# is nested: from a client of that same server it switches over, and from inside another tmux the
# terminal itself goes there, and comes back to where it was when you leave.
# Exit: 0 left again (or on the way there), 1 tmux failed, 2 usage, 3 no such session, 6 no tmux
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
      fail 2 "${common#fatal: }" 'attach-tmux.sh -C REPO, or -L SOCKET'
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

# A terminal that this host has no description of (a new one, over ssh) is taken for a common one.
know_terminal() {
  local known
  if ! command -v tput >/dev/null || tput -T "${TERM:-unknown}" clear >/dev/null 2>&1; then
    return
  fi
  for known in xterm-256color xterm screen vt100; do
    if tput -T "$known" clear >/dev/null 2>&1; then
      say "this host does not know the terminal '${TERM-}', so it is taken for $known" \
        "export TERM=$known"
      export TERM=$known
      return
    fi
  done
  fail 6 "this host does not know the terminal '${TERM-}'" \
    'apt install ncurses-term, or: export TERM=xterm'
}

quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; } # TEXT -> one word for a shell

# From another tmux server: its client becomes one of the farm's, and afterwards one of its old
# session again.
go_over() { # SOCKET_PATH TMUX_COMMAND...
  local path=$1 back there='' word
  shift
  back=$(tmux display-message -p '#{session_id}')
  for word in "$@"; do there="$there $(quote "$word")"; done
  there="tmux -u -S $(quote "$path")$there"
  back="exec tmux -S $(quote "${TMUX%%,*}") attach-session -t '$back'"
  exec tmux detach-client -E "$there; $back"
}

main() {
  local server=() socket='' repo=. option path after
  while getopts L:C:h option; do
    case $option in
      L) socket=$OPTARG ;; C) repo=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ $# -ne 1 ]; then fail 2 'which session?' 'attach-tmux.sh NAME'; fi
  command -v tmux >/dev/null ||
    fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  find_server "$repo" "$socket"
  know_terminal
  case $1 in *[!A-Za-z0-9_-]*) fail 3 "no session $1" "${FARM_STATUS:-probe-tmux.sh}" ;; esac
  if ! tmux "${server[@]}" has-session -t "=$1" 2>/dev/null; then
    fail 3 "no session $1" "${FARM_STATUS:-probe-tmux.sh}"
  fi
  path=$(tmux "${server[@]}" display-message -p '#{socket_path}')
  # The overview ends with its last client; an agent's window, whose size it has fixed, follows this
  # terminal.
  after=(set-option -u -w -t "=$1:" window-size)
  if [ "$1" = overview ]; then after=(set-option -t "=overview:" destroy-unattached on); fi
  if [ -z "${TMUX-}" ]; then
    exec tmux -u "${server[@]}" attach-session -t "=$1" \; "${after[@]}"
  fi
  if [ "${TMUX%%,*}" -ef "$path" ]; then exec tmux switch-client -t "=$1" \; "${after[@]}"; fi
  if [ -n "$(tmux list-clients -F x 2>/dev/null)" ]; then
    go_over "$path" attach-session -t "=$1" ';' "${after[@]}"
  fi
  unset TMUX
  exec tmux -u "${server[@]}" attach-session -t "=$1" \; "${after[@]}"
}

main "$@"
