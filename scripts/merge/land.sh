#!/usr/bin/env bash
# Usage: land.sh -b TARGET -o OLD -n NEW [-C REPO] [-r REMOTE]
#        land.sh recover -b TARGET -o OLD -n NEW [-C REPO]      see recover-landing.sh
# Move branch TARGET from OLD to its descendant NEW, if it still is at OLD: by update-ref where
# nobody has it checked out, else by a fast-forward in that checkout, which keeps unrelated edits;
# with REMOTE it is pushed there with a lease first.
# Prints one line:
#   landed<TAB>NEW   already<TAB>sha (it contains NEW)   moved<TAB>sha (it is not at OLD)
#   blocked<TAB>path... (nothing changed: these edited or untracked files are in the way, or a
#     checkout in which a merge, rebase or bisect is under way, or a second checkout; no path:
#     another git holds a lock)
# Environment: FARM_LOCK_SECONDS, how long to wait for another git's locks (10); FARM_ISOLATE: where
# agents are sandboxed, what they could have written of the objects is verified and packed first
# Beside it: find-checkout.sh, fast-forward.sh, recover-landing.sh; for a remote push-branch.sh; for
#   sandboxes ../sandbox/
# Exit: 0 landed or already, 1 git failed, 2 usage or no repo, 3 no such branch or commit,
#   4 moved, 5 blocked
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
mark=

git_here() {
  quiet_git "$repo" -c core.filesRefLockTimeout="${FARM_LOCK_SECONDS:-10}000" \
    -c core.packedRefsTimeout=30000 "$@"
}

# Prints the record of the fields given, and ends.
answer() {
  local code=$1 record
  shift
  printf -v record '%s\t' "$@"
  printf '%s\n' "${record%?}"
  exit "$code"
}

# Ends unless the branch is at OLD, and so can move to NEW.
compare() {
  local now
  now=$(git_here rev-parse -q --verify "$ref^{commit}") ||
    die 3 "there is no branch $target" "git branch"
  if git_here merge-base --is-ancestor "$new" "$now"; then answer 0 already "$now"; fi
  [ "$now" = "$old" ] || answer 4 moved "$now"
}

# Sets place to the branch's checkout, if there is one. A rebase or bisect of it is in the way, and
# so is a second checkout.
find_place() {
  local kind path raw code=0 found
  found=$("$here/find-checkout.sh" -C "$repo" "$target") || code=$?
  case $code in
    0 | 3) ;;
    *)
      die 1 "it cannot be told where $target is checked out, so it was not moved" \
        "find-checkout.sh $target" ;;
  esac
  while IFS=$'\t' read -r kind path; do
    if [ -z "$kind" ]; then continue; fi
    printf -v raw '%b' "$path"
    if [ "$kind" != checkout ] || [ -n "$place" ]; then
      printf 'farm: %s cannot move: a %s of it is in %s\n  try: git -C %q status\n' "$target" \
        "$kind" "$raw" "$raw" >&2
      answer 5 blocked "$path"
    fi
    place=$raw
  done <<<"$found"
}

# Runs a script that prints a record of its own when it fails; a branch that moved meanwhile says
# more.
run_step() {
  local code=0 said
  said=$("$@") || code=$?
  [ "$code" -ne 0 ] || return 0
  compare
  [ -z "$said" ] || printf '%s\n' "$said"
  exit "$code"
}

update_ref() {
  local said lock others=
  mark=$(git_here rev-parse --path-format=absolute --git-common-dir)/farm-landing
  lock=${mark%/*}/$ref.lock
  trap 'rm -f "$mark"' EXIT
  [ ! -e "$lock" ] || others=yes
  printf '\ndirty\n' >"$mark"
  said=$(git_here update-ref -m "farm: land" "$ref" "$new" "$old" 2>&1) && return
  if [ -n "$others" ] && [ -e "$lock" ]; then # git has waited for it, and nothing has begun
    printf 'blocked\n'
    die 5 "another git holds $lock" \
      "ls -l $(printf %q "$lock"), and remove it when no git is running"
  fi
  trap - EXIT # as in fast-forward.sh, the mark goes when the lock of a killed git is gone
  "$here/recover-landing.sh" -C "$repo" -b "$target" -o "$old" -n "$new" >/dev/null || exit 1
  compare
  die 1 "git could not move $target: ${said%%$'\n'*}" "git -C $repo update-ref $ref $new $old"
}

main() {
  local repo=. target='' old='' new='' remote='' option ref place=''
  if [ "${1-}" = recover ]; then exec "$here/recover-landing.sh" "${@:2}"; fi
  while getopts ':b:o:n:C:r:h' option; do
    case $option in
      b) target=$OPTARG ;;
      o) old=$OPTARG ;;
      n) new=$OPTARG ;;
      C) repo=$OPTARG ;;
      r) remote=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "land.sh -h" ;;
    esac
  done
  case $target:$old:$new in :* | *::* | *:) die 2 "-b, -o and -n are needed" "land.sh -h" ;; esac
  export LC_ALL=C ref=refs/heads/$target
  git_here rev-parse --git-dir >/dev/null 2>&1 || die 2 "$repo is no git repo" "git init"
  git_here merge-base --is-ancestor "$old" "$new" 2>/dev/null ||
    die 3 "$new is no descendant of $old" "git log $old..$new"
  compare
  case ${FARM_ISOLATE:-none} in
    none) ;;
    *) bash "$here/../sandbox/verify-objects.sh" -C "$repo" -b "$target" "$new" ||
      die 1 "$target was not moved" "git -C $repo fsck $new" ;;
  esac
  find_place
  if [ -n "$remote" ]; then
    [ -z "$place" ] || run_step "$here/fast-forward.sh" -n "$place" "$old" "$new"
    run_step "$here/push-branch.sh" -C "$repo" -b "$target" -o "$old" -n "$new" -r "$remote"
  fi
  if [ -n "$place" ]; then
    run_step "$here/fast-forward.sh" "$place" "$old" "$new"
  else
    update_ref
  fi
  git_here merge-base --is-ancestor "$new" "$ref" ||
    die 1 "HEAD of $place moved away in between" "git -C $place reflog"
  answer 0 landed "$new"
}
main "$@"
