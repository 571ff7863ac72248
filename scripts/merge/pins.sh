#!/usr/bin/env bash
# Usage: pins.sh set [-C REPO] REF COMMIT-ISH     prints the commit's sha
#        pins.sh many [-C REPO] <LINES            a line "REF SHA" each; a commit that is gone is
#                                                 passed over; prints nothing
#        pins.sh list [-C REPO]                   prints the pins of submitted work, a line each:
#                                                 refs/farm/ready/TASK<TAB>sha
#        pins.sh drop [-C REPO] -b TARGET         prints the refs that it has deleted
#        pins.sh tip [-C REPO] COMMIT-ISH         prints the commit and its tree: sha<TAB>sha
# The farm's pins, which are refs below refs/farm/, so that nothing can lose their commits. set and
# many create or move them. drop deletes those whose commits TARGET has: they keep nothing any more.
# Exit: 0 ok, 1 git failed, 2 usage or a ref elsewhere, 3 no such commit, branch or repo
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

git_here() {
  git -C "$repo" -c core.filesRefLockTimeout=10000 -c core.hooksPath=/dev/null "$@"
}

write_ref() { git_here update-ref "$ref" "$sha"; }

# The lines of stdin whose pins do not stand yet and whose commits are there, as update-ref takes
# them.
list_missing() {
  local name commit standing
  standing=$(git -C "$repo" for-each-ref --format='%(refname) %(objectname)' refs/farm/)
  while read -r name commit; do
    case $name:$'\n'$standing$'\n' in
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
  printf '%s\n' "$missing" | git_here update-ref --stdin && return
  # A git that was killed in such a transaction left a lock for each: one by one, each stale one
  # dropped.
  while read -r verb ref sha; do
    if write_ref 2>/dev/null; then continue; fi
    drop_stale_lock
    write_ref || die 1 "git could not write $ref" "git -C $repo $verb-ref $ref $sha"
  done <<<"$missing"
}

# The usual case in one process of git, for the agents' sake: it writes the ref as a file, and that
# file tells the sha.
pin_fast() {
  [ -d "$repo/.git" ] || return 1
  git_here update-ref "$ref" "$1^{commit}" 2>/dev/null || return 1
  { read -r sha <"$repo/.git/$ref"; } 2>/dev/null || return 1
  case $sha in *[!0-9a-f]* | '') return 1 ;; esac
  printf '%s\n' "$sha"
}

# Git has waited ten seconds for the lock. Only the farm writes below refs/farm/, and no git of it
# takes that long: a lock that no process has open was left by a killed one.
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

pin_one() { # REF COMMIT-ISH
  local sha ref=$1
  case $ref in
    *..*) die 2 "$ref is no name of a ref" "pins.sh set refs/farm/ready/TASK COMMIT" ;;
    refs/farm/?*) ;;
    *) die 2 "$ref is not below refs/farm/" "pins.sh set refs/farm/ready/TASK COMMIT" ;;
  esac
  if pin_fast "$2"; then return; fi
  sha=$(git -C "$repo" rev-parse --quiet --verify --end-of-options "$2^{commit}") ||
    die 3 "there is no commit $2 in $repo" "git -C $repo log --oneline"
  if ! write_ref 2>/dev/null; then
    drop_stale_lock
    write_ref || die 1 "git could not write $ref" "git -C $repo update-ref $ref $sha"
  fi
  printf '%s\n' "$sha"
}

drop_merged() {
  local merged form='%(refname) %(objectname)'
  git -C "$repo" rev-parse -q --verify "refs/heads/$target" >/dev/null || exit 3
  merged=$(git -C "$repo" for-each-ref --merged "refs/heads/$target" --format="$form" refs/farm/)
  [ -n "$merged" ] || return 0
  printf '%s\n' "$merged" | sed 's/^/delete /' |
    git -C "$repo" -c core.hooksPath=/dev/null update-ref --stdin
  printf '%s\n' "$merged" | sed 's/ .*//'
}

print_tip() { # COMMIT-ISH
  local both
  both=$(git -C "$repo" rev-parse "$1^{commit}" "$1^{tree}" 2>/dev/null) ||
    die 3 "there is no commit $1 in $repo" "git branch"
  printf '%s\t%s\n' "${both%%$'\n'*}" "${both##*$'\n'}"
}

main() {
  local verb=${1-} repo=. target='' option ref sha form='%(refname)%09%(objectname)'
  if [ "$verb" = -h ]; then usage; exit 0; fi
  shift || true
  while getopts ':C:b:h' option; do
    case $option in
      C) repo=$OPTARG ;;
      b) target=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "pins.sh -h" ;;
    esac
  done
  shift $((OPTIND - 1))
  case $verb:$# in
    set:2) pin_one "$@" ;;
    many:0) pin_many ;;
    list:0) git -C "$repo" for-each-ref --format="$form" refs/farm/ready/ || exit 3 ;;
    drop:0) drop_merged ;;
    tip:1) print_tip "$1" ;;
    set:*) die 2 "a ref and a commit are needed" "pins.sh -h" ;;
    *) die 2 "set, many, list, drop or tip?" "pins.sh -h" ;;
  esac
}
main "$@"
