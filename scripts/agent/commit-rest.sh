#!/usr/bin/env bash
# Usage: commit-rest.sh -b BRANCH -o BASE [-t TARGET] -m MESSAGE | -n WORKTREE
# After a good end: commits what an agent has left uncommitted in WORKTREE, and prints what is to be
# submitted. An agent may have worked on a branch of its own, or on none: its HEAD counts when it
# goes on from BASE, where the task began, or from TARGET, and BRANCH does not go on from there.
# What it left is then committed on no branch, for the one that it stands on may be anybody's. A
# repo of its own inside would become a link to a commit that nobody has: it is left out, and said
# on stderr; so are entries of git's stash, which get a pin below refs/farm/rescue/. -n: nothing is
# committed, only judged.
# Prints NAME=value lines: HEAD=sha where that is not the head of BRANCH, NOTHING=yes where nothing
#   of it is new
# Exit: 0 ok, 1 it could not be committed (git's words on stderr), 2 usage, 4 a merge or rebase is
#   in the middle
set -uo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"

in_tree() { git -C "$worktree" "$@"; }

# What ended in the middle is not done: a commit would hold the markers of a conflict, or half of a
# rebase.
refuse_the_middle() {
  local dir what=''
  dir=$(in_tree rev-parse --absolute-git-dir) || exit 1
  if [ -d "$dir/rebase-merge" ] || [ -d "$dir/rebase-apply" ]; then
    what='in the middle of a rebase'
  elif [ -d "$dir/sequencer" ]; then
    what='in the middle of a cherry-pick or revert'
  elif [ -n "$(in_tree ls-files -u | head -n 1)" ]; then
    what='with conflicts that are not resolved'
  fi
  if [ -n "$what" ]; then say "it ended $what"; exit 4; fi
}

is_in() { in_tree merge-base --is-ancestor "$1" "$2" 2>/dev/null; } # COMMIT COMMIT

# Whether HEAD is what the agent has worked on, rather than the task's own branch.
is_own_head() {
  local own
  own=$(in_tree rev-parse -q --verify HEAD) || own=none
  if ! is_in "$base" "$own" && ! is_in "refs/heads/$branch" "$own" &&
    ! is_in "refs/heads/$target" "$own"; then
    say "it ended on ${head:-a detached HEAD (${own:0:10})}, which does not go on from where the" \
      "task began: git rebase $branch"
    return 1
  fi
  [ "$own" = "$(in_tree rev-parse -q --verify "refs/heads/$branch")" ] ||
    ! is_in "$own" "refs/heads/$branch"
}

# What HEAD's log says since the task began, the newest first. From its file: git would look up
# each commit there, of all tasks that the worktree has ever had.
list_moves() {
  tail -n 2000 "$(in_tree rev-parse --absolute-git-dir)/logs/HEAD" 2>/dev/null |
    awk -F '\t' -v start=" to $branch" '
    { line[NR] = $2 }
    !first && substr($2, length($2) - length(start) + 1) == start { first = NR }
    END { for (i = NR; first && i >= first; i--) print line[i] }'
}

# Whether all of a commit is the target's, or was there before, and the agent has made none: it has
# only fetched others' work.
is_nothing_new() {
  local new
  new=$(in_tree rev-list -n 1 "$1" "^$base" ${target:+"^refs/heads/$target"}) || return 1
  [ -z "$new" ] && ! grep -q -e '^commit' -e '^cherry-pick' -e '^rebase (pick)' <<<"$(list_moves)"
}

# Entries of the stash, which is one for all worktrees, from a branch that the agent was on: named,
# and kept by a pin.
name_stash() {
  local names sha subject ref
  names=$(printf '%s\n' "$branch" "${head#refs/heads/}" '(no branch)'
    list_moves | sed '$d' | sed -n 's/^checkout: moving from \(.*\) to .*/\1/p')
  names=$(grep . <<<"$names" | grep -vxF "${target:-$branch/}" | sed 's/.*/ on &:/; p; s/^ on/On/')
  in_tree stash list --format='%H %gd: %gs' 2>/dev/null | grep -F -e "$names" |
    while read -r sha subject; do
      ref=refs/farm/rescue/${worktree_name%-worktree}/stash-${sha:0:10}
      in_tree update-ref "$ref" "$sha"
      say "it left work in git's stash, which is not part of what is submitted: $subject" \
        "(rescue restore $ref)"
    done
}

# Names of repos inside that are not ignored, bare ones too, each ended by NUL.
list_repos() {
  local file
  in_tree ls-files -o --exclude-standard -z | while IFS= read -r -d '' file; do
    case $file in
      */) printf '%s\0' "${file%/}" ;;
      */HEAD) file=${file%/HEAD}
        if [ -d "$worktree/$file/objects" ] && [ -d "$worktree/$file/refs" ]; then
          printf '%s\0' "$file"
        fi ;;
    esac
  done
}

commit_rest() {
  local inner list others=()
  [ -n "$(in_tree status --porcelain -unormal --ignore-submodules=dirty | head -n 1)" ] || return 0
  list=$(list_repos | tr '\0\n' '\n\0' | tr '\0' '\1') || return 1
  while IFS= read -r inner; do
    if [ -z "$inner" ]; then continue; fi
    inner=${inner//$'\1'/$'\n'}
    others+=(":(exclude,top,literal)$inner")
    say "$inner is a repo of its own, and its files are not in the commit: to add them," \
      "remove $inner/.git"
  done <<<"$list"
  in_tree add --all --sparse -- :/ ${others[@]+"${others[@]}"} || return 1
  in_tree diff --cached --quiet || in_tree commit --quiet --message "$message" >&2
}

main() {
  local worktree worktree_name branch='' base='' target='' message='' only_judge='' option head
  local own=HEAD
  while getopts b:o:t:m:nh option; do
    case $option in
      b) branch=$OPTARG ;; o) base=$OPTARG ;; t) target=$OPTARG ;;
      m) message=$OPTARG ;; n) only_judge=yes ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  case $branch:$base:$only_judge$message:$# in
    ?*:?*:?*:1) worktree=$1 ;;
    *) say 'a branch, a base, a message and a worktree'; exit 2 ;;
  esac
  worktree_name=${worktree%/} worktree_name=${worktree_name##*/}
  if [ -n "$target" ] && ! in_tree rev-parse -q --verify "refs/heads/$target" >/dev/null; then
    target=
  fi
  head=$(in_tree symbolic-ref -q HEAD) || head=
  name_stash
  refuse_the_middle
  if [ "$head" = "refs/heads/$branch" ]; then own=''
  elif ! is_own_head; then own='' only_judge=yes # unsaved work here is rescued before the next task
  elif [ -z "$only_judge" ] && [ -n "$head" ]; then
    in_tree update-ref --no-deref HEAD "$(in_tree rev-parse HEAD)" || return 1
  fi
  [ -n "$only_judge" ] || commit_rest || return 1
  if is_nothing_new "${own:-refs/heads/$branch}"; then printf 'NOTHING=yes\n'; return; fi
  [ -n "$own" ] || return 0
  is_in "refs/heads/$branch" HEAD || ! in_tree show-ref -q --verify "refs/heads/$branch" ||
    say "HEAD is submitted; the commits that only $branch has are not part of it"
  printf 'HEAD=%s\n' "$(in_tree rev-parse HEAD)"
}

main "$@"
