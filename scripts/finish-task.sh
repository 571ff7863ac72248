#!/usr/bin/env bash
# Usage: finish-task.sh CODE     (with the FARM_* that run-agent.sh sets)
# What becomes of an attempt whose command ended with CODE. 0: what it left uncommitted is committed under the task's title, and the
# head is submitted (no change at all is a failure). Else: unsaved work is rescued, and the task fails with the log's tail as
# the reason; one that was killed goes on from its own commits. An agent may have made these moves itself: then they are answered again.
# Exit: 0 the attempt is over, 2 usage, 3 it cannot be ended, and neither could the next one be
set -uo pipefail

say() { printf 'farm: %s\n' "$*" >&2; }

# The last printable lines of the session's log: why an attempt ended as it did.
log_tail() {
  tail -n 5 "$FARM_REPO/coordination/logs/$FARM_AGENT_NAME.log" 2>/dev/null | tr -cd '[:print:]\n' | tr '\n' ' ' | tail -c 300
}

give_up() {
  local why=$1 start=${2:-} saved
  saved=$(bash "$FARM_HOME/scripts/rescue.sh" save -C "$FARM_REPO" -a "$FARM_AGENT_NAME" "$FARM_WORKTREE") || saved=
  farm fail "$FARM_AGENT_NAME" --fence "$FARM_FENCE" --why "$why" --rescue "${saved%%$'\t'*}" --start "$start" 2>/dev/null || true
}

commit_rest() {
  [ -n "$(git -C "$FARM_WORKTREE" status --porcelain --ignore-submodules=dirty | head -n 1)" ] || return 0
  git -C "$FARM_WORKTREE" add --all && git -C "$FARM_WORKTREE" commit --quiet --message "$FARM_TITLE"
}

submit() {
  local words try
  for try in 1 2 3; do
    words=$(farm submit "$FARM_AGENT_NAME" --fence "$FARM_FENCE" 2>&1) && return
    case $? in
      4) say "$words"; return ;; # somebody else has the task now, or the agent itself has failed it
      5) give_up "the agent ended without any change"; return ;;
    esac
  done
  say "after $try tries: $words"
  return 3
}

main() {
  local code=${1:-} words
  case $code in
    '' | -h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; [ -n "$code" ] || exit 2; exit 0 ;;
  esac
  if [ "$code" -gt 128 ]; then
    give_up "the agent was killed by signal $((code - 128)): $(log_tail)" "$FARM_BRANCH"
  elif [ "$code" -ne 0 ]; then
    give_up "the agent ended with exit code $code: $(log_tail)"
  elif ! words=$(commit_rest 2>&1); then
    give_up "what it left could not be committed: $words"
  else
    submit
  fi
}

main "$@"
