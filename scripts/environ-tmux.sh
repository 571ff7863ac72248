#!/usr/bin/env bash
# Usage: environ-tmux.sh [-L SOCKET] [-C REPO] <VARIABLES
# Gives the farm's tmux server other variables: what it starts from now on has them. Reads
# name<TAB>value (backslash, tab, newline and CR escaped), or a name alone, which is taken away.
# Values go by a file that only you can read, never by argument.
# Exit: 0 ok, 1 tmux failed, 2 usage, 3 no server runs, 6 no tmux
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done

file=''

say() { printf '%s\n' "farm: $1" ${2:+"  try: $2"} >&2; } # WHAT [HINT]
fail() { say "$2" "${3-}"; exit "$1"; } # CODE WHAT [HINT]

# Sets server, how tmux reaches the farm's own: by SOCKET (a name or a path), else as spawn-tmux.sh
# has written down, else by the name that it would give it.
find_server() { # REPO SOCKET
  local socket=$2 name owner='' common=''
  if [ -z "$socket" ]; then
    common=$(git -C "$1" rev-parse --git-common-dir 2>&1) ||
      fail 2 "${common#fatal: }" 'environ-tmux.sh -C REPO, or -L SOCKET'
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

quote() { # TEXT -> sets quoted: one word for tmux's parser, whatever the text is
  quoted=${1//\\/\\\\} quoted=${quoted//\"/\\\"} quoted=${quoted//\$/\\\$}
  quoted=${quoted//$'\n'/\\n}
  quoted=\"${quoted//$'\r'/\\r}\"
}

print_commands() {
  local line name value quoted session
  while IFS= read -r line || [ -n "$line" ]; do
    name=${line%%$'\t'*}
    case $name in '' | *[!A-Za-z0-9_]* | [0-9]*) continue ;; esac
    # Tmux has copied some (SSH_AUTH_SOCK, DISPLAY) to each session, where they would stay.
    while IFS= read -r session; do
      if [ -n "$session" ]; then printf 'set-environment -t "=%s" -u %s\n' "$session" "$name"; fi
    done <<<"$sessions"
    if [ "$name" = "$line" ]; then printf 'set-environment -gu %s\n' "$name"; continue; fi
    printf -v value %b "${line#*$'\t'}"
    quote "$value"
    printf 'set-environment -g %s %s\n' "$name" "$quoted"
  done
}

main() {
  local server=() socket='' repo=. option said sessions
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
  trap 'rm -f "$file"' EXIT
  file=$(umask 077 && mktemp "${TMPDIR:-/tmp}/farm-environ.XXXXXX")
  sessions=$(tmux -u "${server[@]}" list-sessions -F '#{session_name}' 2>/dev/null) || exit 3
  print_commands >"$file"
  if ! said=$(tmux -u "${server[@]}" source-file "$file" 2>&1); then
    case $said in
      *'no server running'* | *'No such file'* | *'onnection refused'*) exit 3 ;;
      *'server exited'* | *'no current target'*) exit 3 ;;
    esac
    fail 1 "tmux: $said"
  fi
}

main "$@"
