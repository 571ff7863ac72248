#!/usr/bin/env bash
# Usage: remove-stale-lock.sh MARK LOCK [CONTENT]
# Remove the lock file LOCK of a git that is dead: one that holds CONTENT, which nobody else writes; or one that is newer
# than the file MARK, when every git that lives now and so could hold it has ended (one that starts later met the lock and
# does not hold it) and no process has it open. Any other lock stays.
# Environment: FARM_LOCK_SECONDS, how long to wait for those to end (10)
# Exit: 0 no lock is there any more, 1 it may be somebody's, 2 usage
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }

# The pids of git and its helpers, without zombies.
list_gits() {
  local folder stat
  if [ ! -r "/proc/$$/stat" ]; then
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
    while [ -e "$1" ] && list_gits | grep -qx "$pid"; do
      [ "$tries" -gt 0 ] || return 1
      tries=$((tries - 1))
      sleep 0.1
    done
  done
}

# Without a way to know, yes.
is_open() {
  if [ -r "/proc/$$/stat" ]; then
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
  case ${1-} in -h) usage; exit 0 ;; esac
  [ $# -ge 2 ] || { printf 'farm: a mark and a lock are needed\n  try: remove-stale-lock.sh -h\n' >&2; exit 2; }
  [ -e "$2" ] || return 0
  if is_stale "$1" "$2" "${3-}" || [ ! -e "$2" ]; then
    rm -f "$2"
  else
    printf "farm: %s may be another git's lock\n  try: ls -l %q, and remove it when no git is running\n" "$2" "$2" >&2
    exit 1
  fi
}
main "$@"
