#!/usr/bin/env bash
# Usage: pin-ref.sh [-C REPO] REF COMMIT-ISH
#        pin-ref.sh [-C REPO] -              many: a line "REF SHA" each on stdin; a commit that is gone is passed over
# Create or move REF, which must lie below refs/farm/, so that nothing can lose that commit.
# Prints the commit's sha; nothing for many.
# Exit: 0 ok, 1 git failed, 2 usage or a ref elsewhere, 3 no such commit
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
die() { printf 'farm: %s\n  try: %s\n' "$1" "$2" >&2; exit "${3:-1}"; }

# The lines of stdin whose pins do not stand yet and whose commits are there, as update-ref takes them.
list_missing() {
  local name commit standing
  standing=$'\n'$(git -C "$repo" for-each-ref --format='%(refname) %(objectname)' refs/farm/)$'\n'
  while read -r name commit; do
    case $name:$standing in
      *$'\n'"$name $commit"$'\n'*) ;;
      refs/farm/?*) printf '%s %s\n' "$commit" "$name" ;;
    esac
  done | git -C "$repo" cat-file --batch-check='%(objecttype) %(objectname) %(rest)' |
    sed -n 's/^commit \([0-9a-f]*\) \(.*\)$/update \2 \1/p'
}

pin_many() {
  local missing verb
  missing=$(list_missing)
  [ -n "$missing" ] || return 0
  printf '%s\n' "$missing" | git -C "$repo" -c core.filesRefLockTimeout=10000 -c core.hooksPath=/dev/null update-ref --stdin && return
  # A git that was killed in such a transaction left a lock for each: one by one, each stale one dropped.
  while read -r verb ref sha; do
    write_ref 2>/dev/null || { drop_stale_lock; write_ref || die "git could not write $ref" "git -C $repo $verb-ref $ref $sha"; }
  done <<<"$missing"
}

write_ref() { git -C "$repo" -c core.filesRefLockTimeout=10000 -c core.hooksPath=/dev/null update-ref "$ref" "$sha"; }

# The usual case in one process of git, for the agents' sake: it writes the ref as a file, and that file tells the sha.
pin_fast() {
  [ -d "$repo/.git" ] || return 1
  git -C "$repo" -c core.filesRefLockTimeout=10000 -c core.hooksPath=/dev/null update-ref "$ref" "$1^{commit}" 2>/dev/null || return 1
  { read -r sha <"$repo/.git/$ref"; } 2>/dev/null || return 1
  case $sha in *[!0-9a-f]* | '') return 1 ;; esac
  printf '%s\n' "$sha"
}

# Git has waited ten seconds for the lock. Only the farm writes below refs/farm/, and no git of it takes that long: a lock that no
# process has open was left by a killed one.
drop_stale_lock() {
  local lock
  lock=$(git -C "$repo" rev-parse --git-common-dir)
  case $lock in /*) ;; *) lock=$(cd "$repo" && cd "$lock" && pwd -P) ;; esac
  lock=$lock/$ref.lock
  [ -e "$lock" ] || return 0
  if [ -d /proc/self ]; then
    { ls -l /proc/[0-9]*/fd 2>/dev/null || true; } | grep -F -q -e "-> $lock" && return 0
  else
    lsof -- "$lock" >/dev/null 2>&1 && return 0
  fi
  rm -f "$lock"
}

main() {
  local repo=. option ref sha
  while getopts ':C:h' option; do
    case $option in
      C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die "unknown option -$OPTARG" "pin-ref.sh -h" 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_COMMON_DIR GIT_NAMESPACE
  if [ "$*" = - ]; then pin_many; return; fi
  [ $# -eq 2 ] || die "a ref and a commit are needed" "pin-ref.sh -h" 2
  ref=$1
  case $ref in
    *..*) die "$ref is no name of a ref" "pin-ref.sh refs/farm/ready/TASK COMMIT" 2 ;;
    refs/farm/?*) ;;
    *) die "$ref is not below refs/farm/" "pin-ref.sh refs/farm/ready/TASK COMMIT" 2 ;;
  esac
  if pin_fast "$2"; then return; fi
  sha=$(git -C "$repo" rev-parse --quiet --verify --end-of-options "$2^{commit}") ||
    die "there is no commit $2 in $repo" "git -C $repo log --oneline" 3
  if ! write_ref 2>/dev/null; then
    drop_stale_lock
    write_ref || die "git could not write $ref" "git -C $repo update-ref $ref $sha"
  fi
  printf '%s\n' "$sha"
}
main "$@"
