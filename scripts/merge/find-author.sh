#!/usr/bin/env bash
# Usage: find-author.sh [-C REPO] COMMIT
# Which agent has made a commit, by the logs of the agents' branches? One that was only started from
# it does not count.
# Prints: agent<TAB>task; nothing when none of them has
# Exit: 0 ok, 1 git failed, 2 usage or no repo
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

main() {
  local repo=. option common sha log
  while getopts C:h option; do
    case $option in
      C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  [ $# -eq 1 ] || exit 2
  open_repo "$repo"
  sha=$(git -C "$repo" rev-parse -q --verify "$1^{commit}") || exit 1
  for log in "$common"/logs/refs/heads/farm/*/*; do
    if [ -f "$log" ] &&
      grep -q "^[0-9a-f]* $sha .*	\(commit\|cherry-pick\|merge\|rebase\|am\)" "$log"; then
      log=${log#"$common"/logs/refs/heads/farm/}
      printf '%s\t%s\n' "${log%%/*}" "${log#*/}"
      return
    fi
  done
}

main "$@"
