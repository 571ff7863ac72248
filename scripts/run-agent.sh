#!/usr/bin/env bash
# Usage: FARM_AGENT_NAME=agent-001 FARM_WORKTREE=DIR FARM_REPO=DIR FARM_HOME=DIR
#          FARM_AGENT=COMMAND FARM_TARGET=BRANCH run-agent.sh
# What runs in every session: claim a task, work on it by agent/run-task.sh, again. Without a task
# it waits for its bell, a FIFO, mailbox/AGENT/bell below coordination/. Where FARM_AGENT_HOME names
# a folder, HOME is a copy of it, made once. It may lie anywhere; the farm is that of FARM_HOME.
# Exit: 0 the farm is stopping, or the session is to start anew (mailbox/AGENT/renew), 2 usage,
#   3 its worktree is gone or broken
set -uo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done

if [ "${1-}" = -h ]; then sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0; fi
if [ ! -e "${FARM_HOME-}/farm.py" ]; then
  printf 'farm: FARM_HOME has to name the folder of farm.py\n  try: run-agent.sh -h\n' >&2
  exit 2
fi
scripts=$FARM_HOME/scripts
# shellcheck disable=SC2153  # FARM_AGENT_NAME and FARM_AGENT_HOME are two
mailbox=$FARM_REPO/coordination/mailbox/$FARM_AGENT_NAME
export PATH="$scripts:$PATH" GIT_TERMINAL_PROMPT=0 \
  TMPDIR=${FARM_WORKTREES:-$FARM_WORKTREE}/tmp/$FARM_AGENT_NAME
# What an agent has committed outlives a power cut: git's default leaves new objects to the file
# system.
export GIT_CONFIG_COUNT=5 GIT_CONFIG_KEY_4=core.fsync GIT_CONFIG_VALUE_4=committed
export GIT_CONFIG_KEY_0=gc.auto GIT_CONFIG_VALUE_0=0
export GIT_CONFIG_KEY_1=maintenance.auto GIT_CONFIG_VALUE_1=false
export GIT_CONFIG_KEY_2=core.filesRefLockTimeout GIT_CONFIG_VALUE_2=10000
export GIT_CONFIG_KEY_3=core.packedRefsTimeout GIT_CONFIG_VALUE_3=30000

# Fifty of these start at once: no process that is not needed.
read -r FARM_SESSION 2>/dev/null </proc/sys/kernel/random/uuid ||
  FARM_SESSION=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
export FARM_SESSION FARM_OWNER_PID=$$ # what it claims and locks is this process's

say() { printf '%s\n' "farm: $*" >&2; }

open_bell() {
  if [ ! -d "$mailbox" ] || [ ! -d "$TMPDIR" ]; then mkdir -p "$mailbox" "$TMPDIR"; fi
  if [ -L "$mailbox/bell" ] || { [ -e "$mailbox/bell" ] && [ ! -p "$mailbox/bell" ]; }; then
    rm -rf "$mailbox/bell"
  fi
  [ -p "$mailbox/bell" ] || mkfifo "$mailbox/bell"
  exec 9<>"$mailbox/bell"
}

# Waits for the bell. In case no loop runs that could ring, it looks by itself when something has
# happened since the last look, or after ROUNDS.
wait_for_bell() { # SECONDS-A-ROUND ROUNDS
  local rounds=1
  until read -r -t "$1" <&9 || [ "$FARM_REPO/coordination/events.jsonl" -nt "$mailbox/looked" ] ||
    [ "$rounds" -ge "$2" ]; do
    rounds=$((rounds + 1))
  done
  while read -r -t 0 <&9 && read -r -t 1 <&9; do :; done
}

# Puts the claim's FARM_* lines into the environment; 1 when there is no task, 3 when the farm is
# stopping, 4 when there was no answer.
claim_task() {
  local lines line code
  : >"$mailbox/looked"
  if is_stopping; then return 3; fi
  if has_no_task; then return 1; fi
  lines=$(farm claim "$FARM_AGENT_NAME" --env 2>"$mailbox/claim.err")
  code=$?
  if [ "$code" -ne 0 ] && is_stopping; then return 3; fi
  case $code in 0) ;; 3) return 1 ;; *) return 4 ;; esac
  while IFS= read -r line; do export "${line?}"; done <<<"$lines"
}

is_stopping() { # without a process: fifty ask at once
  local text=''
  IFS= read -r -d '' text 2>/dev/null <"$FARM_REPO/coordination/farm.json" || :
  [[ $text == *'"mode": "stopping"'* ]]
}

# Nothing waits, and nobody holds what a dead one may have left. In any other form of the file, as
# a person may have written it, farm.py has to look.
has_no_task() {
  local text='' lock
  for lock in "$FARM_REPO"/coordination/agent_locks/*.lock; do [ ! -e "$lock" ] || return 1; done
  IFS= read -r -d '' -n 200 text 2>/dev/null <"$FARM_REPO/coordination/task_queue/pending.json" || :
  [[ $text == *'"tasks": []'* ]]
}

# What another task has left in TMPDIR is not this one's business, and would fill the disk in time.
# A conversation that goes on may still need it.
clear_temp() {
  if [ -n "${FARM_RESUME:-}" ] || [ -z "${FARM_WORKTREES:-}" ] || [ -L "$TMPDIR" ]; then return; fi
  rm -rf "$TMPDIR" 2>/dev/null ||
    { find "$TMPDIR" -type d -exec chmod u+rwx {} + && rm -rf "$TMPDIR"; } ||
    say "what is left in $TMPDIR cannot be removed"
  mkdir -p "$TMPDIR"
}

use_own_home() {
  local home=${FARM_WORKTREES:-$FARM_WORKTREE}/homes/$FARM_AGENT_NAME
  FARM_USER_HOME=$(cd -P -- "$HOME" && pwd) && export FARM_USER_HOME
  if [ ! -d "$home" ]; then
    rm -rf "$home.new" && mkdir -p "$home.new" && cp -Rp "$FARM_AGENT_HOME/." "$home.new" &&
      mv "$home.new" "$home" || return 1
  fi
  export HOME=$home
}

main() {
  local number
  [ -z "${FARM_AGENT_HOME:-}" ] || use_own_home || exit 3
  open_bell
  number=${FARM_AGENT_NAME##*[!0-9]}
  export FARM_PORT=$((${FARM_PORTS:-10000} + 100 + 10#${number:-0} % 900))
  while [ -d "$FARM_WORKTREE" ]; do
    if [ -e "$mailbox/renew" ]; then # another environment since: the loop starts this anew
      rm -f "$mailbox/renew"
      exit 0
    fi
    claim_task
    case $? in
      0) clear_temp; bash "$scripts/agent/run-task.sh" || exit ;;
      3) exit 0 ;;
      4) wait_for_bell 5 1 ;;
      *) wait_for_bell 30 10 ;;
    esac
  done
  say "the worktree $FARM_WORKTREE is gone"
  exit 3
}

main "$@"
