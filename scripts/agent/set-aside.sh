#!/usr/bin/env bash
# Usage: . set-aside.sh      sourced by setup-worktree.sh; it is never run by itself
# set_aside, for its -u and -o. It works on main, list, mark and old, and on as_lines, is_as_it_came
# and say, which are setup-worktree.sh's.
# Exit: none of its own; set_aside returns 1 when something could not be moved
# shellcheck disable=SC2154  # they are set by setup-worktree.sh

# What has gone from the main worktree goes from here too, as far as git: nothing that may be the
# last copy is deleted.
set_aside() { # PATH
  local file
  as_lines <"$list" >"$list.new"
  awk 'pass == 1 { have[$0]; next } !($0 in have)' pass=1 "$list.new" pass=2 "$old" |
    tr '\n\1' '\0\n' >"$list.gone"
  if ! [ -s "$list.gone" ]; then return; fi
  git -C "$1" check-ignore -z --stdin <"$list.gone" >"$list.new" || [ $? -eq 1 ] || return 1
  while IFS= read -r -d '' file; do
    if { ! [ -f "$1/$file" ] && ! [ -L "$1/$file" ]; } || ! is_as_it_came "$1" "$file"; then
      continue
    fi
    mkdir -p -- "$(dirname -- "$mark-before/$file")" && mv -f -- "$1/$file" "$mark-before/$file" ||
      return 1
    say "$file is no longer there in $main, and was moved from $1" "ls $mark-before"
  done <"$list.new"
}
