#!/usr/bin/env bash
# Usage: land.sh -b TARGET -o OLD -n NEW [-C REPO] [-r REMOTE]
#        land.sh recover -b TARGET -o OLD -n NEW [-C REPO]      see recover-landing.sh
# Move branch TARGET from OLD to its descendant NEW, if it still is at OLD: by update-ref where nobody has it checked out,
# else by a fast-forward in that checkout, which keeps unrelated edits; with REMOTE it is pushed there with a lease first.
# Prints one line: landed<TAB>NEW   already<TAB>sha (it contains NEW)   moved<TAB>sha (it is not at OLD)
#   blocked<TAB>path... (nothing changed: these edited or untracked files are in the way, or a checkout in which a merge,
#   rebase or bisect is under way, or a second checkout)
# Environment: FARM_LOCK_SECONDS, how long to wait for another git's locks (10)
# Beside it: find-checkout.sh, recover-landing.sh; for a remote push-branch.sh
# Exit: 0 landed or already, 1 git failed or another git holds a lock, 2 usage or no repo, 3 no such branch or commit,
#   4 moved, 5 blocked
set -euo pipefail
here=$(dirname "$0") mark=

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
die() { printf 'farm: %s\n  try: %s\n' "$1" "$2" >&2; exit "${3:-1}"; }

# git in folder $1, without hooks, and with nothing of the user's settings that could make a landing do more.
git_in() {
  git -C "$1" -c gc.auto=0 -c maintenance.auto=false -c core.hooksPath=/dev/null -c submodule.recurse=false \
    -c core.filesRefLockTimeout="${FARM_LOCK_SECONDS:-10}000" -c core.packedRefsTimeout=30000 \
    -c merge.autoStash=false -c merge.verifySignatures=false "${@:2}"
}

# Prints a record, whose paths are to be escaped, and ends.
answer() {
  local code=$1 record=$2 text slash="\\\\" tab='\t' return='\r'
  for text in "${@:3}"; do
    text=${text//\\/"$slash"} text=${text//$'\t'/"$tab"} record=$record$'\t'${text//$'\r'/"$return"}
  done
  printf '%s\n' "$record"
  exit "$code"
}

blocked() {
  printf 'farm: %s cannot move: %s\n  try: git -C %q status\n' "$target" "$1" "$2" >&2
  answer 5 blocked "${@:3}"
}

# Ends unless the branch is at OLD, and so can move to NEW.
compare() {
  local now
  now=$(git_in "$repo" rev-parse -q --verify "$ref^{commit}") || die "there is no branch $target" "git branch" 3
  if git_in "$repo" merge-base --is-ancestor "$new" "$now"; then answer 0 already "$now"; fi
  [ "$now" = "$old" ] || answer 4 moved "$now"
}

# Sets place to the branch's checkout, if there is one, and home to what git keeps about it.
find_place() {
  local kind path
  while IFS=$'\t' read -r kind path; do
    printf -v path '%b' "$path"
    if [ "$kind" != checkout ] || [ -n "$place" ]; then blocked "a $kind of it is in $path" "$path" "$path"; fi
    place=$path
  done < <("$here/find-checkout.sh" -C "$repo" "$target")
  home=$(git_in "${place:-$repo}" rev-parse --absolute-git-dir)
}

# Sets state: clean when the fast-forward would go through. A copy of the index is asked, so that nothing changes.
rehearse() {
  local copy=$home/farm-landing.index
  cp "$home/index" "$copy"
  GIT_INDEX_FILE=$copy git_in "$place" update-index -q --refresh >/dev/null 2>&1 || true
  said=$(GIT_INDEX_FILE=$copy git_in "$place" read-tree -n -m -u "$old" "$new" 2>&1) && state=clean
  rm -f "$copy" "$copy.lock"
  [ "$state" = dirty ] && [ -n "$remote" ] || return 0
  case $said in *\'*\'*) said=${said#*\'} said=$'\t'${said%\'*} ;; esac
  explain "$said"
}

push_first() {
  local code=0
  said=$("$here/push-branch.sh" -C "$repo" -b "$target" -o "$old" -n "$new" -r "$remote") || code=$?
  [ "$code" -eq 0 ] || { printf '%s' "${said:+$said$'\n'}"; exit "$code"; }
}

# Another git's locks are waited for, never removed; all that recover-landing.sh may remove is newer than the mark.
wait_for_locks() {
  local lock tries=$((${FARM_LOCK_SECONDS:-10} * 10))
  mark=$common/farm-landing
  trap 'rm -f "$mark"' EXIT
  printf '%s\n%s\n' "${place:+$home}" "$state" >"$mark"
  for lock in ${place:+"$home/index.lock" "$home/HEAD.lock"} "$common/$ref.lock"; do
    while [ -e "$lock" ]; do
      [ "$tries" -gt 0 ] || die "another git holds $lock" "ls -l $lock"
      tries=$((tries - 1))
      sleep 0.1
    done
  done
}

# Ends with what git said about a fast-forward that it refused or that failed.
explain() {
  local line paths=()
  while IFS= read -r line; do
    case $line in $'\t'*) paths[${#paths[@]}]=${line#?} ;; esac
  done <<<"$1"
  case $1 in *"not concluded your"* | *"unmerged files"*) paths=("$place") ;; esac
  [ "${#paths[@]}" -eq 0 ] || blocked "${paths[0]} is in the way" "$place" "${paths[@]}"
  die "git could not land on $target: ${1%%$'\n'*}" "git -C ${place:-$repo} status"
}

# No Ctrl-C in here. What failed half-way (a full disk, a lock on the branch) is taken back.
move_branch() {
  trap '' INT TERM HUP
  export GIT_EDITOR=true GIT_REFLOG_ACTION="farm: land"
  if [ -z "$place" ]; then
    said=$(git_in "$repo" update-ref -m "farm: land" "$ref" "$new" "$old" 2>&1) && return
  else
    said=$(git_in "$place" merge --ff-only --no-overwrite-ignore --no-stat --quiet "$new" 2>&1) && return
    "$here/recover-landing.sh" -C "$repo" -b "$target" -o "$old" -n "$new" >/dev/null || true
  fi
  compare
  explain "$said"
}

main() {
  local repo=. target='' old='' new='' remote='' option ref common place='' home said state=dirty
  if [ "${1-}" = recover ]; then exec "$here/recover-landing.sh" "${@:2}"; fi
  while getopts ':b:o:n:C:r:h' option; do
    case $option in
      b) target=$OPTARG ;;
      o) old=$OPTARG ;;
      n) new=$OPTARG ;;
      C) repo=$OPTARG ;;
      r) remote=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die "-$OPTARG is unknown or lacks its value" "land.sh -h" 2 ;;
    esac
  done
  case $target:$old:$new in :* | *::* | *:) die "-b, -o and -n are needed" "land.sh -h" 2 ;; esac
  unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_COMMON_DIR GIT_OBJECT_DIRECTORY GIT_NAMESPACE
  export LC_ALL=C ref=refs/heads/$target
  common=$(git -C "$repo" rev-parse --path-format=absolute --git-common-dir 2>/dev/null) || die "$repo is no git repo" "git init" 2
  git_in "$repo" merge-base --is-ancestor "$old" "$new" 2>/dev/null || die "$new is no descendant of $old" "git log $old..$new" 3
  compare
  find_place
  [ -z "$place" ] || rehearse
  [ -z "$remote" ] || push_first
  wait_for_locks
  move_branch
  git_in "$repo" merge-base --is-ancestor "$new" "$ref" || die "HEAD of $place moved away in between" "git -C $place reflog"
  answer 0 landed "$new"
}
main "$@"
