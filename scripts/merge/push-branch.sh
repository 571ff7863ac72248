#!/usr/bin/env bash
# Usage: push-branch.sh -b TARGET -o OLD -n NEW -r REMOTE [-C REPO]
# Move branch TARGET of REMOTE from OLD to NEW, if it still is at OLD there. No hooks, no prompts;
# repeating it is harmless.
# Prints one line: pushed<TAB>NEW   moved<TAB>sha (it is not at OLD)
# What the remote says with a link in it (to open a pull request, say) goes to standard error.
# Exit: 0 pushed, 1 git failed, 2 usage, 4 moved
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

# Runs a command for FARM_REMOTE_SECONDS at the most, in a process group of its own that is ended
# whole: git waits for its ssh or its helper, and they for a network that is not there. Whoever
# stops the farm finds them by FARM_PUSH.
limited() {
  local pid code=0 watch
  export FARM_PUSH=$repo
  set -m
  "$@" &
  pid=$!
  (
    trap 'kill $(jobs -p)' TERM
    sleep "${FARM_REMOTE_SECONDS:-300}" &
    wait $!
    kill -- -"$pid"
    sleep 2
    kill -9 -- -"$pid"
  ) >/dev/null 2>&1 &
  watch=$!
  set +m
  wait "$pid" || code=$?
  kill -- -"$watch" 2>/dev/null || :
  return "$code"
}

# What git lfs's own pre-push hook does, for the farm runs no hooks: else the remote gets pointers
# to content that it has not.
push_lfs() {
  local url
  git -C "$repo" grep -q -e 'filter=lfs' "$new" -- ':(glob)**/.gitattributes' || return 0
  git lfs version >/dev/null 2>&1 ||
    die 1 "git-lfs is missing, and $target has files in it: nothing was pushed" \
      "apt install git-lfs, or brew install git-lfs"
  url=$(git -C "$repo" remote get-url "$remote" 2>/dev/null) || url=$remote
  said=$(printf '%s %s %s %s\n' "$ref" "$new" "$ref" "$old" |
    limited git -C "$repo" lfs pre-push "$remote" "$url" 2>&1) ||
    die 1 "the content of LFS files could not be pushed to $remote: ${said##*$'\n'}" \
      "git -C $repo lfs push $remote $target"
}

push() {
  local said='' ref=refs/heads/$target now code=0
  local quiet=(-c core.hooksPath=/dev/null -c push.recurseSubmodules=no -c push.gpgSign=false \
    -c push.followTags=false)
  push_lfs
  said=$(limited git "${quiet[@]}" -C "$repo" push --porcelain --force-with-lease="$ref:$old" \
    "$remote" "$new:$ref" 2>&1) || code=$?
  if [ "$code" -eq 0 ]; then
    { printf '%s\n' "$said" | grep -E '^remote:.*https?://' >&2; } || true
    return
  fi
  if [ "$code" -gt 128 ]; then
    die 1 "the push to $remote was ended: it took longer than ${FARM_REMOTE_SECONDS:-300} s" \
      "git -C $repo ls-remote $remote"
  fi
  case $said in
    *"stale info"* | *"fetch first"* | *"non-fast-forward"*)
      now=$(limited git -C "$repo" ls-remote "$remote" "$ref" | cut -f 1) ;;
    *)
      said=$(printf '%s\n' "$said" | grep -E '^(fatal|error|!|remote)' | head -n 8 |
        sed $'s/\033\\[[0-9;]*[A-Za-z]//g' | tr -s '[:cntrl:]' ' ' || true)
      die 1 "git could not push to $remote: $said" \
        "git -C $repo push --dry-run $remote $new:$ref" ;;
  esac
  [ -n "$now" ] || die 1 "$remote has no branch $target" "git -C $repo push $remote $old:$ref"
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
      *) die 2 "-$OPTARG is unknown or lacks its value" "push-branch.sh -h" ;;
    esac
  done
  case $target:$old:$new:$remote in
    :* | *::* | *:) die 2 "-b, -o, -n and -r are needed" "push-branch.sh -h" ;;
  esac
  export GIT_TERMINAL_PROMPT=0 LC_ALL=C
  push
  printf 'pushed\t%s\n' "$new"
}
main "$@"
