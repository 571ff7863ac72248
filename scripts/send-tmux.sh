#!/usr/bin/env bash
# Usage: send-tmux.sh [-L SOCKET] [-C REPO] [-n] NAME <text
# Pastes the text of stdin (any length, many lines; newlines at its end are dropped) into the
# session's program as one bracketed paste, presses Enter (-n: does not), and looks at the screen
# whether it was taken; if it was not, Enter is pressed again, three times in all.
# Exit: 0 taken, 1 tmux failed, 2 usage, 3 no such session or its program has ended, 4 not taken,
#   6 no tmux
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
      fail 2 "${common#fatal: }" 'send-tmux.sh -C REPO, or -L SOCKET'
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

find_pane() { # NAME -> sets pane; 1 when there is none, or a dead one
  local dead in_mode path panes
  panes=$(run_tmux list-panes -s -t "=$1:" -F \
    '#{pane_id} #{pane_dead} #{pane_in_mode} #{@farm_path}' 2>/dev/null) || return 1
  while IFS=' ' read -r pane dead in_mode path; do
    if [ -n "$path" ]; then break; fi
  done <<<"$panes"
  if [ "$dead" != 0 ]; then return 1; fi
  # Somebody has scrolled: Enter would go astray.
  if [ "$in_mode" != 0 ]; then run_tmux send-keys -t "$pane" -X cancel; fi
}

# Prints the cursor's row, then the screen.
look() { run_tmux display-message -p -t "$pane" '#{cursor_y}' \; capture-pane -p -t "$pane"; }

# What to look for: the text's end, or the last new row when that is not shown.
find_mark() { # TEXT BEFORE AFTER
  local tail=${1##*$'\n'} row mark=''
  tail=${tail%"${tail##*[![:space:]]}"}
  if [ "${#tail}" -gt 12 ]; then tail=${tail:$((${#tail} - 12))}; fi
  if [ -n "$tail" ] && [ "${3/"$tail"/}" != "$3" ]; then printf '%s' "$tail"; return; fi
  while IFS= read -r row; do
    [[ $row == *[![:space:]]* ]] || continue
    case $'\n'$2$'\n' in *$'\n'"$row"$'\n'*) ;; *) mark=$row ;; esac
  done <<<"${3#*$'\n'}"
  printf '%s' "$mark"
}

# Prints the cursor's row, the last row with the mark, and how many rows are below that.
describe_input() { # MARK SCREEN
  local cursor=${2%%$'\n'*} row at=-1 number=0 marked='' below=0
  while IFS= read -r row; do
    if [ "$number" -eq "$cursor" ]; then at=$row; fi
    number=$((number + 1))
    case $row in
      *"$1"*) marked=$row below=0; continue ;;
      *[![:space:]]*) below=$((below + 1)) ;;
    esac
  done <<<"${2#*$'\n'}"
  printf '%s|%s|%s' "$at" "$marked" "$below"
}

# Sets screen, once it has changed and come to rest; 1 when it does not change in 3 s.
wait_for_paste() { # BEFORE
  local turn previous=''
  for ((turn = 0; turn < 60; turn++)); do
    screen=$(look)
    if [ "$screen" != "$1" ] && [ "$screen" = "$previous" ]; then return; fi
    previous=$screen
    sleep 0.05
  done
  [ "$screen" != "$1" ]
}

press_enter() { # MARK: until the input is another one than before
  local turn try input
  for try in 1 2 3; do
    input=$(describe_input "$1" "$(look)")
    run_tmux send-keys -t "$pane" Enter
    for ((turn = 0; turn < 40; turn++)); do
      if [ "$(describe_input "$1" "$(look)")" != "$input" ]; then return; fi
      sleep 0.05
    done
    say "Enter number $try was not taken"
  done
  return 1
}

main() {
  local server=() socket='' repo=. enter=yes option text pane='' before screen=''
  local buffer=farm-send-$$
  while getopts L:C:nh option; do
    case $option in
      L) socket=$OPTARG ;; C) repo=$OPTARG ;; n) enter='' ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ $# -ne 1 ]; then fail 2 'which session?' "send-tmux.sh NAME <text"; fi
  command -v tmux >/dev/null ||
    fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  text=$(cat)
  if [ -z "$text" ]; then fail 2 'no text on stdin' "printf 'go on' | send-tmux.sh $1"; fi
  find_server "$repo" "$socket"
  find_pane "$1" || fail 3 "no program runs in a session $1" probe-tmux.sh
  before=$(look)
  printf %s "$text" | run_tmux load-buffer -b "$buffer" -
  run_tmux paste-buffer -p -r -d -b "$buffer" -t "$pane"
  wait_for_paste "$before" ||
    fail 4 "$1 shows nothing of the text; it may still read it later" "attach-tmux.sh $1"
  if [ -z "$enter" ]; then return; fi
  press_enter "$(find_mark "$text" "$before" "$screen")" ||
    fail 4 "$1 did not take the text" "attach-tmux.sh $1"
}

main "$@"
