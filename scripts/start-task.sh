#!/usr/bin/env bash
# Usage: start-task.sh -a AGENT -t TASK -b TARGET [-s START] [-k] WORKTREE
# Puts WORKTREE on the branch farm/AGENT/TASK: at START when it is a commit or branch that is there, else at TARGET.
# Before that, unsaved work is rescued, and a branch of that name with commits that START lacks is pinned below
# refs/farm/returned/TASK/. -k: a conversation goes on; a worktree that is on the branch stays as it is. Untracked files are removed once they are rescued; ignored ones stay.
# Prints: branch<TAB>base<TAB>rescue ref (empty when there was nothing to rescue); base is the commit that says "nothing done":
# TARGET's, or that of work which came back
# Exit: 0 ok, 1 git failed, 2 usage, 3 no such worktree or target
set -euo pipefail
export GIT_TERMINAL_PROMPT=0 LC_ALL=C
here=$(dirname "$0")

die() { printf 'farm: %s\n  try: %s\n' "$2" "$3" >&2; exit "$1"; }
in_tree() { git -C "$worktree" -c core.hooksPath=/dev/null -c gc.auto=0 -c maintenance.auto=false -c advice.detachedHead=false "$@"; }

# A merge, rebase, cherry-pick or bisect that was cut short would follow the next branch.
in_the_middle() {
  [ -e "$git_dir/MERGE_HEAD" ] || [ -e "$git_dir/CHERRY_PICK_HEAD" ] || [ -e "$git_dir/REVERT_HEAD" ] ||
    [ -d "$git_dir/rebase-merge" ] || [ -d "$git_dir/rebase-apply" ] || [ -e "$git_dir/BISECT_LOG" ]
}

leave_the_middle() {
  local what
  for what in merge rebase cherry-pick revert; do in_tree "$what" --quit 2>/dev/null || true; done
  in_tree bisect reset HEAD >/dev/null 2>&1 || true
}

# Keep what the worktree holds unsaved, and a detached head that may hang on nothing else; then make it clean. Sets saved.
make_clean() {
  local state middle=no
  if in_the_middle; then middle=yes; fi
  state=$(in_tree status --porcelain=v2 --branch --ignore-submodules=dirty 2>/dev/null) || state=$'\n? its index cannot be read'
  case $middle$state in
    yes* | *$'\n'[12u?]' '* | *'# branch.head (detached)'*) ;;
    *) return 0 ;;
  esac
  saved=$(bash "$here/rescue.sh" save -C "$worktree" -a "$agent" "$worktree")
  saved=${saved%%$'\t'*}
  [ "$middle" = no ] || leave_the_middle
  in_tree ls-files >/dev/null 2>&1 || rm -f "$git_dir/index"
  in_tree reset --quiet --hard
  in_tree clean -ffdq
}

# A branch that is about to be moved keeps its commits under a pin.
pin_old() {
  local old number=1
  old=$(in_tree rev-parse -q --verify "refs/heads/$branch") || return 0
  if [ "$old" = "$base" ] || [ -z "$(in_tree rev-list -n 1 "$old" "^$base")" ]; then return 0; fi
  while in_tree show-ref -q "refs/farm/returned/$task/old-$number"; do number=$((number + 1)); done
  in_tree update-ref "refs/farm/returned/$task/old-$number" "$old"
}

main() {
  local agent='' task='' target='' start='' saved='' keep='' option worktree git_dir common newest base branch head
  while getopts a:t:b:s:kh option; do
    case $option in
      a) agent=$OPTARG ;; t) task=$OPTARG ;; b) target=$OPTARG ;; s) start=$OPTARG ;; k) keep=yes ;;
      h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  worktree=${1:-}
  if [ -z "$agent" ] || [ -z "$task" ] || [ -z "$target" ] || [ -z "$worktree" ]; then
    die 2 "an agent, a task, a target and a worktree are needed" "start-task.sh -h"
  fi
  git_dir=$(git -C "$worktree" rev-parse --absolute-git-dir --path-format=absolute --git-common-dir 2>/dev/null) ||
    die 3 "$worktree is not a worktree" "./farm.py up"
  common=${git_dir##*$'\n'} git_dir=${git_dir%$'\n'*}
  newest=$(in_tree rev-parse -q --verify "refs/heads/$target^{commit}") || die 3 "there is no branch $target" "git branch"
  branch=farm/$agent/$task base=$newest
  if [ -n "$start" ]; then base=$(in_tree rev-parse -q --verify "$start^{commit}") || base=$newest; fi
  # What a killed git left: nobody else works in this worktree, or on this branch, now.
  rm -f "$git_dir/index.lock" "$git_dir/HEAD.lock" "$git_dir/ORIG_HEAD.lock" "$common/refs/heads/$branch.lock"
  if [ -n "$keep" ] && [ "$(in_tree symbolic-ref -q HEAD)" = "refs/heads/$branch" ] && in_tree ls-files >/dev/null 2>&1; then
    head=$(in_tree rev-parse HEAD)
    if in_tree merge-base --is-ancestor "$head" "$newest"; then newest=$head; fi # nothing is done yet
    printf '%s\t%s\t\n' "$branch" "$newest"
    return
  fi
  make_clean
  pin_old
  in_tree switch --quiet --no-track --force-create "$branch" "$base"
  case $start in refs/farm/returned/*) newest=$base ;; esac
  printf '%s\t%s\t%s\n' "$branch" "$newest" "$saved"
}

main "$@"
