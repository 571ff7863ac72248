#!/usr/bin/env bash
# Usage: remove-stale-lock.sh MARK LOCK [CONTENT]
# Remove the lock file LOCK of a git that is dead: one that holds CONTENT, which nobody else writes;
# or one that is newer than the file MARK in the repo's git dir, when every git that lives now and
# could hold it has ended (one that starts later met the lock and does not hold it) and no process
# has it open. Any other lock stays.
# Environment: FARM_LOCK_SECONDS, how long to wait for those to end (10)
# Exit: 0 no lock is there any more, 1 it may be somebody's, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

# A git at work in this repo or told of it by name, but for those that only read. What cannot be
# known counts.
may_hold() {
  local words folder=/proc/$1
  [ -d /proc/self ] || return 0
  words=$(tr '\0' ' ' 2>/dev/null <"$folder/cmdline") || return 1
  case $words in
    *" fsmonitor--daemon "* | *" cat-file "* | *"credential-"*) return 1 ;;
    *--git-dir*) return 0 ;;
  esac
  if tr '\0' '\n' 2>/dev/null <"$folder/environ" | grep '^GIT_DIR=' >/dev/null; then return 0; fi
  words=$(readlink "$folder/cwd") || return 0
  [ "$(git -C "$words" rev-parse --path-format=absolute --git-common-dir 2>/dev/null)" = "$common" ]
}

# The pids of git and its helpers, without zombies.
list_gits() {
  local folder stat
  if [ ! -d /proc/self ]; then
    ps -A -o pid= -o stat= -o comm= | awk '$2 !~ /^Z/ && $3 ~ /(^|\/)git/ { print $1 }'
    return
  fi
  for folder in /proc/[0-9]*; do
    { IFS= read -r stat <"$folder/stat"; } 2>/dev/null || continue
    case $stat in *"(git"*") Z"*) ;; *"(git"*) printf '%s\n' "${folder#/proc/}" ;; esac
  done
}

outlive_gits() {
  local pid tries=$((${FARM_LOCK_SECONDS:-10} * 10))
  for pid in $(list_gits); do
    may_hold "$pid" || continue
    while [ -e "$1" ] && list_gits | grep -x "$pid" >/dev/null; do
      [ "$tries" -gt 0 ] || return 1
      tries=$((tries - 1))
      sleep 0.1
    done
  done
}

# Without a way to know, yes.
is_open() {
  if [ -d /proc/self ]; then
    { ls -l /proc/[0-9]*/fd 2>/dev/null || true; } | grep -F -e "-> $1" >/dev/null
  else
    ! command -v lsof >/dev/null || lsof -- "$1" >/dev/null 2>&1
  fi
}

is_stale() {
  [ -z "$3" ] || [ "$(cat "$2")" != "$3" ] || return 0
  [ -e "$1" ] && [ ! "$2" -ot "$1" ] && outlive_gits "$2" && ! is_open "$2"
}

main() {
  local common
  case ${1-} in -h) usage; exit 0 ;; esac
  [ $# -ge 2 ] || die 2 "a mark and a lock are needed" "remove-stale-lock.sh -h"
  [ -e "$2" ] || return 0
  common=$(dirname "$1")
  is_stale "$1" "$2" "${3-}" || [ ! -e "$2" ] ||
    die 1 "$2 may be another git's lock" \
      "ls -l $(printf %q "$2"), and remove it when no git is running"
  rm -f "$2"
}
main "$@"
