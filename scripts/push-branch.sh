#!/usr/bin/env bash
# Usage: push-branch.sh -b TARGET -o OLD -n NEW -r REMOTE [-C REPO]
# Move branch TARGET of REMOTE from OLD to NEW, if it still is at OLD there. No hooks, no prompts; repeating it is harmless.
# Prints one line: pushed<TAB>NEW   moved<TAB>sha (it is not at OLD)
# Exit: 0 pushed, 1 git failed, 2 usage, 4 moved
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
die() { printf 'farm: %s\n  try: %s\n' "$1" "$2" >&2; exit "${3:-1}"; }

push() {
  local said ref=refs/heads/$target now
  local quiet=(-c core.hooksPath=/dev/null -c push.recurseSubmodules=no -c push.gpgSign=false -c push.followTags=false)
  said=$(git "${quiet[@]}" -C "$repo" push --porcelain --force-with-lease="$ref:$old" "$remote" "$new:$ref" 2>&1) && return
  case $said in
    *"stale info"* | *"fetch first"* | *"non-fast-forward"*) now=$(git -C "$repo" ls-remote "$remote" "$ref" | cut -f 1) ;;
    *) die "git could not push to $remote: $(printf '%s\n' "$said" | grep -m 1 -E '^(fatal|error|!|remote)' || true)" \
      "git -C $repo push --dry-run $remote $new:$ref" ;;
  esac
  [ -n "$now" ] || die "$remote has no branch $target" "git -C $repo push $remote $old:$ref"
  printf 'moved\t%s\n' "$now"
  exit 4
}

main() {
  local repo=. target='' old='' new='' remote='' option
  while getopts ':b:o:n:C:r:h' option; do
    case $option in
      b) target=$OPTARG ;;
      o) old=$OPTARG ;;
      n) new=$OPTARG ;;
      C) repo=$OPTARG ;;
      r) remote=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die "-$OPTARG is unknown or lacks its value" "push-branch.sh -h" 2 ;;
    esac
  done
  case $target:$old:$new:$remote in :* | *::* | *:) die "-b, -o, -n and -r are needed" "push-branch.sh -h" 2 ;; esac
  unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_COMMON_DIR GIT_OBJECT_DIRECTORY GIT_NAMESPACE
  export GIT_TERMINAL_PROMPT=0 LC_ALL=C
  push
  printf 'pushed\t%s\n' "$new"
}
main "$@"
