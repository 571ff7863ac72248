#!/usr/bin/env bash
# Usage: find-bad-link.sh TREE <LINKS       lines of `git diff-tree`, one for each new link
# Finds a link to a commit of another repo that no .gitmodules of TREE names, or that no remote of
# that repo has, as far as can be seen here. Called by chain.sh, with GIT_DIR set.
# Prints: the path of the first such link, and what is missing; nothing when all are well
# Exit: 0 looked, 1 git failed
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
# A git dir that an agent has made may say that objects come by a program of its own.
export GIT_ALLOW_PROTOCOL=none GIT_NO_LAZY_FETCH=1

# The name that .gitmodules gives the submodule at a path.
name_of() { # TREE PATH
  git config --blob "$1:.gitmodules" --get-regexp '^submodule\..*\.path$' 2>/dev/null |
    while read -r key value; do
      if [ "$value" = "$2" ]; then key=${key#submodule.}; printf '%s' "${key%.path}"; fi
    done || true
}

# Whether a git dir of that submodule which is there has the commit, and no remote of it has.
# The git dirs are in the repo, in the agents' worktrees, or where those were moved to.
is_only_here() { # NAME PATH SHA
  local module modules there turn pushed=''
  for turn in 1 2; do # twice: start-task.sh may be moving it away just now
    modules=("$GIT_DIR"/modules/"$1" "$GIT_DIR"/worktrees/*/modules/"$1" "$GIT_DIR/../$2/.git")
    for module in "$GIT_DIR"/worktrees/*/gitdir; do
      IFS= read -r there 2>/dev/null <"$module" || continue
      modules+=("${there%.git}$2/.git" "${there%/*/.git}"/kept/*/*/"$2/.git")
    done
    there=''
    for module in "${modules[@]}"; do
      GIT_DIR=$module git cat-file -e "$3" 2>/dev/null || continue
      there=yes
      [ -z "$(GIT_DIR=$module git for-each-ref --count=1 --contains "$3" refs/remotes)" ] ||
        pushed=yes
    done
    if [ "$there$turn" = yes1 ]; then break; fi
  done
  [ "$there" = yes ] && [ -z "$pushed" ]
}

main() {
  local line path sha name
  case ${1-} in -h) usage; exit 0 ;; esac
  [ $# -eq 1 ] || die 1 "a tree is needed" "find-bad-link.sh -h"
  while IFS= read -r line; do
    path=${line#*$'\t'} sha=${line#:* * * } sha=${sha%% *}
    name=$(name_of "$1" "$path")
    case $name:$line in
      ::160000*) continue ;; # one that was there before is not new
      :*) printf '%s is a repo of its own that .gitmodules does not name\n' "$path" ;;
      *)
        is_only_here "$name" "$path" "$sha" || continue
        printf '%s is at %s, which no remote of that submodule has\n' "$path" "${sha:0:10}" ;;
    esac
    return
  done
}
main "$@"
