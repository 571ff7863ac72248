#!/usr/bin/env bash
# Usage: spawn-tmux.sh -c COMMAND [-L SOCKET] [-l LOGDIR] [-e KEY=VALUE]... [-C REPO] <ROWS
#        mk-worktrees.sh -n 10 | spawn-tmux.sh -c COMMAND
# Starts one tmux session for each line of stdin (name<TAB>branch<TAB>path, more columns are
# ignored) on the farm's own tmux server. Its pane runs `bash -c COMMAND` in the worktree with
# FARM_AGENT_NAME, FARM_WORKTREE, FARM_BRANCH and each KEY=VALUE set; it stays when COMMAND ends, so
# that the exit status can be read, and what it prints is appended to LOGDIR/name.log (default:
# logs/ beside the worktree). A session that still runs is left alone.
# Prints one line a session: name<TAB>pane_id<TAB>pid<TAB>started|running|respawned
# Exit: 0 ok, 1 some line could not be started, 2 usage, 6 no tmux
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
      fail 2 "${common#fatal: }" 'spawn-tmux.sh -C REPO, or -L SOCKET'
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
  quoted=${quoted//$'\n'/\\n} quoted=\"${quoted//$'\r'/\\r}\"
}

quote_format() { quote "${1//\#/##}"; } # where tmux would expand #{...}

# What a pane's pipe runs: append to $f until the end; at 16 to 32 MiB rename it to $f.1, that to
# $f.2 ... $f.9. dd takes from the pipe no more than it writes, so that no byte is lost in between.
# Where the folder is gone it takes what comes.
# shellcheck disable=SC2016  # the pipe's own shell expands it
keep_log='export LC_ALL=C; while :; do
  if [ -d "${f%/*}" ]; then said=$(dd bs=16384 count=1024 2>&1 >>"$f")
  else said=$(dd bs=16384 count=1 2>&1 >/dev/null); fi
  case $said in 0+0*) exit ;; *records*) ;; *) sleep 1 ;; esac
  [ -e "$f" ] && [ "$(wc -c <"$f")" -gt 16777216 ] || continue
  i=9; while [ $i -gt 1 ]; do j=$((i - 1)); [ ! -e "$f.$j" ] || mv -f "$f.$j" "$f.$i"; i=$j; done
  mv -f "$f" "$f.1"; done'

quote_pipe() { # FILE -> sets quoted: a tmux word that appends to it, after tmux and then a shell
  local word=${1//\'/\'\\\'\'}
  quote_format "f='${word//%/%%}'; $keep_log"
}

# Where the server listens, for another TMUX_TMPDIR; its pid, for when somebody tidies /tmp.
note_server() { # LIST, which begins with `@ SOCKET<TAB>PID`
  local said=${1%%$'\n'*} known=''
  case $common:$said in ?*:'@ '*) said=${said#@ }$'\t'$common ;; *) return 0 ;; esac
  IFS= read -r known 2>/dev/null <"$common/farm/tmux" || :
  if [ "$known" = "$said" ]; then return; fi
  mkdir -p -- "$common/farm" && printf '%s\n' "$said" >"$common/farm/tmux.$$" &&
    mv -f -- "$common/farm/tmux.$$" "$common/farm/tmux"
}

list_panes() { # COMMAND...: these first
  local form='#{session_name} #{pane_id} #{pane_pid} #{pane_dead} #{@farm_path}'
  tmux -u "${server[@]}" "$@" list-panes -a -F "$form"
}

find_pane() { # LIST NAME -> sets pane, pid, dead of the session's own, not of one split off
  local name path
  while IFS=' ' read -r name pane pid dead path; do
    if [ "$name" = "$2" ] && [ -n "$path" ]; then return; fi
  done <<<"$1"
  return 1
}

# What makes (or, with a dead pane in $pane, revives) this session.
print_commands() { # NAME PATH BRANCH ESCAPED_PATH
  local word target quoted escaped=$4
  quote_format "$2"
  if [ -n "$pane" ]; then target=$pane; printf 'respawn-pane -t %s -c %s' "$pane" "$quoted"
  else target="=$1:"; printf 'new-session -d -s %s -x 200 -y 50 -c %s' "$1" "$quoted"; fi
  for word in env "FARM_AGENT_NAME=$1" "FARM_WORKTREE=$2" "FARM_BRANCH=$3" \
    ${settings[@]+"${settings[@]}"} bash -c "$command"; do
    quote "$word"
    printf ' %s' "$quoted"
  done
  quote "$escaped"
  printf '\nset-option -p -t %s @farm_path %s\n' "$target" "$quoted"
  quote_pipe "${logs:-${2%/*}/logs}/$1.log"
  printf 'pipe-pane -t %s %s\n' "$target" "$quoted"
}

plan() { # reads stdin -> names, states, and the commands on descriptor 8
  local name branch escaped path rest pane pid dead folder
  while IFS=$'\t' read -r name branch escaped rest || [ -n "$name" ]; do
    [[ $name =~ ^[A-Za-z0-9_-]+$ ]] || { say "no session can be called '$name'"; code=1; continue; }
    printf -v path %b "$escaped"
    [ -x "$path/." ] || { say "$name: no such folder: $path" mk-worktrees.sh; code=1; continue; }
    names+=("$name")
    if ! find_pane "$before" "$name"; then pane='' states+=(started)
    elif [ "$dead" = 0 ]; then states+=(running); continue
    else states+=(respawned); fi
    folder=${logs:-${path%/*}/logs}
    [ -d "$folder" ] || mkdir -p -- "$folder" || { code=1; say "$name: no folder for its log"; }
    print_commands "$name" "$path" "$branch" "$escaped" >&8
  done
}

main() {
  local server=() command='' socket='' logs='' repo=. option settings=() names=() states=() before
  local after code=0 i pane pid dead common='' where="@ #{socket_path}"$'\t'"#{pid}"
  while getopts c:L:l:e:C:h option; do
    case $option in
      c) command=$OPTARG ;; L) socket=$OPTARG ;; l) logs=$OPTARG ;; C) repo=$OPTARG ;;
      e) settings+=("$OPTARG"); [[ $OPTARG =~ ^[A-Za-z_].*= ]] || fail 2 "-e wants KEY=VALUE" ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  if [ -z "$command" ]; then fail 2 'no command for the sessions' 'spawn-tmux.sh -c claude'; fi
  command -v tmux >/dev/null ||
    fail 6 'tmux is missing' 'apt-get install tmux | dnf install tmux | brew install tmux'
  find_server "$repo" "$socket"
  ! common=$(git -C "$repo" rev-parse --git-common-dir 2>/dev/null) ||
    common=$(cd -P -- "$repo" && cd -P -- "$common" && pwd -P)
  [ -z "$logs" ] || logs=$(mkdir -p -- "$logs" && cd -P -- "$logs" && pwd -P)
  before=$(list_panes 2>/dev/null) || before=''
  file=$(mktemp "${TMPDIR:-/tmp}/farm-spawn.XXXXXX")
  trap 'rm -f "$file"' EXIT
  printf 'set-option -g remain-on-exit on\nset-option -g history-limit 50000\n' >"$file"
  plan 8>>"$file"
  # From here on the sessions take all cores: one call more would wait for them.
  after=$(list_panes -f /dev/null start-server \; source-file "$file" \; \
    display-message -p "$where" \;) || code=1
  for ((i = 0; i < ${#names[@]}; i++)); do
    find_pane "$after" "${names[i]}" || { say "${names[i]}: no session"; code=1; continue; }
    printf '%s\t%s\t%s\t%s\n' "${names[i]}" "$pane" "$pid" "${states[i]}"
  done
  note_server "$after" && return "$code"
}
main "$@"
