#!/usr/bin/env bash
# Usage: pack-objects.sh [-C REPO]
# Puts what agents and merges have left as thousands of single files into a pack, once they are as
# many as git's own bound (gc.auto; 0: never). git's own upkeep is off while agents work, for it
# drops what no ref has yet. This drops nothing: a file goes only when a pack has its object, and
# that on the next run, as others may be reading it. An object that is garbled since a power cut
# stays a file, and keeps no other from its pack.
# Exit: 0 ok, or nothing to do, 1 git failed, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

# As git counts them: one of 256 folders stands for all.
is_time() {
  local limit files
  limit=$(git -C "$repo" config --type=int gc.auto 2>/dev/null) || limit=6700
  files=$(find "$common/objects/17" -type f 2>/dev/null | wc -l) || files=0
  [ "$limit" -gt 0 ] && [ $((files * 256)) -gt "$limit" ]
}

list_loose() { # an object's name, a line each
  find "$common/objects" -type f -path '*/[0-9a-f][0-9a-f]/*' |
    sed -n 's|.*/\([0-9a-f][0-9a-f]\)/\([0-9a-f]\{38,62\}\)$|\1\2|p' |
    git -C "$repo" cat-file --batch-check='%(objectname) %(objecttype)' 2>/dev/null |
    sed -n '/ missing$/d; s/ .*//p'
}

# Packs that were never finished, by a git that was killed: nobody has written there for two days.
drop_unfinished() { find "$common/objects" -type f -name 'tmp_*' -mtime +1 -delete; }

main() {
  local repo=. option common
  while getopts C:h option; do
    case $option in
      C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  open_repo "$repo"
  is_time || return 0
  drop_unfinished
  git -C "$repo" prune-packed --quiet
  is_time || return 0
  list_loose | nice git -C "$repo" pack-objects --quiet "$common/objects/pack/pack" >/dev/null
}

main "$@"
