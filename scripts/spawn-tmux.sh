#!/usr/bin/env bash
# Usage: mk-worktrees.sh -n 10 | spawn-tmux.sh -c COMMAND [-L SOCKET] [-l LOGDIR] [-e KEY=VALUE]... [-C REPO]
# Starts one tmux session for each line of stdin (name<TAB>branch<TAB>path, more columns are ignored) on the farm's
# own tmux server. Its pane runs `bash -c COMMAND` in the worktree with FARM_AGENT_NAME, FARM_WORKTREE, FARM_BRANCH
# and each KEY=VALUE set; it stays when COMMAND ends, so that the exit status can be read, and what it prints is
# appended to LOGDIR/name.log (default: logs/ beside the worktree). A session that still runs is left alone.
# Prints one line a session: name<TAB>pane_id<TAB>pid<TAB>started|running|respawned
# Exit: 0 ok, 1 some line could not be started, 2 usage, 6 no tmux
set -euo pipefail
file=''

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }

find_socket() { # REPO -> the tmux socket's name of the farm of this repo
  local found name
  found=$(git -C "$1" rev-parse --git-common-dir 2>&1) || fail 2 "${found#fatal: }" 'spawn-tmux.sh -C REPO, or -L SOCKET'
  case $found in /*) ;; *) found=$1/$found ;; esac
  found=$(CDPATH='' cd -P -- "$found" && pwd -P)
  found=${found%/.git} name=${found##*/} name=${name//[^A-Za-z0-9_-]/-}
  found=$(printf %s "$found" | git hash-object --stdin)
  printf 'farm-%s-%s' "${name:0:30}" "${found:0:4}"
}

quote() { # TEXT -> sets quoted: one word for tmux's parser, whatever the text is
  quoted=${1//\\/\\\\} quoted=${quoted//\"/\\\"} quoted=${quoted//\$/\\\$} quoted=${quoted//$'\n'/\\n}
  quoted=\"${quoted//$'\r'/\\r}\"
}

quote_format() { quote "${1//\#/##}"; } # where tmux would expand #{...}

# What a pane's pipe runs: append to $f until the end; at 16 to 32 MiB rename it to $f.1, that to $f.2 ... $f.9. dd takes
# from the pipe no more than it writes, so that no byte is lost in between.
# shellcheck disable=SC2016  # the pipe's own shell expands it
keep_log='export LC_ALL=C; while :; do case $(dd bs=16384 count=1024 2>&1 >>"$f") in 0+0*) exit ;; esac
  [ "$(wc -c <"$f")" -gt 16777216 ] || continue
  i=9; while [ $i -gt 1 ]; do j=$((i - 1)); [ ! -e "$f.$j" ] || mv -f "$f.$j" "$f.$i"; i=$j; done; mv -f "$f" "$f.1"; done'

quote_pipe() { # FILE -> sets quoted: a tmux word that appends to FILE; tmux expands % and #, then a shell reads it
  local word=${1//\'/\'\\\'\'}
  quote_format "f='${word//%/%%}'; $keep_log"
}

list_panes() { tmux -u -L "$socket" "$@" list-panes -a -F '#{session_name} #{pane_id} #{pane_pid} #{pane_dead} #{@farm_path}'; }

find_pane() { # LIST NAME -> sets pane, pid, dead of the session's own pane (not of one that a person split off)
  local name path
  while IFS=' ' read -r name pane pid dead path; do
    if [ "$name" = "$2" ] && [ -n "$path" ]; then return; fi
  done <<<"$1"
  return 1
}

print_commands() { # NAME PATH BRANCH: what makes (or, with a dead pane in $pane, revives) this session
  local word target quoted escaped=$4
  quote_format "$2"
  if [ -n "$pane" ]; then target=$pane; printf 'respawn-pane -t %s -c %s' "$pane" "$quoted"
  else target="=$1:"; printf 'new-session -d -s %s -x 200 -y 50 -c %s' "$1" "$quoted"; fi
  for word in env "FARM_AGENT_NAME=$1" "FARM_WORKTREE=$2" "FARM_BRANCH=$3" ${settings[@]+"${settings[@]}"} bash -c "$command"; do
    quote "$word"
    printf ' %s' "$quoted"
  done
  quote "$escaped"
  printf '\nset-option -p -t %s @farm_path %s\n' "$target" "$quoted"
  quote_pipe "${logs:-${2%/*}/logs}/$1.log"
  printf 'pipe-pane -t %s %s\n' "$target" "$quoted"
}

plan() { # reads stdin -> names, states, and the commands on descriptor 8
  local name branch escaped path rest pane pid dead
  while IFS=$'\t' read -r name branch escaped rest || [ -n "$name" ]; do
    case $name in '' | *[!A-Za-z0-9_-]*) say "no session can be called '$name'"; code=1; continue ;; esac
    printf -v path %b "$escaped"
    if ! [ -d "$path" ] || ! [ -x "$path" ]; then say "$name: no such folder: $path" mk-worktrees.sh; code=1; continue; fi
    if find_pane "$before" "$name"; then
      names+=("$name")
      if [ "$dead" = 0 ]; then states+=(running); continue; fi
      states+=(respawned)
    else
      pane='' names+=("$name") states+=(started)
    fi
    mkdir -p -- "${logs:-${path%/*}/logs}" || { code=1; say "$name: no folder for its log"; }
    print_commands "$name" "$path" "$branch" "$escaped" >&8
  done
}

main() {
  local command='' socket='' logs='' repo=. option settings=() names=() states=() before after code=0 i pane pid dead
  while getopts c:L:l:e:C:h option; do
    case $option in
      c) command=$OPTARG ;; L) socket=$OPTARG ;; l) logs=$OPTARG ;; C) repo=$OPTARG ;;
      e) settings+=("$OPTARG"); case $OPTARG in [A-Za-z_]*=*) ;; *) fail 2 "-e wants KEY=VALUE, not '$OPTARG'" ;; esac ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  if [ -z "$command" ]; then fail 2 'no command for the sessions' 'spawn-tmux.sh -c claude'; fi
  command -v tmux >/dev/null || fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  if [ -z "$socket" ]; then socket=$(find_socket "$repo") || exit; fi
  if [ -n "$logs" ]; then mkdir -p -- "$logs" && logs=$(CDPATH='' cd -P -- "$logs" && pwd -P); fi
  before=$(list_panes 2>/dev/null) || before=''
  file=$(mktemp "${TMPDIR:-/tmp}/farm-spawn.XXXXXX")
  trap 'rm -f "$file"' EXIT
  printf 'set-option -g remain-on-exit on\nset-option -g history-limit 50000\n' >"$file"
  plan 8>>"$file"
  after=$(list_panes -f /dev/null start-server \; source-file "$file" \;) || code=1
  for ((i = 0; i < ${#names[@]}; i++)); do
    if ! find_pane "$after" "${names[i]}"; then say "${names[i]}: no session"; code=1; continue; fi
    printf '%s\t%s\t%s\t%s\n' "${names[i]}" "$pane" "$pid" "${states[i]}"
  done
  return "$code"
}

main "$@"
