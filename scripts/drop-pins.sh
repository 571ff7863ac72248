#!/usr/bin/env bash
# Usage: drop-pins.sh [-C REPO] -b TARGET
# Deletes the pins below refs/farm/ whose commits TARGET has: they keep nothing any more. All others stay.
# Prints each deleted ref.
# Exit: 0 ok, 1 git failed, 2 usage, 3 no such branch
set -euo pipefail
export GIT_OPTIONAL_LOCKS=0

main() {
  local repo=. target='' option merged
  while getopts C:b:h option; do
    case $option in
      C) repo=$OPTARG ;; b) target=$OPTARG ;;
      h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  git -C "$repo" rev-parse -q --verify "refs/heads/$target" >/dev/null || exit 3
  merged=$(git -C "$repo" for-each-ref --merged "refs/heads/$target" --format='%(refname) %(objectname)' refs/farm/)
  [ -n "$merged" ] || return 0
  printf '%s\n' "$merged" | sed 's/^/delete /' | git -C "$repo" -c core.hooksPath=/dev/null update-ref --stdin
  printf '%s\n' "$merged" | sed 's/ .*//'
}

main "$@"
