#!/usr/bin/env bash
# Usage: start-task.sh -a AGENT -t TASK -b TARGET [-s START] [-k] WORKTREE
# Puts WORKTREE on the branch farm/AGENT/TASK: at START when it is a commit or branch that is there,
# else at TARGET. Before that, unsaved work is rescued, and a branch of that name with commits that
# START lacks is pinned below refs/farm/returned/TASK/. -k: a conversation goes on; a worktree that
# is on the branch stays as it is. Untracked files are removed once they are rescued; ignored ones
# stay.
# Prints: branch<TAB>base<TAB>rescue ref (empty when there was nothing to rescue); base is the
#   commit that says "nothing done": TARGET's, or that of work which came back
# Beside agent/ are merge/ (common.sh), rescue.sh and, for .worktreeinclude, setup-worktree.sh.
# Exit: 0 ok, 1 git failed, 2 usage, 3 no such worktree or target
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"
. "$here/clean-tree.sh"
export GIT_TERMINAL_PROMPT=0 LC_ALL=C

# Files of .worktreeinclude that have come or changed since the worktree was made.
bring_included() {
  local top=${common%/.git}
  IFS= read -r top 2>/dev/null <"$common/farm/main" || :
  if [ -f "$top/.worktreeinclude" ] && [ -x "$here/../setup-worktree.sh" ]; then
    "$here/../setup-worktree.sh" -u -C "$worktree" "$worktree" >&2 || :
  fi
}

# A submodule that the task before has left at another commit would be committed with the next one's
# work. A commit of it that no ref has gets one; what is unsaved in it stays.
settle_submodules() {
  local path list
  [ -d "$git_dir/modules" ] || return 0
  list=$(in_tree submodule status 2>/dev/null | sed -n 's/^+[0-9a-f]* \(.*\) (.*)$/\1/p') ||
    return 0
  while IFS= read -r path; do
    if [ -z "$path" ]; then continue; fi
    path=$worktree/$path
    [ -n "$(git -C "$path" for-each-ref --count=1 --contains HEAD)" ] ||
      git -C "$path" update-ref "refs/farm/kept/$(git -C "$path" rev-parse HEAD)" HEAD || continue
    in_tree submodule --quiet update --no-fetch -- "$path" >&2 ||
      printf 'farm: %s stays at another commit\n' "$path" >&2
  done <<<"$list"
}

# A branch that is about to be moved keeps its commits under a pin.
pin_old() {
  local old number=1
  old=$(in_tree rev-parse -q --verify "refs/heads/$branch") || return 0
  if [ "$old" = "$base" ] || [ -z "$(in_tree rev-list -n 1 "$old" "^$base")" ]; then return 0; fi
  while in_tree show-ref -q "refs/farm/returned/$task/old-$number"; do number=$((number + 1)); done
  in_tree update-ref "refs/farm/returned/$task/old-$number" "$old"
}

# Where START is not there (an agent whose worktree was broken never began), what another agent has
# committed for the task.
find_latest() {
  local latest
  latest=$(in_tree for-each-ref --sort=-committerdate --count=1 --format='%(objectname)' \
    "refs/heads/farm/*/$task")
  printf '%s' "${latest:-$newest}"
}

main() {
  local agent='' task='' target='' start='' saved='' keep='' option worktree git_dir common newest
  local base branch head had
  while getopts a:t:b:s:kh option; do
    case $option in
      a) agent=$OPTARG ;; t) task=$OPTARG ;; b) target=$OPTARG ;; s) start=$OPTARG ;; k) keep=yes ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  worktree=${1:-}
  if [ -z "$agent" ] || [ -z "$task" ] || [ -z "$target" ] || [ -z "$worktree" ]; then
    die 2 "an agent, a task, a target and a worktree are needed" "start-task.sh -h"
  fi
  git_dir=$(git -C "$worktree" rev-parse --absolute-git-dir --path-format=absolute \
    --git-common-dir 2>/dev/null) || die 3 "$worktree is not a worktree" "./farm.py up"
  common=${git_dir##*$'\n'} git_dir=${git_dir%$'\n'*}
  newest=$(in_tree rev-parse -q --verify "refs/heads/$target^{commit}") ||
    die 3 "there is no branch $target" "git branch"
  branch=farm/$agent/$task base=$newest
  if [ -n "$start" ]; then
    base=$(in_tree rev-parse -q --verify "$start^{commit}") || base=$(find_latest)
  fi
  # What a killed git left: nobody else works in this worktree, or on this branch, now.
  rm -f "$git_dir/index.lock" "$git_dir/HEAD.lock" "$git_dir/ORIG_HEAD.lock" \
    "$common/refs/heads/$branch.lock"
  if [ -n "$keep" ] && [ "$(in_tree symbolic-ref -q HEAD)" = "refs/heads/$branch" ] &&
    in_tree ls-files >/dev/null 2>&1; then
    head=$(in_tree rev-parse HEAD)
    if in_tree merge-base --is-ancestor "$head" "$newest"; then newest=$head; fi # nothing yet
    printf '%s\t%s\t\n' "$branch" "$newest"
    return
  fi
  make_clean
  pin_old
  had=$(in_tree ls-files -s | grep '^160000' || :)
  in_tree switch --quiet --no-track --force-create "$branch" "$base"
  if [ -n "$had" ]; then keep_repos; fi # a link of the task before is just a repo now
  settle_submodules
  bring_included
  case $start in refs/farm/returned/*) newest=$base ;; esac
  printf '%s\t%s\t%s\n' "$branch" "$newest" "$saved"
}

main "$@"
