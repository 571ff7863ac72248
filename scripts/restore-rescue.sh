#!/usr/bin/env bash
# Usage: restore-rescue.sh [-C REPO] REF DIR
# Writes the files that the rescued work REF added or changed (against its first parent) below DIR,
# which is made when it is missing. Nothing is ever overwritten, deleted or written through a link:
# when one file there differs, or something else is in its place, nothing at all is written.
# Prints one line a file: restored<TAB>path | same<TAB>path, or only the differs<TAB>path of what is
#   in the way.
# Exit: 0 ok, 1 git failed, 2 usage, 3 no such rescue, 4 files in the way
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done
scratch=''

say() { printf '%s\n' "farm: $1" ${2:+"  try: $2"} >&2; } # WHAT [HINT]
fail() { say "$2" "${3-}"; exit "$1"; } # CODE WHAT [HINT]

print_field() { # WORD PATH
  local path=$2
  path=${path//\\/\\\\} path=${path//$'\t'/\\t} path=${path//$'\n'/\\n} path=${path//$'\r'/\\r}
  printf '%s\t%s\n' "$1" "$path"
}

is_same() { # FILE FILE
  if [ -L "$1" ] || [ -L "$2" ]; then
    [ -L "$1" ] && [ -L "$2" ] && [ "$(readlink "$1")" = "$(readlink "$2")" ]
    return
  fi
  [ -f "$1" ] && cmp -s -- "$1" "$2"
}

is_way_free() { # PATH: every folder that it needs below DIR is a folder, or not there yet
  local parent=$1
  while case $parent in */*) ;; *) return 0 ;; esac; do
    parent=${parent%/*}
    if [ -L "$dir/$parent" ] || { [ -e "$dir/$parent" ] && ! [ -d "$dir/$parent" ]; }; then
      return 1
    fi
  done
}

find_base() { # COMMIT -> its first parent, or the empty tree
  git -C "$repo" rev-parse -q --verify "$1^1^{commit}" || git -C "$repo" mktree </dev/null
}

# What a commit added or changed goes below $scratch/files, the names to $scratch/names.
extract() { # COMMIT
  local common
  common=$(git -C "$repo" rev-parse --git-common-dir)
  common=$(cd -- "$repo" && cd -P -- "$common" && pwd -P)
  git -C "$repo" diff-tree -r -z --no-renames --ignore-submodules=all --diff-filter=AMT \
    --name-only "$(find_base "$1")" "$1" >"$scratch/names"
  export GIT_INDEX_FILE=$scratch/index
  git --git-dir="$common" --work-tree="$dir" -C "$dir" read-tree "$1"
  git --git-dir="$common" --work-tree="$dir" -C "$dir" checkout-index -q \
    --prefix="$scratch/files/" -z --stdin <"$scratch/names"
}

check() { # nothing is written when this finds anything in the way
  local path clear=0
  while IFS= read -r -d '' path; do
    if [ -e "$dir/$path" ] || [ -L "$dir/$path" ]; then
      if ! is_same "$scratch/files/$path" "$dir/$path"; then
        print_field differs "$path"
        clear=4
      fi
    elif ! is_way_free "$path"; then print_field differs "$path"; clear=4; fi
  done <"$scratch/names"
  return "$clear"
}

write() {
  local path
  while IFS= read -r -d '' path; do
    if [ -e "$dir/$path" ] || [ -L "$dir/$path" ]; then print_field same "$path"; continue; fi
    case $path in */*) mkdir -p -- "$dir/${path%/*}" ;; esac
    mv -n -- "$scratch/files/$path" "$dir/$path"
    print_field restored "$path"
  done <"$scratch/names"
}

main() {
  local repo=. dir commit option
  while getopts C:h option; do
    case $option in
      C) repo=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ $# -ne 2 ]; then fail 2 'a rescue and a folder are needed' 'restore-rescue.sh -h'; fi
  commit=$(git -C "$repo" rev-parse -q --verify --end-of-options "$1^{commit}") ||
    fail 3 "no rescued work at $1" 'rescue.sh list'
  mkdir -p -- "$2"
  dir=$(cd -P -- "$2" && pwd -P)
  scratch=$(mktemp -d "$dir/.farm-restore.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  extract "$commit"
  check || fail 4 "files in $dir differ from the rescued ones; nothing was written" \
    "rescue.sh restore $1 ANOTHER-FOLDER"
  write
}

main "$@"
