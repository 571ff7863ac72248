#!/usr/bin/env bash
# Usage: settle-git.sh WORKTREE ENTRY AGENT COMMAND [ARGUMENT]...
# Removes from the agent's own part of git what git outside of a sandbox would follow or wait for:
# links, FIFOs, a branch that is a symbolic ref to another; and from WORKTREE a .gitattributes or
# .gitignore that is a FIFO. Then it runs COMMAND.
# confine.sh runs it within the sandbox of its `tree` and `slot`: whatever the names there lead to,
# it can touch nothing that the agent could not.
# Exit: COMMAND's own, 2 usage
set -uo pipefail

main() {
  local tree=${1-} entry=${2-} agent=${3-} common ref
  if [ "$tree" = -h ]; then sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0; fi
  [ $# -ge 4 ] || exit 2
  shift 3
  common=${entry%/worktrees/*}
  find "$tree" -name '.git*' -type p -delete 2>/dev/null
  find "$entry" "$common/refs/heads/farm/$agent" "$common/logs/refs/heads/farm/$agent" \
    ! -type d ! -type f -delete 2>/dev/null
  { grep -rlZ '^ref:' "$common/refs/heads/farm/$agent" 2>/dev/null || :; } |
    while IFS= read -r -d '' ref; do
      ref=${ref#"$common"/}
      git --git-dir="$common" -c core.hooksPath=/dev/null update-ref --no-deref "$ref" \
        "$(git --git-dir="$common" rev-parse -q --verify "$ref")" || rm -f "$common/$ref"
    done
  exec "$@"
}
main "$@"
