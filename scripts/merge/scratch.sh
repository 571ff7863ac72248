#!/usr/bin/env bash
# Usage: scratch.sh SCRATCH OURS THEIRS
# Merge two commits for a git that has no `merge-tree --write-tree`, in the private sparse work tree
# SCRATCH (made when it is not there, its files below SCRATCH/tree count as attributes); no file of
# the repo but conflicted ones is written.
# Prints: what `git merge-tree --write-tree -z --name-only OURS THEIRS` would
# Exit: 0 clean, 1 conflict, else git failed
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

in_scratch() {
  git -C "$scratch/tree" -c core.sparseCheckout=true -c core.sparseCheckoutCone=false \
    -c sparse.expectFilesOutsideOfPatterns=true "$@"
}

# Git takes a folder with HEAD and commondir for a work tree's own; registered nowhere, it needs no
# cleaning up in the repo.
open_scratch() {
  local common=$GIT_DIR
  export GIT_DIR=$scratch/git GIT_WORK_TREE=$scratch/tree
  if [ ! -d "$GIT_DIR" ]; then
    mkdir -p "$GIT_DIR/info" "$scratch/tree"
    printf '%s\n' "$common" >"$GIT_DIR/commondir"
    printf '!/*\n' >"$GIT_DIR/info/sparse-checkout"
    cp -R "$scratch/tree" "$scratch/attributes"
  fi
  rm -f "$GIT_DIR"/*.lock "$GIT_DIR"/MERGE_* "$GIT_DIR/AUTO_MERGE"
  printf '%s\n' "$1" >"$GIT_DIR/HEAD"
}

wipe_scratch() {
  rm -rf "$scratch/tree" "$GIT_DIR/index"
  cp -R "$scratch/attributes" "$scratch/tree"
}

# The tree with the conflicted files as they lie there, their names, and git's messages.
print_conflict() {
  in_scratch diff-files --name-only --diff-filter=U -z >"$scratch/paths"
  [ -s "$scratch/paths" ] || exit 2
  in_scratch update-index --add --remove -z --stdin <"$scratch/paths"
  printf '%s\0' "$(in_scratch write-tree)"
  cat "$scratch/paths"
  printf '\0000\0CONFLICT\0'
  grep -v -e '^Auto-merging' -e '^Automatic merge failed' "$scratch/messages"
  printf '\0'
}

main() {
  local scratch code=0
  case ${1-} in -h) usage; exit 0 ;; esac
  [ $# -eq 3 ] || die 2 "a folder and two commits are needed" "scratch.sh -h"
  [ -n "${FARM_PINNED-}" ] || exec "$here/pinned-git.sh" . "$here/${0##*/}" "$@"
  scratch=$1
  open_scratch "$2"
  in_scratch read-tree --reset -u "$2" || { wipe_scratch && in_scratch read-tree --reset -u "$2"; }
  in_scratch merge -s ort --no-commit --no-ff --no-stat "$3" >"$scratch/messages" 2>&1 || code=$?
  case $code in
    0) printf '%s\0' "$(in_scratch write-tree)" ;;
    1) print_conflict && wipe_scratch ;;
  esac
  exit "$code"
}
main "$@"
