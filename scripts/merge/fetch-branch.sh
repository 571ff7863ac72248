#!/usr/bin/env bash
# Usage: fetch-branch.sh -b TARGET -r REMOTE [-C REPO]
# Looks where REMOTE's branch TARGET is, beside the one here; its commits are fetched to
# refs/farm/remote/TARGET.
# Prints one line, its state and its commit:
#   same<TAB>sha   behind<TAB>sha (ours is its ancestor)   ahead<TAB>sha   diverged<TAB>sha
# Environment: FARM_REMOTE_SECONDS, how long the fetch may take (300)
# Exit: 0 ok, 1 git failed, 2 usage or no repo, 3 no such branch
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

git_here() { quiet_git "$repo" "$@"; }

main() {
  local repo=. target='' remote='' option ours theirs said ref
  while getopts ':b:C:r:h' option; do
    case $option in
      b) target=$OPTARG ;; C) repo=$OPTARG ;; r) remote=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "fetch-branch.sh -h" ;;
    esac
  done
  case $target:$remote in :* | *:) die 2 "-b and -r are needed" "fetch-branch.sh -h" ;; esac
  export GIT_TERMINAL_PROMPT=0 LC_ALL=C FARM_PUSH=$repo
  ref=refs/farm/remote/$target
  ours=$(git_here rev-parse -q --verify "refs/heads/$target^{commit}") ||
    die 3 "there is no branch $target" "git branch"
  said=$(git_here fetch --no-tags --no-recurse-submodules --quiet "$remote" \
    "+refs/heads/$target:$ref" 2>&1) ||
    die 1 "git could not fetch $target from $remote: ${said##*$'\n'}" \
      "git -C $repo fetch $remote $target"
  theirs=$(git_here rev-parse -q --verify "$ref^{commit}")
  if [ "$ours" = "$theirs" ]; then printf 'same\t%s\n' "$theirs"
  elif git_here merge-base --is-ancestor "$ours" "$theirs"; then printf 'behind\t%s\n' "$theirs"
  elif git_here merge-base --is-ancestor "$theirs" "$ours"; then printf 'ahead\t%s\n' "$theirs"
  else printf 'diverged\t%s\n' "$theirs"; fi
}

main "$@"
