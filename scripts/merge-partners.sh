#!/usr/bin/env bash
# Usage: merge-partners.sh [-C REPO] -b TARGET COMMIT
# Prints which landed tasks changed files that COMMIT's work changes too, most files in common first:
#   task<TAB>files in common, separated by spaces
# In fields, backslash, tab, newline and return are written \\ \t \n \r.
# Exit: 0 ok (also when there is none), 2 usage, 3 no such commit
set -euo pipefail
export GIT_OPTIONAL_LOCKS=0 LC_ALL=C

main() {
  local repo=. target='' option commit base mine
  while getopts C:b:h option; do
    case $option in
      C) repo=$OPTARG ;; b) target=$OPTARG ;;
      h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  commit=${1:-}
  base=$(git -C "$repo" merge-base "refs/heads/$target" "$commit" 2>/dev/null) || exit 3
  mine=$(git -C "$repo" diff --name-only "$base" "$commit" | sort)
  git -C "$repo" log --first-parent --diff-merges=first-parent --name-only -n 200 \
    --format='farm-task %(trailers:key=Farm-Task,valueonly,separator=%x2C)' "$base..refs/heads/$target" |
    awk -v mine="$mine" '
      BEGIN { n = split(mine, names, "\n"); for (i = 1; i <= n; i++) wanted[names[i]] = 1 }
      /^farm-task / { task = $2; next }
      task != "" && ($0 in wanted) { files[task] = files[task] (files[task] == "" ? "" : " ") $0; count[task]++ }
      END { for (task in files) printf "%d\t%s\t%s\n", count[task], task, files[task] }' | sort -rn | cut -f2-
}

main "$@"
