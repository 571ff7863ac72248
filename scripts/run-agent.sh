#!/usr/bin/env bash
# Usage: FARM_AGENT_NAME=agent-001 FARM_WORKTREE=DIR FARM_REPO=DIR FARM_HOME=DIR FARM_AGENT=COMMAND FARM_TARGET=BRANCH run-agent.sh
# What runs in every session: claim a task, a fresh branch, the agent's command, submit or fail, again.
# The command runs by `bash -c` in the worktree (FARM_AGENT_RESUME for a conversation that goes on); finish-task.sh says what becomes of its work. Without a task it waits for its bell, mailbox/AGENT/bell below coordination/.
# Exit: 0 the farm is stopping, 2 usage, 3 its worktree is gone or broken
set -uo pipefail

scripts=$FARM_HOME/scripts
# shellcheck disable=SC2153  # FARM_AGENT_NAME and FARM_AGENT_HOME are two
mailbox=$FARM_REPO/coordination/mailbox/$FARM_AGENT_NAME
export PATH="$scripts:$PATH" GIT_TERMINAL_PROMPT=0 TMPDIR=${FARM_WORKTREES:-$FARM_WORKTREE}/tmp/$FARM_AGENT_NAME
export GIT_CONFIG_COUNT=4 GIT_CONFIG_KEY_0=gc.auto GIT_CONFIG_VALUE_0=0 GIT_CONFIG_KEY_1=maintenance.auto GIT_CONFIG_VALUE_1=false \
  GIT_CONFIG_KEY_2=core.filesRefLockTimeout GIT_CONFIG_VALUE_2=10000 GIT_CONFIG_KEY_3=core.packedRefsTimeout GIT_CONFIG_VALUE_3=30000

FARM_SESSION=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
export FARM_SESSION

# Where FARM_AGENT_HOME names a folder, each agent has a copy of it as its own HOME, made once.
if [ -n "${FARM_AGENT_HOME:-}" ]; then
  home=${FARM_WORKTREES:-$FARM_WORKTREE}/homes/$FARM_AGENT_NAME
  if [ ! -d "$home" ]; then
    rm -rf "$home.new" && mkdir -p "$home.new" && cp -Rp "$FARM_AGENT_HOME/." "$home.new" && mv "$home.new" "$home" || exit 3
  fi
  export HOME=$home
fi

say() { printf '%s\n' "farm: $*" >&2; }

open_bell() {
  mkdir -p "$mailbox" "$TMPDIR"
  [ -p "$mailbox/bell" ] || { rm -f "$mailbox/bell"; mkfifo "$mailbox/bell"; }
  exec 9<>"$mailbox/bell"
}

# Waits for the bell. In case no loop runs that could ring, it looks by itself when something has happened, or after five minutes.
wait_for_bell() {
  local rounds=0
  : >"$mailbox/looked"
  until read -r -t 30 <&9 || [ "$FARM_REPO/coordination/events.jsonl" -nt "$mailbox/looked" ] || [ "$rounds" -ge 10 ]; do
    rounds=$((rounds + 1))
  done
  while read -r -t 0 <&9 && read -r -t 1 <&9; do :; done
}

# Puts the claim's FARM_* lines into the environment; 1 when there is no task, 3 when the farm is stopping.
claim_task() {
  local lines line
  lines=$(farm claim "$FARM_AGENT_NAME" --env 2>"$mailbox/claim.err") || { is_stopping && return 3; return 1; }
  while IFS= read -r line; do export "${line?}"; done <<<"$lines"
}

is_stopping() { grep -q '"mode": "stopping"' "$FARM_REPO/coordination/farm.json" 2>/dev/null; }

prepare_branch() {
  local row
  # shellcheck disable=SC2153  # FARM_TASK comes from the claim's lines
  row=$(bash "$scripts/start-task.sh" -a "$FARM_AGENT_NAME" -t "$FARM_TASK" -b "$FARM_TARGET" -s "${FARM_START:-}" ${FARM_RESUME:+-k} "$FARM_WORKTREE") || return 1
  row=${row#*$'\t'}
  export FARM_BASE=${row%%$'\t'*}
}

# What is wrong here is wrong for every task: give this one back and end the session, the loop mends and starts it again.
leave() {
  farm release "$FARM_AGENT_NAME" --fence "$FARM_FENCE"
  exit 3
}

# The prompt as one argument. The kernel takes 128 KiB at most, so that a long one is only named.
read_prompt() {
  if [ "$(wc -c <"$FARM_PROMPT_FILE")" -le 100000 ]; then cat "$FARM_PROMPT_FILE"; else printf 'Your task is in the file %s: read all of it first.' "$FARM_PROMPT_FILE"; fi
}

run_task() {
  local code command=$FARM_AGENT
  say "$FARM_AGENT_NAME works on $FARM_TASK: $FARM_TITLE"
  prepare_branch || leave
  [ -z "${FARM_SANDBOXED:-}" ] || export FARM_MAILBOX=$mailbox
  [ -z "${FARM_RESUME:-}" ] || command=$FARM_AGENT_RESUME
  export FARM_OUTPUT=$mailbox/output
  if [ -n "${FARM_PRESET:-}" ]; then
    FARM_PROMPT=$(read_prompt)
    FARM_GIT_DIR=$(git -C "$FARM_WORKTREE" rev-parse --absolute-git-dir)
    export FARM_PROMPT FARM_GIT_DIR FARM_GIT=${FARM_GIT_DIR%/worktrees/*}
    : >"$FARM_OUTPUT"
  fi
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

# While an agent works: make the moves that a sandboxed one asks for, and end a CLI whose turn is over, which would wait for a person for ever.
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
  local number
  case ${1:-} in -h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;; esac
  open_bell
  number=${FARM_AGENT_NAME##*[!0-9]}
  export FARM_PORT=$((${FARM_PORTS:-10000} + 100 + 10#${number:-0} % 900))
  while [ -d "$FARM_WORKTREE" ]; do
    claim_task
    case $? in
      0) run_task ;;
      3) exit 0 ;;
      *) wait_for_bell ;;
    esac
  done
  say "the worktree $FARM_WORKTREE is gone"
  exit 3
}

main "$@"
