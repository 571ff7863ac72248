#!/usr/bin/env bash
# Usage: find-checkout.sh [-C REPO] BRANCH
# Where is BRANCH checked out? A rebase or bisect of it, which detaches HEAD, counts; a work tree whose folder is gone does not.
# Prints one line each: checkout|rebase|bisect<TAB>path (\\ \t \n \r escaped)
# Exit: 0 found, 2 usage or no repo, 3 nowhere
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
die() { printf 'farm: %s\n  try: %s\n' "$1" "$2" >&2; exit "${3:-1}"; }

answer() {
  local text=$2 slash="\\\\" tab='\t' line='\n' return='\r'
  text=${text//\\/"$slash"} text=${text//$'\t'/"$tab"} text=${text//$'\n'/"$line"} text=${text//$'\r'/"$return"}
  printf '%s\t%s\n' "$1" "$text"
  found=0
}

# Git < 2.36 knows no -z here.
list_worktrees() {
  git -C "$repo" worktree list --porcelain -z 2>/dev/null || git -C "$repo" worktree list --porcelain | tr '\n' '\0'
}

find_checkouts() {
  local line path=''
  while IFS= read -r -d '' line; do
    case $line in
      "worktree "*) path=${line#worktree } main=${main:-$path} ;;
      "branch refs/heads/$1") [ ! -d "$path" ] || answer checkout "$path" ;;
    esac
  done < <(list_worktrees)
}

find_operations() {
  local file entry path kind
  for file in "$common"/{,worktrees/*/}{rebase-merge/head-name,rebase-merge/update-refs,rebase-apply/head-name,BISECT_START}; do
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
  [ $# -eq 1 ] || die "a branch is needed" "find-checkout.sh -h" 2
  unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_COMMON_DIR
  common=$(git -C "$repo" rev-parse --path-format=absolute --git-common-dir 2>/dev/null) || die "$repo is no git repo" "git init" 2
  find_checkouts "$1"
  find_operations "$1"
  return "$found"
}
main "$@"
