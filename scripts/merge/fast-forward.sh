#!/usr/bin/env bash
# Usage: fast-forward.sh [-n] CHECKOUT OLD NEW
# Move the branch that the work tree CHECKOUT is on from OLD to its descendant NEW, and its files
# along. Unrelated edits, staged or not, are kept; ignored files are not overwritten; no hooks. -n
# only tells whether it would go through.
# Prints, when it is in the way: blocked<TAB>path... (edited or untracked files, or CHECKOUT in the
#   middle of a merge; no path for another git's lock)
# Before git begins `farm-landing` in the git dir names the checkout and says whether it was clean;
# recover-landing.sh needs that, and is called from here (it lies beside) when git fails half-way: a
# full disk, a lock on the branch.
# Environment: FARM_LOCK_SECONDS, how long to wait for another git's locks (10)
# Exit: 0 moved, 1 git failed, 2 usage, 5 blocked, nothing changed
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
mark=

# git in the checkout, with nothing of the user's settings that could make it do more.
git_there() {
  quiet_git "$place" -c core.filesRefLockTimeout="${FARM_LOCK_SECONDS:-10}000" \
    -c merge.autoStash=false -c merge.verifySignatures=false "$@"
}

# Ends with what git said when it refused or failed: the paths are the lines that begin with a tab.
explain() {
  local line record='' slash="\\\\" tab='\t' return='\r'
  while IFS= read -r line; do
    case $line in
      $'\t'*) ;;
      *"not concluded your"* | *"unmerged files"*) line=$'\t'$place ;;
      *) continue ;;
    esac
    line=${line#?} line=${line//\\/"$slash"} line=${line//$'\t'/"$tab"}
    record=$record$'\t'${line//$'\r'/"$return"}
  done <<<"$1"
  [ -n "$record" ] || die 1 "git could not move $place: ${1%%$'\n'*}" "git -C $place status"
  printf 'farm: in the way in %s: %s\n  try: git -C %q status\n' "$place" "${record#?}" "$place" >&2
  printf 'blocked%s\n' "$record"
  exit 5
}

# Sets state: clean when it would go through. A copy of the index is asked, so that nothing changes.
rehearse() {
  local copy=$home/farm-landing.index said
  cp -p "$home/index" "$copy"
  GIT_INDEX_FILE=$copy git_there update-index -q --refresh >/dev/null 2>&1 || true
  said=$(GIT_INDEX_FILE=$copy git_there read-tree -n -m -u "$old" "$new" 2>&1) && state=clean
  rm -f "$copy" "$copy.lock"
  [ -n "$only_rehearse" ] || return 0
  [ "$state" = dirty ] || exit 0
  case $said in *\'*\'*) said=${said#*\'} said=$'\t'${said%\'*} ;; esac
  explain "$said"
}

# Another git's locks are waited for, never removed; all that recover-landing.sh may remove is newer
# than the mark.
wait_for_locks() {
  local lock tries=$((${FARM_LOCK_SECONDS:-10} * 10))
  mark=$common/farm-landing
  trap 'rm -f "$mark"' EXIT
  printf '%s\n%s\n' "$home" "$state" >"$mark"
  for lock in "$home/index.lock" "$home/HEAD.lock" "$common/$(git_there symbolic-ref HEAD).lock"; do
    while [ -e "$lock" ]; do
      if [ "$tries" -eq 0 ]; then
        printf 'blocked\n'
        die 5 "another git holds $lock" \
          "ls -l $(printf %q "$lock"), and remove it when no git is running"
      fi
      tries=$((tries - 1))
      sleep 0.1
    done
  done
}

# No Ctrl-C in here.
fast_forward() {
  local said branch
  trap '' INT TERM HUP
  export GIT_EDITOR=true GIT_REFLOG_ACTION="farm: land"
  said=$(git_there merge --ff-only --no-overwrite-ignore --no-stat --quiet "$new" 2>&1) && return
  # From here on the mark goes when all is mended: without it nobody could tell whose locks are
  # left.
  trap - EXIT
  branch=$(git_there symbolic-ref --short HEAD)
  "$here/recover-landing.sh" -C "$place" -b "$branch" -o "$old" -n "$new" >/dev/null ||
    die 1 "git could not move $place, and it is not mended yet: ${said%%$'\n'*}" \
      "git -C $place status"
  explain "$said"
}

main() {
  local place old new home common only_rehearse='' state=dirty
  case ${1-} in -h) usage; exit 0 ;; -n) only_rehearse=yes && shift ;; esac
  [ $# -eq 3 ] || die 2 "a checkout and two commits are needed" "fast-forward.sh -h"
  place=$1 old=$2 new=$3
  export LC_ALL=C
  common=$(git_there rev-parse --path-format=absolute --git-common-dir)
  home=$(git_there rev-parse --absolute-git-dir)
  rehearse
  wait_for_locks
  fast_forward
}
main "$@"
