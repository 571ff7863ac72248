#!/usr/bin/env bash
# Usage: run-task.sh 9<>BELL     (with the FARM_* that run-agent.sh and the claim have set)
# One attempt: a fresh branch, the agent's command by `bash -c` in the worktree (FARM_AGENT_RESUME
# for a conversation that goes on), and `farm finish`, which says and does what becomes of its work.
# Meanwhile it answers the bell: makes the moves that a sandboxed agent asks for, and ends a CLI
# whose turn is over, which would wait for a person for ever. `farm` is in PATH.
# Exit: 0 the attempt is over, 2 usage, 3 what is wrong here is wrong for every task (this one is
#   given back)
set -uo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"
unset GIT_NO_REPLACE_OBJECTS # agents see what the repo's people see

if [ "${1-}" = -h ]; then usage; exit 0; fi
mailbox=$FARM_REPO/coordination/mailbox/$FARM_AGENT_NAME

# The loop ends this session's run, mends the worktree and starts it again.
leave() {
  farm release "$FARM_AGENT_NAME" --fence "$FARM_FENCE"
  exit 3
}

# What this attempt has printed, the end of it: a log that is shorter now was begun anew meanwhile.
size_of_log() {
  wc -c <"$FARM_REPO/coordination/logs/$FARM_AGENT_NAME.log" 2>/dev/null || printf 0
}

read_log() {
  local now
  now=$(size_of_log)
  if [ "$now" -lt "$log_start" ]; then log_start=0; fi
  tail -c "+$((log_start + 1))" "$FARM_REPO/coordination/logs/$FARM_AGENT_NAME.log" 2>/dev/null |
    tail -c 20000 || : # it is there once something was printed
}

# What is printed reaches the log by way of tmux and a process of its own, a little later. In a
# session that is waited for, a second at most.
await_log() { # the LINE that was printed last
  local turn
  [ -t 2 ] || return 0
  for ((turn = 0; turn < 50; turn++)); do
    case $(read_log) in *"$1"*) return ;; esac
    sleep 0.02
  done
}

# Sets sandbox: what goes before a command that works in the worktree.
set_sandbox() { # KIND
  sandbox=()
  case ${FARM_ISOLATE:-none} in
    none) ;;
    *) sandbox=(bash "$here/../sandbox/confine.sh" "$1" "$FARM_REPO" "$FARM_WORKTREE") ;;
  esac
}

prepare_branch() {
  local row sandbox
  set_sandbox tree
  # shellcheck disable=SC2153  # FARM_TASK comes with the claim
  row=$(${sandbox[@]+"${sandbox[@]}"} bash "$here/start-task.sh" -a "$FARM_AGENT_NAME" \
    -t "$FARM_TASK" -b "$FARM_TARGET" -s "${FARM_START:-}" ${FARM_RESUME:+-k} \
    "$FARM_WORKTREE") || return 1
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

# Requests may come faster than they are answered: the farm's own word is not kept waiting by them.
serve_mailbox() {
  local word asked
  unset FARM_MAILBOX
  while read -r word <&9; do
    asked=''
    hear "$word"
    while read -r -t 0 <&9 && read -r word <&9 && [ "${#asked}" -lt 1000 ]; do hear "$word"; done
    [ -z "$asked" ] || farm answer "$FARM_AGENT_NAME"
  done
}

# `over FENCE` (`kill FENCE`: at once) may come late, when the next task has begun.
hear() { # WORD
  case $1 in
    request) asked=$asked. ;;
    "over $FARM_FENCE") end_cli 10 ;;
    "kill $FARM_FENCE") end_cli 0 ;;
  esac
}

# Only what this has started itself, whatever an agent has written there.
end_cli() { # SECONDS
  local pid=''
  IFS= read -r -t 1 pid 2>/dev/null <"$mailbox/pid" || :
  case $pid in '' | *[!0-9]*) return 0 ;; esac
  if [ "$(ps -o ppid= -p "$pid")" -eq $$ ]; then
    bash "$here/end-tree.sh" ${sandbox[@]+-k} -s "$1" "$pid"
  fi
}

# A sandboxed agent may leave there what blocks its reader or leads elsewhere.
tidy_mailbox() {
  if [ -z "${FARM_SANDBOXED:-}" ]; then return; fi
  find "$mailbox" -mindepth 1 ! -name bell \( ! -type f -o -size +524288 \) -prune -exec rm -rf {} +
}

main() {
  local code command=$FARM_AGENT log_start sandbox=()
  say "$FARM_AGENT_NAME works on $FARM_TASK: $FARM_TITLE"
  prepare_branch || leave
  export FARM_OUTPUT=$mailbox/output GIT_MERGE_AUTOEDIT=no # nobody sits at a merge's editor
  tidy_mailbox
  [ -z "${FARM_SANDBOXED:-}" ] || export FARM_MAILBOX=$mailbox
  [ -z "${FARM_PRESET:-}" ] || prepare_cli
  [ -z "${FARM_RESUME:-}" ] || command=$FARM_AGENT_RESUME
  rm -f "$mailbox/pid" "$mailbox"/*.request "$mailbox"/*.answer # nobody waits for these any more
  set_sandbox agent
  log_start=$(size_of_log)
  serve_mailbox &
  # The CLI takes the place of the inner bash, whose pid is in the mailbox.
  # shellcheck disable=SC2016  # the inner bash expands it
  (cd "$FARM_WORKTREE" &&
    exec bash -c 'printf "%s\n" "$$" >"$1/pid"; exec "${@:2}"' bash "$mailbox" \
      ${sandbox[@]+"${sandbox[@]}"} ${FARM_BASH_ENV:+env "BASH_ENV=$FARM_BASH_ENV"} \
      bash -c "$command") 9<&-
  code=$?
  kill "$!" 2>/dev/null
  wait "$!" 2>/dev/null
  tidy_mailbox
  unset FARM_MAILBOX FARM_PROMPT
  say "$FARM_FENCE ended with exit code $code"
  await_log "farm: $FARM_FENCE ended"
  read_log | sed "/^farm: $FARM_FENCE ended/d" |
    farm finish "$FARM_AGENT_NAME" --fence "$FARM_FENCE" --code "$code" || leave
}

main "$@"
