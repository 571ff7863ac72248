#!/usr/bin/env bash
# Usage: gate-slot.sh prepare [-C REPO] SLOTDIR COMMIT    moves the work tree SLOTDIR to COMMIT
#        gate-slot.sh check SLOTDIR COMMIT       are HEAD and the tracked files still COMMIT's?
#        gate-slot.sh remove [-C REPO] SLOTDIR   deletes it (renamed first) and lets git forget it
# prepare drops every change and untracked file, nested repos too, and keeps what git ignores: the
# caches. A broken slot is mended, or made anew. A folder is a slot when a file .NAME.slot lies
# beside it; others are refused and left alone.
# Prints: prepare: the slot's path; check: the changed paths, one a line (\\ \t \n \r escaped), HEAD
#   or .git if that is it
# Exit: 0 ok, 1 git failed or (check) changed, 2 usage or no repo, 3 no such commit or slot, 4 not a
#   slot
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
. "$here/slot-git.sh"

# Sets slot (absolute, without links) and mark.
set_slot() {
  local parent
  parent=$(dirname "$1")
  mkdir -p "$parent"
  parent=$(cd "$parent" && pwd -P)
  slot=$parent/${1##*/} mark=$parent/.${1##*/}.slot
}

# Sets GIT_DIR to the folder that git keeps about this slot. Naming it keeps every command here from
# ever finding a repo further up, where `clean` would be fatal. With $1, the repo's git dir, a slot
# that lost its .git file is found too.
find_entry() {
  local entry='' back
  if [ -f "$slot/.git" ]; then IFS= read -r -d '' entry <"$slot/.git" || true; fi
  entry=${entry%$'\n'}
  for entry in "${entry#gitdir: }" ${1:+"$1"/worktrees/*}; do
    back=
    if [ -f "$entry/gitdir" ]; then IFS= read -r -d '' back <"$entry/gitdir" || true; fi
    if [ "${back%$'\n'}" = "$slot/.git" ]; then
      export GIT_DIR=$entry GIT_WORK_TREE=$slot
      return 0
    fi
  done
  return 1
}

delete_tree() {
  rm -rf "$1" 2>/dev/null || { find "$1" -type d -exec chmod u+rwx {} + && rm -rf "$1"; }
}

# An index goes in which git is told not to look at a file: a gate may have made its slot sparse.
move_slot() {
  rm -rf "$GIT_DIR"/*.lock "$GIT_DIR"/MERGE_* "$GIT_DIR"/rebase-* "$GIT_DIR/sequencer"
  [ -f "$slot/.git" ] || printf 'gitdir: %s\n' "$GIT_DIR" >"$slot/.git"
  if git_in "$slot" ls-files -v 2>/dev/null | grep -a '^[a-zS] ' >/dev/null; then
    rm -f "$GIT_DIR/index"
  fi
  in_slot checkout -q --detach --force "$1" -- && git_in "$slot" clean -ffdq
}

# What stops a move: folders that the gate left unwritable, then an index that git cannot read.
move_or_mend() {
  move_slot "$1" 2>/dev/null && return
  find "$slot" -type d ! -perm -u=rwx -exec chmod u+rwx {} +
  move_slot "$1" 2>/dev/null && return
  rm -f "$GIT_DIR/index"
  move_slot "$1"
}

# The entry goes by hand: git refuses to remove a locked one, and `worktree prune` would take other
# people's along.
drop_slot() {
  local old entry=
  if find_entry "$common"; then entry=$GIT_DIR; fi
  unset GIT_DIR GIT_WORK_TREE
  [ ! -e "$slot" ] || mv "$slot" "$slot.trash.$$"
  [ -z "$entry" ] || rm -rf "$entry"
  for old in "$slot".trash.*; do [ ! -e "$old" ] || delete_tree "$old"; done
}

make_slot() {
  drop_slot
  : >"$mark"
  git_in "$common" worktree add -q --no-checkout --detach --lock "$slot" "$1" &&
    find_entry "$common" && move_slot "$1"
}

prepare() {
  local top setup=$here/../setup-worktree.sh
  open_repo "$repo"
  git_in "$common" cat-file -e "$1^{commit}" 2>/dev/null ||
    die 3 "there is no commit $1 in $repo" "git log --all"
  if ! { [ -e "$mark" ] && [ -d "$slot" ] && find_entry "$common" && move_or_mend "$1"; } &&
    ! make_slot "$1"; then
    die 1 "git could not check out $1 in $slot" "gate-slot.sh remove $slot"
  fi
  find_top "$common"
  if [ -f "$top/.worktreeinclude" ] && [ -x "$setup" ]; then
    "$setup" -o -C "$slot" "$slot" >&2 || :
  fi
  printf '%s\n' "$slot"
}

check() {
  local path shas names list='' escaped
  if ! [ -f "$slot/.git" ] || ! find_entry ''; then printf '.git\n' && return 1; fi
  shas=$(git_in "$slot" rev-parse HEAD "$1^{commit}" 2>/dev/null) ||
    die 3 "there is no commit $1" "git log --all"
  [ "${shas%%$'\n'*}" = "${shas##*$'\n'}" ] || list=$'HEAD\n'
  names=$(in_slot diff --name-only --no-renames --ignore-submodules=dirty -z "$1" -- |
    tr '\0\n' '\n\1') ||
    die 3 "git cannot tell what the gate has changed in $slot" "gate-slot.sh prepare $slot $1"
  while IFS= read -r path; do
    if [ -z "$path" ]; then continue; fi
    escape "${path//$'\1'/$'\n'}"
    list=$list$escaped$'\n'
  done <<<"$names"
  printf '%s' "$list"
  [ -z "$list" ]
}

main() {
  local verb=${1-} repo=. common='' slot mark box=()
  [ "$verb" != -h ] || { usage; exit 0; }
  shift || true
  if [ "${1-}" = -C ] && [ $# -ge 2 ]; then repo=$2 && shift 2; fi
  case $verb:$# in
    prepare:2 | check:2 | remove:1) ;;
    *) die 2 "a verb, a folder and (not to remove) a commit are needed" "gate-slot.sh -h" ;;
  esac
  export GIT_OPTIONAL_LOCKS=0 LC_ALL=C
  set_slot "$1"
  [ -e "$mark" ] || [ ! -e "$slot" ] || rmdir "$slot" 2>/dev/null ||
    die 4 "$slot is not a slot of gates" "ls -la $slot"
  case $verb in
    prepare) prepare "$2" ;;
    check)
      [ -d "$slot" ] || die 3 "there is no slot $slot" "gate-slot.sh prepare $slot COMMIT"
      check "$2" ;;
    remove) drop_slot && rm -f "$mark" ;;
  esac
}
main "$@"
