#!/usr/bin/env bash
# Usage: show-tip.sh [-C REPO] COMMIT-ISH
# Prints the commit and its tree: sha<TAB>sha
# Exit: 0 ok, 2 usage, 3 no such commit
set -euo pipefail
export GIT_OPTIONAL_LOCKS=0

main() {
  local repo=. option both
  while getopts C:h option; do
    case $option in
      C) repo=$OPTARG ;;
      h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  both=$(git -C "$repo" rev-parse "$1^{commit}" "$1^{tree}" 2>/dev/null) || {
    printf 'farm: there is no commit %s in %s\n  try: git branch\n' "$1" "$repo" >&2
    exit 3
  }
  printf '%s\t%s\n' "${both%%$'\n'*}" "${both##*$'\n'}"
}

main "$@"
