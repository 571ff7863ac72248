#!/usr/bin/env bash
# Usage: FARM_REPO=DIR FARM_AGENT=COMMAND make-plan.sh FOLDER COMMIT <PROMPT
# Runs an agent once in a worktree of its own, FOLDER, at COMMIT, and prints the PLAN.md that it has
# written there; whatever else it has done goes with the worktree. What it says itself goes to
# coordination/mailbox/plan/output. Its processes are found by FARM_SLOT. It runs in the sandbox
# that FARM_ISOLATE names.
# Above it: sandbox/confine.sh
# Exit: 0 ok, 1 it has written none, 2 usage
set -uo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"
unset GIT_NO_REPLACE_OBJECTS # agents see what the repo's people see

if [ "${1-}" = -h ]; then usage; exit 0; fi
[ $# -eq 2 ] || die 2 "a folder and a commit are needed" "make-plan.sh -h"
mailbox=$FARM_REPO/coordination/mailbox/plan code=0
mkdir -p "$mailbox" && cat >"$mailbox/prompt.md" || exit 1
"$here/../merge/gate-slot.sh" prepare -C "$FARM_REPO" "$1" "$2" >/dev/null || exit 1
FARM_GIT_DIR=$(git -C "$1" rev-parse --absolute-git-dir) || exit 1
FARM_PROMPT=$(cat "$mailbox/prompt.md")
own=${1##*/} TMPDIR=${1%/*}/tmp/${1##*/}
mkdir -p "$TMPDIR" "$FARM_REPO/coordination/mailbox/$own" || exit 1
: >"$FARM_REPO/coordination/mailbox/$own/pid"
export FARM_AGENT_NAME=$own FARM_SLOT=$1 FARM_OUTPUT=$TMPDIR/output FARM_PROMPT TMPDIR \
  FARM_PROMPT_FILE=$mailbox/prompt.md FARM_GIT_DIR FARM_GIT=${FARM_GIT_DIR%/worktrees/*}
(cd "$1" && exec bash "$here/../sandbox/confine.sh" agent "$FARM_REPO" "$1" \
  ${FARM_BASH_ENV:+env "BASH_ENV=$FARM_BASH_ENV"} bash -c "$FARM_AGENT") </dev/null \
  >"$mailbox/said" 2>&1 || code=$?
[ -s "$FARM_OUTPUT" ] || FARM_OUTPUT=$mailbox/said
[ -L "$FARM_OUTPUT" ] || cp "$FARM_OUTPUT" "$mailbox/output"
rm -rf "$TMPDIR" "$FARM_REPO/coordination/mailbox/$own"
if [ ! -f "$1/PLAN.md" ] || [ -L "$1/PLAN.md" ]; then
  die 1 "the agent wrote no PLAN.md, and ended with exit code $code" "cat $mailbox/output"
fi
cat "$1/PLAN.md"
