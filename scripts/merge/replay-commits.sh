#!/usr/bin/env bash
# Usage: replay-commits.sh TIP COMMIT TREE TITLE TRAILERS MERGE...
# Put what COMMIT has and TIP lacks on TIP in a line: its own commits with their authors and
# messages, no merges, none that is there already, TRAILERS on the last. Where these do not add up
# to TREE, the merge of TIP and COMMIT, one commit TITLE holds it all. MERGE... prints what `git
# merge-tree --write-tree -z --name-only` would for two more arguments. Called by chain.sh, which
# sets the identity and the dates.
# Prints: the last new commit, then sha:tree of each one before it, from the first on, space
#   separated
# Exit: 0 ok, 1 git failed, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

# Sets commits and trees, one pair a step, or fails. A step merges one change alone: ours is the
# tip's tree on its parent.
plan_steps() {
  local commit parent new ours at list
  at=$(git rev-parse "$1^{tree}") || return 1
  list=$(git rev-list --reverse --topo-order --parents --no-merges --right-only --cherry-pick \
    "$1...$2") || return 1
  while read -r -u 3 commit parent; do
    if [ -z "$commit" ]; then continue; fi
    [ -n "$parent" ] || return 1
    ours=$(git commit-tree "$at" -p "$parent" -m step)
    new=$("${merge[@]}" "$ours" "$commit" </dev/null | tr -d '\0') || return 1
    [ "$new" != "$at" ] || continue
    commits[${#commits[@]}]=$commit trees[${#trees[@]}]=$new at=$new
  done 3<<<"$list"
  [ "$at" = "$3" ] && [ "${#commits[@]}" -gt 0 ]
}

# The commit's own author and message (with the trailers, if any, in its last paragraph) on a new
# parent and tree.
commit_step() {
  local name email date message
  message=$(git log -1 --date=raw --format='%an%n%ae%n@%ad%n%B' "$1")
  name=${message%%$'\n'*} message=${message#*$'\n'}
  email=${message%%$'\n'*} message=${message#*$'\n'}
  date=${message%%$'\n'*} message=${message#*$'\n'}
  # what git would not take from us, as in history that was made elsewhere
  has_letters "$name" || name=unknown
  [[ $date =~ ^@[0-9]+\ [+-][0-9]{4}$ ]] || date=$GIT_AUTHOR_DATE
  [ $# -eq 3 ] ||
    message=$(printf '%s\n' "$message" |
      git interpret-trailers --no-divider --where end --if-exists add "${@:4}")
  printf '%s\n' "$message" |
    GIT_AUTHOR_NAME=$name GIT_AUTHOR_EMAIL=$email GIT_AUTHOR_DATE=$date \
    git commit-tree "$3" -p "$2" -F -
}

main() {
  local tip=${1-} i last line before='' commits=() trees=() merge=() add=()
  case ${1-} in -h) usage; exit 0 ;; esac
  [ $# -ge 6 ] || die 2 "too few arguments" "replay-commits.sh -h"
  merge=("${@:6}")
  if ! plan_steps "$1" "$2" "$3"; then
    exec git commit-tree "$3" -p "$1" -m "$4" -m "$5"
  fi
  last=$((${#commits[@]} - 1))
  for ((i = 0; i < last; i++)); do
    tip=$(commit_step "${commits[i]}" "$tip" "${trees[i]}")
    before="$before $tip:${trees[i]}"
  done
  while IFS= read -r line; do add[${#add[@]}]=--trailer=$line; done <<<"$5"
  tip=$(commit_step "${commits[last]}" "$tip" "${trees[last]}" "${add[@]}")
  printf '%s%s\n' "$tip" "$before"
}
main "$@"
