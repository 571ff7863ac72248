#!/usr/bin/env bash
# Usage: check-repo.sh [-s] [-C REPO] [-b TARGET] <COMMITS
# What in a repo would stop a farm, or has undone its work: a killed git's lock, a merge, rebase or
# bisect in the middle, a checkout that a tool has called bare, content of LFS without git-lfs,
# commits that nobody's name can be put to or that cannot be signed, and of COMMITS (what has
# landed, one a line) those that TARGET has lost.
# -s: at a start: only whether commits can be made, and whether coordination/ lies on a file system
#   of the network, where flock cannot be trusted (which doctor has from check-machine.sh)
# Prints: what<TAB>the command that mends it
# Exit: 0 looked (nothing printed: all is well), 1 git failed, 2 usage
set -uo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
export GIT_OPTIONAL_LOCKS=0 LC_ALL=C

row() { printf '%s\t%s\n' "$1" "$2"; }

check_middle() { # GIT_DIR
  local at="git -C $repo" common lock
  open_repo "$repo"
  if [ -e "$1/MERGE_HEAD" ]; then
    row "a merge is in the middle in $repo" "$at merge --continue, or: $at merge --abort"
  fi
  if [ -d "$1/rebase-merge" ] || [ -d "$1/rebase-apply" ]; then
    row "a rebase is in the middle in $repo" "$at rebase --continue, or: $at rebase --abort"
  fi
  if [ -e "$1/CHERRY_PICK_HEAD" ]; then
    row "a cherry-pick is in the middle in $repo" \
      "$at cherry-pick --continue, or: $at cherry-pick --abort"
  fi
  if [ -e "$1/REVERT_HEAD" ]; then
    row "a revert is in the middle in $repo" "$at revert --continue, or: $at revert --abort"
  fi
  if [ -e "$1/BISECT_LOG" ]; then row "a bisect is in the middle in $repo" "$at bisect reset"; fi
  for lock in "$1/index.lock" "$common/packed-refs.lock"; do
    [ ! -e "$lock" ] || row "git's lock $lock is there: a git runs in $repo, or was killed" \
      "ps ax | grep git; when none runs: rm $lock"
  done
}

# By the mount table: df's where it tells types, else that of mount, as on macOS; of lustre only
# mount knows how it keeps locks.
check_disk() {
  local folder=$repo/coordination kind place options=''
  if ! [ -d "$folder" ]; then folder=$repo; fi
  kind=$(df -PT "$folder" 2>/dev/null | awk 'NR == 2 { print $2 }')
  if [ -z "$kind" ] || [ "$kind" = lustre ]; then
    place=$(df -P "$folder" 2>/dev/null | awk 'NR == 2 { print $6 }')
    options=$(mount 2>/dev/null | grep -F " on $place " | tail -n 1)
  fi
  if [ -z "$kind" ]; then kind=${options##* (} kind=${kind%%,*} kind=${kind%)}; fi
  case $kind:$options in
    lustre:*[\(,]flock[\),]* | lustre:*[\(,]localflock[\),]*) return ;;
    nfs* | cifs* | smb* | 9p* | v9fs* | fuse.sshfs* | macfuse* | osxfuse* | afs* | afpfs* | \
      webdav* | lustre:* | gpfs* | fuse.s3* | fuse.rclone* | fuse.gcsfuse*) ;;
    *) return ;;
  esac
  row "$folder lies on $kind, a file system on which two processes can hold one lock" \
    "clone the repo to a local disk and run the farm there; other machines come in by: farm spoke"
}

check_identity() {
  local said
  said=$(git -C "$repo" var GIT_AUTHOR_IDENT 2>&1 && git -C "$repo" var GIT_COMMITTER_IDENT 2>&1) &&
    return
  said=$(grep -m 1 -E '^(fatal|error): ' <<<"$said")
  row "git does not know whose name to put to commits: ${said#*: }" \
    "git config --global user.name 'Your Name'; git config --global user.email you@example.com"
}

check_signing() {
  local said pid watch code=0
  [ "$(git -C "$repo" config --type=bool commit.gpgSign 2>/dev/null)" = true ] || return 0
  set -m
  git -C "$repo" commit-tree -S -m 'a try of signing' "HEAD^{tree}" >"$scratch" 2>&1 </dev/null &
  pid=$!
  (sleep 10; kill -9 -- -"$pid") >/dev/null 2>&1 &
  watch=$!
  set +m
  wait "$pid" 2>/dev/null || code=$?
  kill -- -"$watch" 2>/dev/null
  if [ "$code" -eq 0 ]; then return; fi
  said=$(grep -m 1 -E 'error|fatal|gpg|sign' "$scratch")
  if [ "$code" -gt 128 ]; then
    said='nothing answered within 10 s (a passphrase that somebody is asked for?)'
  fi
  row "commits cannot be signed, and commit.gpgSign asks for it: ${said#error: }" \
    "unlock the key, or: git -C $repo config commit.gpgSign false"
}

check_lfs() {
  local lfs="$target has files in LFS, and git-lfs is"
  git -C "$repo" grep -q -e 'filter=lfs' "refs/heads/$target" -- ':(glob)**/.gitattributes' \
    2>/dev/null || return 0
  if ! git lfs version >/dev/null 2>&1; then
    row "$lfs missing: agents would see pointers, and commit content" \
      "apt install git-lfs, or brew install git-lfs"
  elif [ -z "$(git -C "$repo" config --get filter.lfs.process)" ]; then
    row "$lfs not set up: agents would see pointers" "git -C $repo lfs install --local"
  fi
}

check_landed() {
  local commits lost
  if [ -t 0 ]; then return; fi
  commits=$(cat)
  if [ -z "$commits" ]; then return; fi
  commits=$(printf '%s\n' "$commits" | sed 's/$/^{commit}/' |
    git -C "$repo" cat-file --batch-check='%(objectname)' | grep -v ' ')
  lost=$( { printf '%s\n' "$commits"; printf '^refs/heads/%s\n' "$target"; } |
    git -C "$repo" rev-list --stdin 2>/dev/null) || return
  lost=$(grep -Fx "$commits" <<<"$lost" | head -n 1)
  if [ -n "$lost" ]; then
    row \
      "$target does not have ${lost:0:10} any more, which has landed: somebody has moved it back" \
      "git -C $repo reflog $target; git -C $repo merge --ff-only $lost, or git -C $repo merge $lost"
  fi
}

main() {
  local repo=. target=HEAD option dir said scratch only=''
  while getopts C:b:sh option; do
    case $option in
      C) repo=$OPTARG ;; b) target=$OPTARG ;; s) only=start ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  said=$(git -C "$repo" rev-parse --absolute-git-dir 2>&1) ||
    { row "git: ${said#fatal: }" "git -C $repo status"; return; }
  dir=$said
  if [ "$(git -C "$repo" rev-parse --is-bare-repository)" = true ] && [ -e "$dir/index" ]; then
    row "core.bare is set in $repo, which is a checkout: some tool has done that" \
      "git -C $repo config core.bare false"
    return
  fi
  scratch=$(mktemp "${TMPDIR:-/tmp}/farm-check.XXXXXX")
  if [ -n "$only" ]; then check_disk; fi
  check_identity
  check_signing
  if [ -z "$only" ]; then
    check_middle "$dir"
    check_lfs
    check_landed
  fi
  rm -f "$scratch"
}

main "$@"
