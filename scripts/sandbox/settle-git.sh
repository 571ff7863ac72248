#!/usr/bin/env bash
# Usage: . settle-git.sh     sourced by confine.sh for its `tree`; it is never run by itself
# settle_git, which makes what an agent can write of git's own folders such as git outside of a
# sandbox can work with. It uses repo, folder and agent, which confine.sh sets.
# Exit: none of its own
# shellcheck disable=SC2154  # they are set by confine.sh

# What an agent can leave in its own part of git, and git outside would follow or wait for: links,
# FIFOs, a branch that is a symbolic ref to another.
settle_git() {
  local entry='' common ref
  IFS= read -r entry <"$folder/.git" && entry=${entry#gitdir: } common=${entry%/worktrees/*}
  [ "$common" != "$entry" ] || return 0
  find "$entry" "$common/refs/heads/farm/$agent" "$common/logs/refs/heads/farm/$agent" \
    ! -type d ! -type f -exec rm -f {} + 2>/dev/null
  { grep -rl '^ref:' "$common/refs/heads/farm/$agent" 2>/dev/null || :; } |
    while IFS= read -r ref; do
      ref=${ref#"$common"/}
      git -C "$repo" -c core.hooksPath=/dev/null update-ref --no-deref "$ref" \
        "$(git -C "$repo" rev-parse -q --verify "$ref")" || rm -f "$common/$ref"
    done
}
