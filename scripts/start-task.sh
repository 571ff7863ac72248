#!/usr/bin/env bash
# Usage: start-task.sh -a AGENT -t TASK -b TARGET [-s START] WORKTREE
# Puts WORKTREE on the branch farm/AGENT/TASK: at START when it is a commit or branch that is there, else at TARGET.
# Before that, unsaved work is rescued, and a branch of that name with commits that START lacks is pinned below
# refs/farm/returned/TASK/. Untracked files are removed once they are rescued; ignored ones stay.
# Prints: branch<TAB>base<TAB>rescue ref (empty when there was nothing to rescue); base is the commit that says "nothing done":
# TARGET's, or that of work which came back
# Exit: 0 ok, 1 git failed, 2 usage, 3 no such worktree or target
set -euo pipefail
export GIT_TERMINAL_PROMPT=0 LC_ALL=C
here=$(dirname "$0")

die() { printf 'farm: %s\n  try: %s\n' "$2" "$3" >&2; exit "$1"; }
quiet_git() { git -c core.hooksPath=/dev/null -c gc.auto=0 -c maintenance.auto=false -c advice.detachedHead=false "$@"; }

# Keep what the worktree holds unsaved, then make it clean; prints the rescue ref.
make_clean() {
  local worktree=$1 agent=$2 saved
  if in_the_middle "$worktree"; then
    saved=$(bash "$here/rescue.sh" save -C "$worktree" -a "$agent" "$worktree")
    leave_the_middle "$worktree"
  elif ! git -C "$worktree" symbolic-ref -q HEAD >/dev/null ||  # detached: its commits may hang on nothing else
    [ -n "$(git -C "$worktree" status --porcelain --ignore-submodules=dirty | head -n 1)" ]; then
    saved=$(bash "$here/rescue.sh" save -C "$worktree" -a "$agent" "$worktree")
  else
    return 0
  fi
  quiet_git -C "$worktree" reset --quiet --hard
  quiet_git -C "$worktree" clean -ffdq
  printf '%s' "${saved%%$'\t'*}"
}

# A merge, rebase, cherry-pick or bisect that was cut short would follow the next branch.
in_the_middle() {
  local folder
  folder=$(git -C "$1" rev-parse --absolute-git-dir)
  [ -e "$folder/MERGE_HEAD" ] || [ -e "$folder/CHERRY_PICK_HEAD" ] || [ -e "$folder/REVERT_HEAD" ] ||
    [ -d "$folder/rebase-merge" ] || [ -d "$folder/rebase-apply" ] || [ -e "$folder/BISECT_LOG" ]
}

leave_the_middle() {
  quiet_git -C "$1" merge --quit 2>/dev/null || true
  quiet_git -C "$1" rebase --quit 2>/dev/null || true
  quiet_git -C "$1" cherry-pick --quit 2>/dev/null || true
  quiet_git -C "$1" revert --quit 2>/dev/null || true
  quiet_git -C "$1" bisect reset HEAD >/dev/null 2>&1 || true
}

# A branch that is about to be moved keeps its commits under a pin.
pin_old() {
  local worktree=$1 branch=$2 base=$3 task=$4 old number=1
  old=$(git -C "$worktree" rev-parse -q --verify "refs/heads/$branch") || return 0
  [ -n "$(git -C "$worktree" rev-list -n 1 "$old" "^$base")" ] || return 0
  while git -C "$worktree" show-ref -q "refs/farm/returned/$task/old-$number"; do number=$((number + 1)); done
  git -C "$worktree" update-ref "refs/farm/returned/$task/old-$number" "$old"
}

main() {
  local agent='' task='' target='' start='' option worktree newest base branch saved
  while getopts a:t:b:s:h option; do
    case $option in
      a) agent=$OPTARG ;; t) task=$OPTARG ;; b) target=$OPTARG ;; s) start=$OPTARG ;;
      h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  worktree=${1:-}
  if [ -z "$agent" ] || [ -z "$task" ] || [ -z "$target" ] || [ -z "$worktree" ]; then
    die 2 "an agent, a task, a target and a worktree are needed" "start-task.sh -h"
  fi
  git -C "$worktree" rev-parse --git-dir >/dev/null 2>&1 || die 3 "$worktree is not a worktree" "./farm.py up"
  branch=farm/$agent/$task
  newest=$(git -C "$worktree" rev-parse -q --verify "refs/heads/$target^{commit}") || die 3 "there is no branch $target" "git branch"
  base=$newest
  if [ -n "$start" ]; then base=$(git -C "$worktree" rev-parse -q --verify "$start^{commit}") || base=$newest; fi
  rm -f "$(git -C "$worktree" rev-parse --absolute-git-dir)/index.lock"  # nobody else works in this worktree now
  saved=$(make_clean "$worktree" "$agent")
  pin_old "$worktree" "$branch" "$base" "$task"
  quiet_git -C "$worktree" switch --quiet --no-track --force-create "$branch" "$base"
  case $start in refs/farm/returned/*) newest=$base ;; esac
  printf '%s\t%s\t%s\n' "$branch" "$newest" "$saved"
}

main "$@"
