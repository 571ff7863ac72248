#!/usr/bin/env bash
# Usage: drop-branches.sh [-C REPO] -b TARGET NAME...
# Deletes the branches farm/NAME/* whose commits TARGET, a commit, or a pin below refs/farm/ has,
# and that no worktree is on. Called by rm-worktrees.sh.
# Exit: 0 ok, 1 git failed, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"

# Lines for update-ref.
list_deletions() { # PATTERN...
  local ref sha merged form
  form='%(if)%(worktreepath)%(then)%(else)%(refname) %(objectname)%(end)'
  merged=$'\n'$(git -C "$repo" for-each-ref --merged "$target" --format='%(refname)' "$@")$'\n'
  git -C "$repo" for-each-ref --format="$form" "$@" | sed '/^$/d' |
    while read -r ref sha; do
      case $ref in refs/heads/farm/*/*/*) continue ;; esac # not one of ours
      case $merged in
        *$'\n'"$ref"$'\n'*) ;;
        *)
          [ -n "$(git -C "$repo" for-each-ref --count=1 --contains "$sha" refs/farm)" ] ||
            continue ;;
      esac
      # not what it points to, where somebody has made it a symbolic ref
      printf 'option no-deref\ndelete %s %s\n' "$ref" "$sha"
    done
}

main() {
  local repo=. target='' option
  while getopts C:b:h option; do
    case $option in
      C) repo=$OPTARG ;;
      b) target=$OPTARG ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ -z "$target" ] || [ $# -eq 0 ]; then
    die 2 "a target and names are needed" "drop-branches.sh -h"
  fi
  list_deletions "${@/#/refs/heads/farm/}" |
    git -C "$repo" -c core.filesRefLockTimeout=10000 -c core.packedRefsTimeout=30000 \
      update-ref --stdin
}
main "$@"
