#!/usr/bin/env bash
# Usage: judge-trees.sh DIR OUT NAME...
# Looks what would be lost if the worktrees DIR/NAME-worktree went, on all cores, for every file's
# date is read. Called by rm-worktrees.sh.
# Writes OUT/NAME, or no such file where git cannot read it: git's status (porcelain v2, with
#   branch and ignored files), then `? ...` when it holds a file that git was told not to look at,
#   and `kept: WHY` when it has to stay.
# Exit: 0 looked, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"
export GIT_OPTIONAL_LOCKS=0

# Names that end in NUL become lines, and back: grep -z is GNU's alone.
swap_ends() { tr '\0\n' '\n\0'; }

# Names of repos inside, wherever they lie, each ended by NUL: with a .git, or what a bare one has.
list_inner() { # WORKTREE
  local file
  find "$1" -mindepth 2 \( -name .git -prune -o -type f -name HEAD \) -print0 |
    while IFS= read -r -d '' file; do
      case $file in
        */.git) ;;
        *)
          if ! [ -d "${file%/HEAD}/objects" ] || ! [ -d "${file%/HEAD}/refs" ]; then continue; fi ;;
      esac
      printf '%s\0' "${file%/*}"
    done
}

# Names of files that git was told not to look at and that are there, as in no sparse checkout.
list_unwatched() { # WORKTREE
  local entry
  git -C "$1" ls-files -v -z | swap_ends | { LC_ALL=C grep -a '^[a-zS] ' || :; } | swap_ends |
    while IFS= read -r -d '' entry; do
      if [ -e "$1/${entry#? }" ] || [ -L "$1/${entry#? }" ]; then printf '%s\0' "${entry#? }"; fi
    done
}

look_at() { # WORKTREE FILE
  local inner='' entry back
  # What git would wait for, or follow: FIFOs, links. Only in what git knows as this tree's own: an
  # agent may have its .git name any folder.
  find "$1" -name '.git*' -type p -delete
  IFS= read -r entry <"$1/.git" && entry=${entry#gitdir: }
  if [ -f "$entry/gitdir" ] && [ -f "$entry/commondir" ] && ! [ -L "$entry/gitdir" ] &&
    IFS= read -r back <"$entry/gitdir" && [ "$back" -ef "$1/.git" ]; then
    find "$entry" ! -type d ! -type f -delete
  fi
  git -C "$1" status --porcelain=v2 --branch -unormal --ignored --ignore-submodules=dirty >"$2" &&
    list_unwatched "$1" >"$2.files" && list_inner "$1" >"$2.inner" || return 1
  if [ -s "$2.files" ]; then printf '? files that git was told not to look at\n' >>"$2"; fi
  IFS= read -r -d '' inner <"$2.inner" || return 0
  inner=${inner#"$1"/}
  printf 'kept: a repo of its own is inside (%s), and its history may be nowhere else: %s\n' \
    "${inner//$'\n'/ }" 'move it away' >>"$2"
}

main() {
  local name jobs=0 cores dir out
  case ${1-} in -h) usage; exit 0 ;; esac
  [ $# -ge 2 ] || die 2 "two folders are needed" "judge-trees.sh -h"
  dir=$1 out=$2
  shift 2
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || printf 2)
  for name in "$@"; do
    { look_at "$dir/$name-worktree" "$out/$name" 2>/dev/null || rm -f "$out/$name"; } &
    jobs=$((jobs + 1))
    if [ $((jobs % (cores * 4))) -eq 0 ]; then wait; fi
  done
  wait
}
main "$@"
