#!/usr/bin/env bash
# Usage: . clean-tree.sh      sourced by start-task.sh, after common.sh; it is never run by itself
# make_clean, which keeps what a worktree holds unsaved and makes it clean, and what it needs. It
# works on worktree, git_dir, common and agent, which start-task.sh sets, and sets saved.
# Exit: none of its own; what fails ends the script that has sourced it
# shellcheck disable=SC2154  # they are set by start-task.sh, here too

# git in the worktree, with nothing of the user's settings that makes it do more. What is in a
# submodule is looked after by settle_submodules.
in_tree() {
  git -C "$worktree" -c core.hooksPath=/dev/null -c gc.auto=0 -c maintenance.auto=false \
    -c advice.detachedHead=false "$@"
}

# A merge, rebase, cherry-pick or bisect that was cut short would follow the next branch.
in_the_middle() {
  [ -e "$git_dir/MERGE_HEAD" ] || [ -e "$git_dir/CHERRY_PICK_HEAD" ] ||
    [ -e "$git_dir/REVERT_HEAD" ] || [ -e "$git_dir/BISECT_LOG" ] ||
    [ -d "$git_dir/rebase-merge" ] || [ -d "$git_dir/rebase-apply" ]
}

leave_the_middle() {
  local what
  for what in merge rebase cherry-pick revert; do in_tree "$what" --quit 2>/dev/null || true; done
  in_tree bisect reset HEAD >/dev/null 2>&1 || true
}

# A repo of its own inside (a clone, a scaffold's git init, a linked worktree): its files are
# rescued like others, but its history is nowhere else, so that it moves away whole.
keep_repos() {
  local inner place dir
  in_tree ls-files -o --exclude-standard -z | while IFS= read -r -d '' inner; do
    case $inner in
      */) ;;
      */HEAD) # a bare one?
        inner=${inner%HEAD}
        if ! [ -d "$worktree/${inner}objects" ] || ! [ -d "$worktree/${inner}refs" ]; then
          continue
        fi ;;
      *) continue ;;
    esac
    place=${worktree%/*}/kept/$agent/$(date -u +%Y%m%dT%H%M%SZ)/${inner%/}
    dir=$(git -C "$worktree/$inner" rev-parse --absolute-git-dir 2>/dev/null) || dir=''
    mkdir -p "${place%/*}" && mv "$worktree/${inner%/}" "$place" || return 1
    if [ -f "$place/.git" ] && [ -n "$dir" ]; then
      printf 'gitdir: %s\n' "$dir" >"$place/.git"
      git -C "$common" worktree repair "$place" >/dev/null 2>&1 || :
    fi
    printf 'farm: %s is a repo of its own, and is kept\n  try: ls %q\n' "${inner%/}" "$place" >&2
  done
}

# Names that end in NUL become lines, and back: grep -z is GNU's alone.
swap_ends() { tr '\0\n' '\n\0'; }

# Whether git was told not to look at a file that is there: its edits would show nowhere.
has_unwatched() {
  local entry found
  found=$(in_tree ls-files -v -z | swap_ends | { grep -a '^[a-zS] ' || :; } | swap_ends |
    while IFS= read -r -d '' entry; do
      if [ -e "$worktree/${entry#? }" ] || [ -L "$worktree/${entry#? }" ]; then printf 'yes'; fi
    done) || :
  [ -n "$found" ]
}

# Keep what the worktree holds unsaved, and a detached head that may hang on nothing else; then make
# it clean. Sets saved.
make_clean() {
  local state middle=no
  if in_the_middle || has_unwatched; then middle=yes; fi
  state=$(in_tree status --porcelain=v2 --branch -unormal --ignore-submodules=dirty 2>/dev/null) ||
    state=$'\n? its index cannot be read'
  case $middle$state in
    yes* | *$'\n'[12u?]' '* | *'# branch.head (detached)'*) ;;
    *) return 0 ;;
  esac
  saved=$(bash "$here/../rescue.sh" save -C "$worktree" -a "$agent" "$worktree")
  saved=${saved%%$'\t'*}
  [ "$middle" = no ] || leave_the_middle
  if has_unwatched; then rm -f "$git_dir/index"; fi # its marks go with it
  in_tree ls-files >/dev/null 2>&1 || rm -f "$git_dir/index"
  keep_repos
  in_tree reset --quiet --hard --no-recurse-submodules # what is unsaved in a submodule stays
  in_tree clean -ffdq
}
