#!/usr/bin/env bash
# Usage: list-pins.sh [-C REPO]
# Prints the pins of submitted work, a line each: refs/farm/ready/TASK<TAB>sha
# Exit: 0 ok, 2 usage, 3 no repository
set -euo pipefail
export GIT_OPTIONAL_LOCKS=0

main() {
  local repo=. option
  while getopts C:h option; do
    case $option in
      C) repo=$OPTARG ;;
      h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  git -C "$repo" for-each-ref --format='%(refname)%09%(objectname)' refs/farm/ready/ || exit 3
}

main "$@"
