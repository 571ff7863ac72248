#!/usr/bin/env bash
# Usage: run-task.sh 9<>BELL     (with the FARM_* that run-agent.sh and the claim have set)
# One attempt: a fresh branch, the agent's command by `bash -c` in the worktree (FARM_AGENT_RESUME for a conversation that goes on), and
# finish-task.sh, which says what becomes of its work. Meanwhile it answers the bell: makes the moves that a sandboxed agent
# asks for, and ends a CLI whose turn is over, which would wait for a person for ever.
# Exit: 0 the attempt is over, 2 usage, 3 what is wrong here is wrong for every task (this one is given back)
set -uo pipefail

scripts=$FARM_HOME/scripts
mailbox=$FARM_REPO/coordination/mailbox/$FARM_AGENT_NAME

say() { printf '%s\n' "farm: $*" >&2; }

# The loop ends this session's run, mends the worktree and starts it again.
leave() {
  farm release "$FARM_AGENT_NAME" --fence "$FARM_FENCE"
  exit 3
}

prepare_branch() {
  local row
  # shellcheck disable=SC2153  # FARM_TASK comes with the claim
  row=$(bash "$scripts/start-task.sh" -a "$FARM_AGENT_NAME" -t "$FARM_TASK" -b "$FARM_TARGET" -s "${FARM_START:-}" \
    ${FARM_RESUME:+-k} "$FARM_WORKTREE") || return 1
  row=${row#*$'\t'}
  export FARM_BASE=${row%%$'\t'*}
}

# The prompt as one argument. The kernel takes 128 KiB at most, so that a long one is only named.
read_prompt() {
  if [ "$(wc -c <"$FARM_PROMPT_FILE")" -le 100000 ]; then
    cat "$FARM_PROMPT_FILE"
  else
    printf 'Your task is in the file %s: read all of it first.' "$FARM_PROMPT_FILE"
  fi
}

prepare_cli() {
  : >"$FARM_OUTPUT"
  FARM_PROMPT=$(read_prompt)
  FARM_GIT_DIR=$(git -C "$FARM_WORKTREE" rev-parse --absolute-git-dir) || leave
  export FARM_PROMPT FARM_GIT_DIR FARM_GIT=${FARM_GIT_DIR%/worktrees/*}
}

serve_mailbox() {
  local word
  unset FARM_MAILBOX
  while read -r word <&9; do
    case $word in
      request) farm answer "$FARM_AGENT_NAME" ;;
      over) end_cli ;;
    esac
  done
}

# A word may come late, when the next task has begun: what it is about is in the mailbox.
end_cli() {
  local about="\"fence\": \"$FARM_FENCE\"" pid
  grep -qs "$about" "$mailbox/ending.json" || grep -s "$about" "$mailbox/turn.json" | grep -q '"state": "over"' || return 0
  pid=$(cat "$mailbox/pid") || return 0
  bash "$scripts/end-tree.sh" "$pid"
}

main() {
  local code command=$FARM_AGENT
  case ${1:-} in -h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;; esac
  say "$FARM_AGENT_NAME works on $FARM_TASK: $FARM_TITLE"
  prepare_branch || leave
  export FARM_OUTPUT=$mailbox/output
  [ -z "${FARM_SANDBOXED:-}" ] || export FARM_MAILBOX=$mailbox
  [ -z "${FARM_PRESET:-}" ] || prepare_cli
  [ -z "${FARM_RESUME:-}" ] || command=$FARM_AGENT_RESUME
  rm -f "$mailbox/pid"
  serve_mailbox &
  # shellcheck disable=SC2016  # expanded by the inner bash, which the CLI takes the place of: its pid is in the mailbox
  (cd "$FARM_WORKTREE" && exec bash -c 'printf "%s\n" "$$" >"$1/pid"; exec bash -c "$2"' bash "$mailbox" "$command") 9<&-
  code=$?
  kill "$!" 2>/dev/null
  wait "$!" 2>/dev/null
  unset FARM_MAILBOX FARM_PROMPT
  bash "$scripts/finish-task.sh" "$code" || leave
}

main "$@"
