#!/usr/bin/env bash
# Usage: repo-info.sh [-C REPO]
# Prints what a farm must know of a repo, a fact a line, TSV:
#   main <path of the main worktree> · head <branch that it has checked out, empty when detached> <commit>
#   branches <name>... · shallow yes|no · submodules yes|no
# In fields, backslash, tab, newline and return are written \\ \t \n \r.
# Exit: 0 ok, 2 usage, 3 no repository, or one without commits
set -euo pipefail
export GIT_OPTIONAL_LOCKS=0 LC_ALL=C

die() { printf 'farm: %s\n  try: %s\n' "$2" "$3" >&2; exit "$1"; }

escape() {
  local text=$1
  text=${text//\\/\\\\}; text=${text//$'\t'/\\t}; text=${text//$'\n'/\\n}; text=${text//$'\r'/\\r}
  printf '%s' "$text"
}

main() {
  local repo=. option branch head names
  while getopts C:h option; do
    case $option in
      C) repo=$OPTARG ;;
      h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  git -C "$repo" rev-parse --git-dir >/dev/null 2>&1 || die 3 "$repo is not a git repository" "git init"
  [ "$(git -C "$repo" rev-parse --is-bare-repository)" = false ] ||
    die 3 "$repo is a bare repository, and a farm needs a checkout" "git clone $repo, and work there"
  branch=$(git -C "$repo" symbolic-ref -q --short HEAD) || branch=
  head=$(git -C "$repo" rev-parse -q --verify 'HEAD^{commit}') ||
    die 3 "$repo has no commit yet, and agents start from one" "git commit --allow-empty -m 'first commit'"
  printf 'main\t%s\n' "$(escape "$(git -C "$repo" rev-parse --show-toplevel)")"
  printf 'head\t%s\t%s\n' "$(escape "$branch")" "$head"
  names=$(git -C "$repo" for-each-ref --format='%(refname:lstrip=2)' refs/heads/ | grep -v '^farm/' | sed 's/\\/\\\\/g' | tr '\n' '\t') || names=
  printf 'branches\t%s\n' "${names%$'\t'}"
  printf 'shallow\t%s\n' "$([ "$(git -C "$repo" rev-parse --is-shallow-repository)" = true ] && echo yes || echo no)"
  printf 'submodules\t%s\n' "$([ -e "$repo/.gitmodules" ] && echo yes || echo no)"
}

main "$@"
