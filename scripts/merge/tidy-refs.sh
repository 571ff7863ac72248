#!/usr/bin/env bash
# Usage: tidy-refs.sh list [-C REPO] [-b TARGET]   prints ref<TAB>sha<TAB>in|out, a line each of the
#                                                  farm's pins and of its branches that no worktree
#                                                  is on; in: TARGET has the commit
#        tidy-refs.sh has [-C REPO] -b TARGET <COMMITS        prints those that TARGET has
#        tidy-refs.sh drop [-C REPO] <LINES        deletes each "REF SHA" that still stands there
# What the farm keeps in git for work that it knows. drop deletes a ref only at the commit that is
# named, so that a branch or a pin which has moved meanwhile stays; prints nothing.
# Environment: FARM_LOCK_SECONDS, how long to wait for another git's lock (10)
# Beside it: remove-stale-lock.sh
# Exit: 0 ok, 1 git failed, 2 usage, 3 no such branch or repo
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

list_refs() {
  local form all merged='' line
  (open_repo "$repo") 2>/dev/null || exit 3
  form='%(if)%(worktreepath)%(then)%(else)%(refname)%09%(objectname)%(end)'
  local where=(refs/farm/ready refs/farm/returned refs/farm/in refs/heads/farm)
  all=$(git -C "$repo" for-each-ref --format="$form" "${where[@]}") || exit 3
  if [ -n "$target" ]; then
    git -C "$repo" rev-parse -q --verify "refs/heads/$target" >/dev/null || exit 3
    merged=$(git -C "$repo" for-each-ref --merged "refs/heads/$target" --format="$form" \
      "${where[@]}")
  fi
  merged=$'\n'$merged$'\n'
  while IFS= read -r line; do
    case $merged in
      *$'\n'"$line"$'\n'*) printf '%s\tin\n' "$line" ;;
      *) printf '%s\tout\n' "$line" ;;
    esac
  done <<<"$all" | sed '/^	/d'
}

list_contained() {
  local sha
  while read -r sha; do
    ! git -C "$repo" merge-base --is-ancestor "$sha" "refs/heads/$target" 2>/dev/null ||
      printf '%s\n' "$sha"
  done
}

# In one transaction; where one of them has moved, one by one. Each would wait in vain for the lock
# that a killed git has left on all packed refs: it goes, or nothing does this time.
drop_refs() {
  local lines ref sha lock
  lines=$(cat)
  [ -n "$lines" ] || return 0
  if printf '%s\n' "$lines" | delete 2>/dev/null; then return; fi
  lock=$(git -C "$repo" rev-parse --path-format=absolute --git-common-dir)/packed-refs.lock
  "$here/remove-stale-lock.sh" "$lock" "$lock" || return 0
  while read -r ref sha; do
    printf '%s %s\n' "$ref" "$sha" | delete 2>/dev/null || true
  done <<<"$lines"
}

# Never what such a ref points to: an agent may have made its branch a symbolic ref to another one.
delete() {
  awk '{ printf "option no-deref\ndelete %s\n", $0 }' |
    quiet_git "$repo" -c core.filesRefLockTimeout=1000 \
      -c core.packedRefsTimeout="${FARM_LOCK_SECONDS:-10}000" update-ref --stdin
}

main() {
  local verb=${1-} repo=. target='' option
  if [ "$verb" = -h ]; then usage; exit 0; fi
  shift || true
  while getopts ':C:b:h' option; do
    case $option in
      C) repo=$OPTARG ;;
      b) target=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "tidy-refs.sh -h" ;;
    esac
  done
  case $verb in
    list) list_refs ;;
    has) list_contained ;;
    drop) drop_refs ;;
    *) die 2 "list, has or drop?" "tidy-refs.sh -h" ;;
  esac
}
main "$@"
