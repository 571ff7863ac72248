#!/usr/bin/env bash
# Usage: revert-work.sh [-C REPO] BEFORE COMMIT TITLE
# Makes a commit that takes back what has landed between BEFORE and COMMIT: it stands on COMMIT and
# has BEFORE's tree, so that a merge of it with any later state takes out just that change, and
# conflicts only where that state has gone on from it. No ref, index or checkout is touched.
# Prints: the commit's sha
# Exit: 0 ok, 1 git failed, 2 usage or no repo, 3 no such commit, or it has changed nothing
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

tree_of() {
  git rev-parse -q --verify --end-of-options "$1^{tree}" ||
    die 3 "there is no commit $1" "git log --oneline"
}

main() {
  local repo=. option before after
  while getopts ':C:h' option; do
    case $option in
      C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "revert-work.sh -h" ;;
    esac
  done
  [ $# -eq $((OPTIND + 2)) ] || die 2 "two commits and a title are needed" "revert-work.sh -h"
  [ -n "${FARM_PINNED-}" ] || exec "$here/pinned-git.sh" "$repo" "$here/${0##*/}" "$@"
  shift $((OPTIND - 1))
  before=$(tree_of "$1") after=$(tree_of "$2")
  [ "$before" != "$after" ] || die 3 "$2 has changed nothing" "git show $2"
  git commit-tree "$before" -p "$2" -m "${3//[[:cntrl:]]/ }" -m "This reverts commit $2."
}
main "$@"
