#!/usr/bin/env bash
# Usage: without-filters.sh REPO COMMAND [ARGUMENT]...
# Runs COMMAND, which looks at agents' trees with git outside of a sandbox, without the filter
# drivers of the user's settings: the trees' attributes choose among them, and one may be a program
# that lies in the tree. That of LFS, which is on PATH, stays.
# Exit: COMMAND's own, 2 usage
set -uo pipefail

main() {
  local repo=${1-} key n=${GIT_CONFIG_COUNT:-0} keys
  if [ "$repo" = -h ]; then sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0; fi
  [ $# -ge 2 ] || exit 2
  shift
  keys=$(git -C "$repo" config --name-only --get-regexp '^filter\..*\.(clean|smudge|process)$')
  while IFS= read -r key; do
    case $key in '' | filter.lfs.*) continue ;; esac
    export "GIT_CONFIG_KEY_$n=$key" "GIT_CONFIG_VALUE_$n="
    n=$((n + 1))
  done <<<"$keys"
  export GIT_CONFIG_COUNT=$n
  exec "$@"
}
main "$@"
