#!/usr/bin/env bash
# Usage: measure-disk.sh [-C REPO] WORKTREES COORDINATION
# Prints what a farm takes on disk, in a line: its worktrees and its gates' slots (both are in the
# folder WORKTREES), its coordination folder, and how many refs of it are in git. Writes nothing.
# Exit: 0 ok, 2 usage or no repo
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

measure() { # WHAT FOLDER...: those that are not there take nothing
  du -sk "${@:2}" 2>/dev/null | awk -v what="$1" \
    '{ sum += $1 } END { printf "%s %.1f MiB, ", what, sum / 1024 }'
}

main() {
  local repo=. option folder count worktrees=() slots=()
  while getopts ':C:h' option; do
    case $option in
      C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "measure-disk.sh -h" ;;
    esac
  done
  shift $((OPTIND - 1))
  [ $# -eq 2 ] || die 2 "two folders are needed" "measure-disk.sh -h"
  command -v du >/dev/null || { printf 'du is not installed, so nobody can tell\n'; return; }
  git -C "$repo" rev-parse --git-dir >/dev/null 2>&1 || die 2 "$repo is no git repo" "git init"
  for folder in "$1"/*; do
    case ${folder##*/} in gate-*) slots+=("$folder") ;; *) worktrees+=("$folder") ;; esac
  done
  measure worktrees ${worktrees[@]+"${worktrees[@]}"} /dev/null || true
  measure slots ${slots[@]+"${slots[@]}"} /dev/null || true
  measure coordination "$2" || true
  count=$("$here/tidy-refs.sh" list -C "$repo" | grep -c '') || true
  if [ "$count" = 1 ]; then printf '1 ref\n'; else printf '%s refs\n' "$count"; fi
}
main "$@"
