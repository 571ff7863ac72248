#!/usr/bin/env bash
# Usage: repo-info.sh [-C REPO]
# Prints what a farm must know of a repo, a fact a line, TSV:
#   main <path of the main worktree>
#   head <branch that it has checked out, empty when detached> <commit>
#   identity <user.name> <user.email>
#   obstacles <branch>... that stand where the farm's own would be
#   blocking <ref>... where its pins would be
#   branches <name>... · shallow yes|no · submodules yes|no
# In fields, backslash, tab, newline and return are written \\ \t \n \r.
# Exit: 0 ok, 2 usage, 3 no repository, or one without commits
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
export GIT_OPTIONAL_LOCKS=0 LC_ALL=C

# Sets top and shallow, by one git.
find_place() { # REPO
  local facts
  facts=$(git -C "$1" rev-parse --is-bare-repository --is-shallow-repository --show-toplevel \
    2>/dev/null) || :
  case $facts in
    true*)
      die 3 "$1 is a bare repository, and a farm needs a checkout" "git clone $1, and work there" ;;
    false*) facts=${facts#*$'\n'} ;;
    *)
      facts=$(git -C "$1" rev-parse --git-dir 2>&1) || :
      die 3 "$1: ${facts#fatal: }" "git -C $1 status" ;;
  esac
  shallow=${facts%%$'\n'*} top=${facts#*$'\n'}
}

is_one_of_ours() { # BRANCH
  case $1 in
    farm | farm/agent-[0-9][0-9][0-9] | farm/agent-[0-9][0-9][0-9]/*/*) ;;
    *) return 1 ;;
  esac
}

# A ref is a file: a branch `farm` leaves no room for branches below it, and one below a task's
# takes its place. Where files have no case, neither have they.
is_in_the_way() { # BRANCH
  is_one_of_ours "$1" && return
  shopt -s nocasematch
  if is_one_of_ours "$1"; then
    ignores_case=${ignores_case:-$(git -C "$repo" config --type=bool core.ignorecase)} || :
  else
    set --
  fi
  shopt -u nocasematch
  [ -n "${1-}" ] && [ "$ignores_case" = true ]
}

# Sets blocking: refs that leave no room for the farm's pins.
find_blocking() { # REPO
  local name kind list
  list=$(printf '%s\n' refs/farm refs/farm/ready refs/farm/returned refs/farm/rescue |
    git -C "$1" cat-file --batch-check='%(objectname)')
  for name in refs/farm refs/farm/ready refs/farm/returned refs/farm/rescue; do
    kind=${list%%$'\n'*} list=${list#*$'\n'}
    case $kind in *' missing') ;; *) blocking=$blocking$'\t'$name ;; esac
  done
}

# Sets branch and head, which is checked out, and names, which are all branches but the farm's own;
# by one git, nearly always.
find_branches() { # REPO
  local mark sha name list escaped
  local form='%(if)%(HEAD)%(then)*%(else)-%(end) %(objectname) %(refname:lstrip=2)'
  list=$(git -C "$1" for-each-ref --format="$form" refs/heads/)
  while IFS=' ' read -r mark sha name; do
    if [ -z "$name" ]; then continue; fi
    if [ "$mark" = '*' ]; then branch=$name head=$sha; fi
    escape "$name"
    if is_in_the_way "$name"; then obstacles=$obstacles$'\t'$escaped; fi
    case $name in farm/*) ;; *) names=$names$'\t'$escaped ;; esac
  done <<<"$list"
  if [ -z "$head" ]; then
    head=$(git -C "$1" rev-parse -q --verify 'HEAD^{commit}') ||
      die 3 "$1 has no commit yet, and agents start from one" \
        "git commit --allow-empty -m 'first commit'"
  fi
}

# A line: WORD and the fields, escaped.
print_row() { # WORD FIELD...
  local escaped field
  printf '%s' "$1"
  for field in "${@:2}"; do
    escape "$field"
    printf '\t%s' "$escaped"
  done
  printf '\n'
}

main() {
  local repo=. option top='' shallow='' branch='' head='' names='' obstacles='' blocking=''
  local ignores_case='' submodules=no
  while getopts C:h option; do
    case $option in
      C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  find_place "$repo"
  find_branches "$repo"
  find_blocking "$repo"
  if [ -e "$repo/.gitmodules" ]; then submodules=yes; fi
  case $shallow in true) shallow=yes ;; *) shallow=no ;; esac
  print_row identity "$(git -C "$repo" config user.name || :)" \
    "$(git -C "$repo" config user.email || :)"
  print_row main "$top"
  printf 'obstacles%s\nblocking%s\n' "${obstacles:-$'\t'}" "${blocking:-$'\t'}"
  print_row head "$branch" "$head"
  printf 'branches%s\n' "${names:-$'\t'}"
  print_row shallow "$shallow"
  print_row submodules "$submodules"
}
main "$@"
