#!/usr/bin/env bash
# Usage: . slot-git.sh      sourced by gate-slot.sh, after common.sh; it is never run by itself
# git for gates' slots. It uses slot, here and GIT_DIR, which gate-slot.sh sets.
# Exit: none of its own
# shellcheck disable=SC2154  # they are set by gate-slot.sh

# git in folder $1, without hooks, and with nothing of the user's settings that could hide a change.
git_in() {
  ${box[@]+"${box[@]}"} git --no-replace-objects -C "$1" -c core.hooksPath=/dev/null -c gc.auto=0 \
    -c maintenance.auto=false -c submodule.recurse=false -c core.fsmonitor=false \
    -c core.trustctime=true -c core.untrackedCache=false -c core.checkStat=default \
    -c diff.autoRefreshIndex=true -c worktree.useRelativePaths=false \
    -c core.sparseCheckout=false \
    -c core.filesRefLockTimeout=10000 "${@:2}"
}

# git in the slot, where it runs filters: with care for what an agent may have made of them, or left
# there, for git would wait at a FIFO.
in_slot() {
  local top=${GIT_DIR%/worktrees/*} box=() code=0
  find "$slot" -name '.git*' -type p -exec rm -f {} +
  case ${FARM_ISOLATE:-none} in
    none) ;;
    *)
      find_top "$top"
      box=(bash "$here/../sandbox/tame-filters.sh" slot "$top" "$slot") ;;
  esac
  git_in "$slot" --git-dir="$GIT_DIR" --work-tree="$slot" "$@" || code=$?
  find "$GIT_DIR" ! -type d ! -type f -delete
  return "$code"
}

# Sets top, the farm's checkout.
find_top() { # COMMON
  top=${1%/.git}
  IFS= read -r top 2>/dev/null <"$1/farm/main" || :
}
