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

escape() { # TEXT -> sets escaped
  escaped=${1//\\/\\\\} escaped=${escaped//$'\t'/\\t} escaped=${escaped//$'\n'/\\n} escaped=${escaped//$'\r'/\\r}
}

# Sets top and shallow, by one git.
find_place() {
  local facts
  facts=$(git -C "$1" rev-parse --is-bare-repository --is-shallow-repository --show-toplevel 2>/dev/null) || :
  case $facts in
    true*) die 3 "$1 is a bare repository, and a farm needs a checkout" "git clone $1, and work there" ;;
    false*) facts=${facts#*$'\n'} ;;
    *) die 3 "$1 is not a git repository" "git init" ;;
  esac
  shallow=${facts%%$'\n'*} top=${facts#*$'\n'}
}

# Sets branch and head, which is checked out, and names, which are all branches but the farm's own; by one git, nearly always.
find_branches() {
  local mark sha name
  while IFS=' ' read -r mark sha name; do
    if [ "$mark" = '*' ]; then branch=$name head=$sha; fi
    case $name in farm/*) ;; *) escape "$name"; names=$names$'\t'$escaped ;; esac
  done < <(git -C "$1" for-each-ref --format='%(if)%(HEAD)%(then)*%(else)-%(end) %(objectname) %(refname:lstrip=2)' refs/heads/)
  if [ -z "$head" ]; then
    head=$(git -C "$1" rev-parse -q --verify 'HEAD^{commit}') ||
      die 3 "$1 has no commit yet, and agents start from one" "git commit --allow-empty -m 'first commit'"
  fi
}

main() {
  local repo=. option escaped='' top='' shallow='' branch='' head='' names='' submodules=no
  while getopts C:h option; do
    case $option in
      C) repo=$OPTARG ;;
      h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  find_place "$repo"
  find_branches "$repo"
  if [ -e "$repo/.gitmodules" ]; then submodules=yes; fi
  case $shallow in true) shallow=yes ;; *) shallow=no ;; esac
  escape "$top"
  printf 'main\t%s\n' "$escaped"
  escape "$branch"
  printf 'head\t%s\t%s\nbranches%s\nshallow\t%s\nsubmodules\t%s\n' "$escaped" "$head" "${names:-$'\t'}" "$shallow" "$submodules"
}

main "$@"
