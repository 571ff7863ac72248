#!/usr/bin/env bash
# Usage: squash-message.sh BASE COMMIT TITLE TRAILERS FILE TREE PARENT
# Make one commit of TREE on PARENT out of what COMMIT has and BASE lacks. What was said stays: the
# subject and body of each commit, their trailers once, each author; the commit's own author is that
# of COMMIT, and the others have co-authored it. Called by chain.sh, which sets the committer and
# the dates. FILE is a scratch file.
# Prints: the new commit
# Exit: 0 ok, 1 git failed
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

list_commits() { git rev-list --reverse --topo-order --no-merges "$base..$commit"; }

# A commit's message without its trailers, which are told apart by git.
print_body() {
  local text trailers line
  text=$(git log -1 --format=%B "$1")
  trailers=$(printf '%s\n' "$text" | git interpret-trailers --no-divider --parse)
  while IFS= read -r line; do
    case $'\n'$trailers$'\n' in *$'\n'"$line"$'\n'*) if [ -n "$line" ]; then continue; fi ;; esac
    printf '%s\n' "$line"
  done <<<"$text"
}

print_trailers() {
  local sha
  for sha in $(list_commits); do
    git log -1 --format=%B "$sha" | git interpret-trailers --no-divider --parse
  done
  for sha in $(list_commits); do git log -1 --format='Co-authored-by: %an <%ae>' "$sha"; done
}

main() {
  local base=$1 commit=$2 sha author trailers line seen='' email
  author=$(git log -1 --format=%an "$commit") email=$(git log -1 --format=%ae "$commit")
  has_letters "$author" || author=unknown
  printf '%s\n' "$3" >"$5"
  for sha in $(list_commits); do
    line=$(print_body "$sha")
    if [ "$line" != "$3" ]; then printf '\n%s\n' "$line"; fi
  done >>"$5"
  printf '\n' >>"$5"
  trailers=$(print_trailers; printf '%s\n' "$4")
  while IFS= read -r line; do
    case $line in '' | "Co-authored-by: $author <$email>") continue ;; esac
    case $seen in *$'\n'"$line"$'\n'*) continue ;; esac
    seen=$seen$'\n'$line$'\n'
    printf '%s\n' "$line"
  done <<<"$trailers" >>"$5"
  GIT_AUTHOR_NAME=$author GIT_AUTHOR_EMAIL=$email git commit-tree "$6" -p "$7" -F "$5"
}

main "$@"
