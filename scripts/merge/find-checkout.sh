#!/usr/bin/env bash
# Usage: find-checkout.sh [-C REPO] BRANCH
# Where is BRANCH checked out? A rebase or bisect of it, which detaches HEAD, counts; a work tree
# whose folder is gone does not.
# Prints one line each: checkout|rebase|bisect<TAB>path (\\ \t \n \r escaped)
# Exit: 0 found, 1 git failed, 2 usage or no repo, 3 nowhere
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
list=

answer() { # KIND PATH
  local escaped
  escape "$2"
  printf '%s\t%s\n' "$1" "$escaped"
  found=0
}

# Sets main, the farm's checkout: as is written down, else git's main worktree, else where $repo is.
find_main() {
  local noted='' place
  IFS= read -r noted 2>/dev/null <"$common/farm/main" || :
  for main in "$noted" "${common%/.git}"; do
    (cd -- "${main:-/none}" && place=$(git rev-parse --is-inside-work-tree --git-common-dir) &&
      [ "${place#true?}" -ef "$common" ]) 2>/dev/null && return
  done
  main=$(git -C "$repo" rev-parse --show-toplevel 2>/dev/null) || main=${common%/.git}
}

# Git < 2.36 knows no -z here. Where the git dir lies elsewhere (a submodule, --separate-git-dir),
# git names that for the main worktree.
list_worktrees() {
  git -C "$repo" worktree list --porcelain -z 2>/dev/null >"$list" ||
    git -C "$repo" worktree list --porcelain 2>/dev/null | tr '\n' '\0' >"$list" ||
    die 1 "git cannot tell where $1 is checked out" "git -C $repo worktree list"
}

find_checkouts() {
  local line path=''
  list_worktrees "$1"
  while IFS= read -r -d '' line; do
    case $line in
      "worktree "*)
        path=${line#worktree }
        if [ "$path" -ef "$common" ]; then
          find_main
          path=$main
          # one that is linked is listed by itself; of a main worktree that git does not know nobody
          # can tell
          if ! [ "$(git -C "$main" rev-parse --absolute-git-dir 2>/dev/null)" -ef "$common" ]; then
            path=''
          fi
        fi
        main=${main:-$path} ;;
      "branch refs/heads/$1") [ -z "$path" ] || [ ! -d "$path" ] || answer checkout "$path" ;;
    esac
  done <"$list"
}

find_operations() {
  local file entry path kind
  # Of rebase-apply only head-name is ever there.
  for file in "$common"/{,worktrees/*/}{rebase-{merge,apply}/{head-name,update-refs},BISECT_START}
  do
    if ! [ -f "$file" ] || ! grep -qxF -e "$1" -e "refs/heads/$1" "$file"; then continue; fi
    case $file in
      */BISECT_START) kind=bisect entry=${file%/*} ;;
      *) kind=rebase entry=${file%/rebase-*} ;;
    esac
    path=$main
    if [ "$entry" != "$common" ]; then IFS= read -r path <"$entry/gitdir"; fi
    answer "$kind" "${path%/.git}"
  done
}

main() {
  local repo=. common main='' found=3
  case ${1-} in -h) usage; exit 0 ;; esac
  if [ "${1-}" = -C ] && [ $# -ge 2 ]; then repo=$2 && shift 2; fi
  [ $# -eq 1 ] || die 2 "a branch is needed" "find-checkout.sh -h"
  open_repo "$repo"
  common=$(CDPATH='' cd -P -- "$common" && pwd -P)
  trap 'rm -f "$list"' EXIT
  list=$(mktemp "${TMPDIR:-/tmp}/farm-checkout.XXXXXX")
  find_checkouts "$1"
  find_operations "$1"
  return "$found"
}
main "$@"
