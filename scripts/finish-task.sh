#!/usr/bin/env bash
# Usage: finish-task.sh CODE     (with the FARM_* that run-task.sh has)
# What becomes of an attempt whose command ended with CODE, as `farm judge` says. submit: what it left uncommitted is committed under the
# task's title, and the head is submitted (no change at all is a failure). fail: unsaved work is rescued, and the task fails with the
# reason; resume: the same, and the next attempt goes on where this one was. release: no fault of the attempt (a usage limit, say),
# none is counted. An agent may have made these moves itself: then they are answered again.
# Exit: 0 the attempt is over, 2 usage, 3 it cannot be ended, and neither could the next one be
set -uo pipefail

say() { printf 'farm: %s\n' "$*" >&2; }

save_rest() {
  local saved
  saved=$(bash "$FARM_HOME/scripts/rescue.sh" save -C "$FARM_REPO" -a "$FARM_AGENT_NAME" "$FARM_WORKTREE") || saved=
  printf '%s' "${saved%%$'\t'*}"
}

give_up() { # WHY [START] [OPTION]...
  local why=$1 start=${2:-}
  shift $(($# > 2 ? 2 : $#))
  farm fail "$FARM_AGENT_NAME" --fence "$FARM_FENCE" --why "$why" --rescue "$(save_rest)" --start "$start" "$@" 2>/dev/null || true
}

# The move for CODE when nobody can judge (coordination/ is damaged, say).
judge_by_code() {
  case $1 in 0) printf 'submit\tdone\t-\t\n' ;; *) printf 'fail\tcrashed\t-\tthe agent ended with exit code %s\n' "$1" ;; esac
}

commit_rest() {
  [ -n "$(git -C "$FARM_WORKTREE" status --porcelain --ignore-submodules=dirty | head -n 1)" ] || return 0
  git -C "$FARM_WORKTREE" add --all && git -C "$FARM_WORKTREE" commit --quiet --message "$FARM_TITLE"
}

submit() {
  local words try=0
  for try in 1 2 3; do
    words=$(farm submit "$FARM_AGENT_NAME" --fence "$FARM_FENCE" 2>&1) && return
    case $? in
      4) say "$words"; return ;; # somebody else has the task now, or the agent itself has failed it
      5) give_up "the agent ended without any change${1:+ ($1)}"; return ;;
    esac
  done
  say "after $try tries: $words"
  return 3
}

main() {
  local code=${1:-} words move cause conversation why
  case $code in
    '' | -h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; [ -n "$code" ] || exit 2; exit 0 ;;
  esac
  words=$(tail -c 4000 "$FARM_REPO/coordination/logs/$FARM_AGENT_NAME.log" 2>/dev/null | farm judge "$FARM_AGENT_NAME" --fence "$FARM_FENCE" --code "$code") || words=$(judge_by_code "$code")
  IFS=$'\t' read -r move cause conversation why <<<"$words"
  conversation=${conversation#-}
  case $move:$cause in
    submit:*)
      if words=$(commit_rest 2>&1); then submit "$why"; else give_up "what it left could not be committed: $words"; fi ;;
    release:*) farm release "$FARM_AGENT_NAME" --fence "$FARM_FENCE" --why "$cause: $why" --rescue "$(save_rest)" \
      --conversation "$conversation" 2>/dev/null || true ;;
    resume:*) give_up "$why" "$FARM_BRANCH" --resume --conversation "$conversation" ;;
    fail:budget) give_up "$why" "$FARM_BRANCH" --no-retry ;;
    fail:crashed | fail:failed) give_up "$why" ;;
    *) give_up "$why" "$FARM_BRANCH" ;;
  esac
}

main "$@"
