#!/usr/bin/env bash
# Usage: . enter-scope.sh     sourced by confine.sh; it is never run by itself
# enter_scope ARGUMENT..., which starts confine.sh anew in a scope of systemd where the user has one
# and an agent has limits: FARM_AGENT_MEMORY_MIB, FARM_AGENT_PROCESSES. A scope counts what no sum
# of the processes' sizes shows: files in memory. Elsewhere it does nothing, and the loop looks.
# Exit: none of its own, but systemd-run's where that fails

enter_scope() {
  local limits=()
  [ "$1" = agent ] && [ -z "${FARM_IN_SCOPE-}" ] || return 0
  [ "${FARM_AGENT_MEMORY_MIB:-0}" = 0 ] ||
    limits=(-p "MemoryMax=${FARM_AGENT_MEMORY_MIB}M" -p MemorySwapMax=0)
  [ "${FARM_AGENT_PROCESSES:-0}" = 0 ] || limits+=(-p "TasksMax=$FARM_AGENT_PROCESSES")
  [ ${#limits[@]} -gt 0 ] && [ -S "${XDG_RUNTIME_DIR:-/none}/systemd/private" ] &&
    command -v systemd-run >/dev/null || return 0
  FARM_IN_SCOPE=1 exec systemd-run --user --scope --quiet --collect "${limits[@]}" bash "$0" "$@"
}
