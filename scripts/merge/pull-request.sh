#!/usr/bin/env bash
# Usage: pull-request.sh [-C REPO] -b TARGET -r REMOTE
# Opens a pull request from TARGET, which has been pushed, to REMOTE's own branch, or brings the
# text of the open one up to date: the tasks in it, a line each. By gh, where that is installed;
# without it nothing is done (the remote's own words at a push name a link).
# Prints: its URL, or nothing
# Exit: 0 ok, 1 gh or git failed, 2 usage or no repo
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

list_tasks() { # SINCE TARGET: an indented line each, in which a forge looks for no names
  git log --first-parent --reverse \
    --format='%(trailers:key=Farm-Task,valueonly,separator=%x20)%x09%s' "$1..refs/heads/$2" |
    awk -F '\t' '$1 != "" { gsub(/[[:cntrl:]]/, " "); print "    " $1 " " $2 }' |
    sed -e 's/^\(    \([^ ]*\)\) Merge \2: /\1 /' -e 's/ *$//'
}

main() {
  local repo=. target='' remote='' option heads base sha since tasks count number text
  while getopts ':C:b:r:h' option; do
    case $option in
      C) repo=$OPTARG ;; b) target=$OPTARG ;; r) remote=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "pull-request.sh -h" ;;
    esac
  done
  case $target:$remote in :* | *:) die 2 "-b and -r are needed" "pull-request.sh -h" ;; esac
  cd "$repo" || exit 2
  git rev-parse --git-dir >/dev/null || die 2 "$repo is no git repo" "git init"
  command -v gh >/dev/null || exit 0
  export GH_PROMPT_DISABLED=1 GIT_TERMINAL_PROMPT=0 NO_COLOR=1 LC_ALL=C
  heads=$(git ls-remote --symref "$remote" HEAD)
  base=$(sed -n 's|^ref: refs/heads/\(.*\)	HEAD$|\1|p' <<<"$heads")
  sha=$(sed -n 's|^\([0-9a-f]*\)	HEAD$|\1|p' <<<"$heads")
  if [ -z "$base" ] || [ "$base" = "$target" ]; then
    die 1 "$target is $remote's own branch, so there is nothing to ask for" "FARM_INTO=agents"
  fi
  since=$(git rev-parse -q --verify "$sha^{commit}" || git merge-base "$target" \
    "refs/remotes/$remote/$base") || die 1 "$remote/$base is not known here" "git fetch $remote"
  tasks=$(list_tasks "$since" "$target")
  [ -n "$tasks" ] || exit 0
  count=$(printf '%s\n' "$tasks" | wc -l)
  text="Work of these tasks, each gated on the tree that landed on $target:"$'\n\n'$tasks
  number=$(gh pr list --head "$target" --base "$base" --state open --json number \
    --jq '.[0].number // empty')
  if [ -n "$number" ]; then
    printf '%s\n' "$text" | gh pr edit "$number" --body-file -
  else
    printf '%s\n' "$text" | gh pr create --head "$target" --base "$base" \
      --title "Work of $((count)) tasks on $target" --body-file -
  fi
}
main "$@"
