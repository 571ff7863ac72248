#!/usr/bin/env bash
# Usage: verify-objects.sh -C REPO -b TARGET COMMIT
#        verify-objects.sh -C REPO -l
# Are all objects that COMMIT has and TARGET lacks what their names say, well-formed, and with all
# that they refer to? A sandboxed agent writes to the folder that holds everybody's. Only these are
# read, by packing them into a folder that goes away, where git computes their names anew. Then that
# pack is kept: agents cannot write to packs, and git reads them first, so that from then on nothing
# can happen to these objects. Blobs of LFS are not looked at.
# -l: all loose objects instead, which then go: they are in packs.
# Exit: 0 yes, 2 usage, 3 no such commit, 5 no (git's words on stderr)
set -uo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"
scratch=''

list_loose() {
  (cd "$common/objects" && find . -path './[0-9a-f][0-9a-f]/*' -type f ! -name '*[!0-9a-f]*') |
    tr -d './' | sort
}

# Of what is there for git at all, whatever else somebody has put there.
pack_loose() {
  list_loose >"$scratch/wanted"
  git -C "$repo" cat-file --batch-check='%(objectname) %(objecttype)' <"$scratch/wanted" \
    2>/dev/null | awk '$2 != "missing" { print $1 }' >"$scratch/names"
  pack && keep "$scratch"/objects/pack/*.pack && git -C "$repo" prune-packed -q
}

list_names() { # COMMIT
  git -C "$repo" rev-list --objects --end-of-options "$1" "^refs/heads/$target" -- | cut -d ' ' -f 1
}

pack() {
  [ -s "$scratch/names" ] || return 0
  git -C "$repo" pack-objects -q --stdout --no-reuse-object <"$scratch/names" |
    GIT_OBJECT_DIRECTORY=$scratch/objects GIT_ALTERNATE_OBJECT_DIRECTORIES=$common/objects \
      git -C "$repo" index-pack --stdin ${1+"$1"} >/dev/null
}

keep() {
  [ -s "$scratch/names" ] || return 0
  git -C "$repo" index-pack --stdin <"$1" >/dev/null &&
    git -C "$repo" maintenance run --auto --quiet --task=incremental-repack
}

main() {
  local repo=. target='' loose='' option common said
  while getopts C:b:lh option; do
    case $option in
      C) repo=$OPTARG ;; b) target=$OPTARG ;; l) loose=yes ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  case $loose:${target:+yes}:$# in
    yes::0 | :yes:1) ;;
    *) die 2 'a target and a commit, or -l' 'verify-objects.sh -h' ;;
  esac
  open_repo "$repo"
  trap 'rm -rf "$scratch"' EXIT
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/farm-verify.XXXXXX") || exit 1
  mkdir -p "$scratch/objects/pack" || exit 1
  [ -n "$loose" ] || git -C "$repo" rev-parse -q --verify --end-of-options "$1" >/dev/null ||
    die 3 "there is no commit $1" "git -C $repo log"
  if [ -n "$loose" ]; then said=$(pack_loose 2>&1)
  else said=$({ list_names "$1" >"$scratch/names" && pack --strict; } 2>&1); fi ||
    die 5 "objects are damaged: $(head -n 3 <<<"$said")" "git -C $repo fsck ${1-}"
  [ -n "$loose" ] || sort "$scratch/names" >"$scratch/wanted"
  cat "$scratch"/objects/pack/*.idx 2>/dev/null | git -C "$repo" show-index 2>/dev/null |
    cut -d ' ' -f 2 | sort >"$scratch/found"
  said=$(comm -23 "$scratch/wanted" "$scratch/found" | head -n 3)
  [ -z "$said" ] || die 5 "objects are not what their names say: $said" "git -C $repo fsck ${1-}"
  [ -n "$loose" ] || said=$(keep "$scratch"/objects/pack/*.pack 2>&1) ||
    die 1 "the objects cannot be packed: $said" "git -C $repo fsck ${1-}"
}
main "$@"
