#!/usr/bin/env bash
# Usage: send-tmux.sh [-L SOCKET] [-C REPO] [-n] NAME <text
# Pastes the text of stdin (any length, many lines; newlines at its end are dropped) into the session's program as
# one bracketed paste, presses Enter (-n: does not), and looks at the screen whether it was taken; if it was not,
# Enter is pressed again, three times in all.
# Exit: 0 taken, 1 tmux failed, 2 usage, 3 no such session or its program has ended, 4 not taken, 6 no tmux
set -euo pipefail

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }
run_tmux() { tmux -u -L "$socket" "$@"; }

find_socket() { # REPO -> the tmux socket's name of the farm of this repo
  local found name
  found=$(git -C "$1" rev-parse --git-common-dir 2>&1) || fail 2 "${found#fatal: }" 'send-tmux.sh -C REPO, or -L SOCKET'
  case $found in /*) ;; *) found=$1/$found ;; esac
  found=$(CDPATH='' cd -P -- "$found" && pwd -P)
  found=${found%/.git} name=${found##*/} name=${name//[^A-Za-z0-9_-]/-}
  found=$(printf %s "$found" | git hash-object --stdin)
  printf 'farm-%s-%s' "${name:0:30}" "${found:0:4}"
}

find_pane() { # NAME -> sets pane; 1 when there is none, or a dead one
  local dead in_mode path panes
  panes=$(run_tmux list-panes -s -t "=$1:" -F '#{pane_id} #{pane_dead} #{pane_in_mode} #{@farm_path}' 2>/dev/null) || return 1
  while IFS=' ' read -r pane dead in_mode path; do if [ -n "$path" ]; then break; fi; done <<<"$panes"
  if [ "$dead" != 0 ]; then return 1; fi
  if [ "$in_mode" != 0 ]; then run_tmux send-keys -t "$pane" -X cancel; fi # somebody scrolled: Enter would go astray
}

look() { run_tmux display-message -p -t "$pane" '#{cursor_y}' \; capture-pane -p -t "$pane"; } # -> cursor's row, screen

find_mark() { # TEXT BEFORE AFTER -> what to look for: the text's end, or the last new row when that is not shown
  local tail=${1##*$'\n'} row mark=''
  tail=${tail%"${tail##*[![:space:]]}"}
  if [ "${#tail}" -gt 12 ]; then tail=${tail:$((${#tail} - 12))}; fi
  if [ -n "$tail" ] && [ "${3/"$tail"/}" != "$3" ]; then printf '%s' "$tail"; return; fi
  while IFS= read -r row; do
    case $row in *[![:space:]]*) case $'\n'$2$'\n' in *$'\n'"$row"$'\n'*) ;; *) mark=$row ;; esac ;; esac
  done <<<"${3#*$'\n'}"
  printf '%s' "$mark"
}

describe_input() { # MARK SCREEN -> the cursor's row, the last row with the mark, and how many rows are below that
  local cursor=${2%%$'\n'*} row at=-1 number=0 marked='' below=0
  while IFS= read -r row; do
    if [ "$number" -eq "$cursor" ]; then at=$row; fi
    number=$((number + 1))
    case $row in *"$1"*) marked=$row below=0; continue ;; *[![:space:]]*) below=$((below + 1)) ;; esac
  done <<<"${2#*$'\n'}"
  printf '%s|%s|%s' "$at" "$marked" "$below"
}

wait_for_paste() { # BEFORE -> sets screen, once it has changed and come to rest; 1 when it does not change in 3 s
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
  local socket='' repo=. enter=yes option text pane='' before screen='' buffer=farm-send-$$
  while getopts L:C:nh option; do
    case $option in
      L) socket=$OPTARG ;; C) repo=$OPTARG ;; n) enter='' ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ $# -ne 1 ]; then fail 2 'which session?' "send-tmux.sh NAME <text"; fi
  command -v tmux >/dev/null || fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  text=$(cat)
  if [ -z "$text" ]; then fail 2 'no text on stdin' "printf 'go on' | send-tmux.sh $1"; fi
  if [ -z "$socket" ]; then socket=$(find_socket "$repo") || exit; fi
  find_pane "$1" || fail 3 "no program runs in a session $1" probe-tmux.sh
  before=$(look)
  printf %s "$text" | run_tmux load-buffer -b "$buffer" -
  run_tmux paste-buffer -p -r -d -b "$buffer" -t "$pane"
  wait_for_paste "$before" || fail 4 "$1 shows nothing of the text; it may still read it later" "attach-tmux.sh $1"
  if [ -z "$enter" ]; then return; fi
  press_enter "$(find_mark "$text" "$before" "$screen")" || fail 4 "$1 did not take the text" "attach-tmux.sh $1"
}

main "$@"
