#!/usr/bin/env bash
# Usage: git merge-tree --write-tree -z --name-only OURS THEIRS |
#          read-conflict.sh VERB OURS THEIRS OUR_NAME THEIR_NAME [BASE]
#   paths   prints the conflicted paths, space separated (\\ \t \n \r \x20 escaped)
#   cause   prints the Farm-Task of the latest commit of BASE..OURS that touches one of them, else
#       of the last commit
#   text    prints, for people, messages and hunks with the shas replaced by the names, at most 200
#       lines
# Environment: FARM_CONFLICTS=DIR, where paths and cause put the text too, as THEIR_NAME.txt
# Exit: 0 ok, 1 git failed, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
export LC_ALL=C

# Where a folder is in a file's way git names the file PATH~COMMIT; that name is in neither commit.
read_paths() {
  local path
  IFS= read -r -d '' tree
  while IFS= read -r -d '' path && [ -n "$path" ]; do
    names[${#names[@]}]=$path
    path=${path%"~$1"} path=${path%"~$2"}
    paths[${#paths[@]}]=${path%"~HEAD"}
  done
}

print_paths() {
  local text escaped blank='\x20' separator=
  for text in "${paths[@]}"; do
    escape "$text"
    printf '%s%s' "$separator" "${escaped// /"$blank"}"
    separator=' '
  done
}

# Where a rename hides who it was, the last entry it is.
print_cause() {
  local commit
  commit=$(git --literal-pathspecs rev-list --first-parent -1 "$5..$1" -- "${paths[@]:0:500}")
  git log -1 --format='%(trailers:key=Farm-Task,valueonly,separator=%x2C)' "${commit:-$1}" |
    tr -d '\n'
}

# Messages come as: a count, that many paths, a kind, the text.
print_messages() {
  local count text
  while IFS= read -r -d '' count; do
    while [ "$count" -ge 0 ] && IFS= read -r -d '' text; do count=$((count - 1)); done
    IFS= read -r -d '' text || true
    case $text in Auto-merging*) ;; *) printf '%s' "$text" ;; esac
  done
}

print_hunks() {
  local name
  for name in "${names[@]:0:40}"; do
    git cat-file blob "$tree:$name" 2>/dev/null | name=$name awk '
      /^<<<<<<< / { if (!on++) print "\n--- " ENVIRON["name"] }
      /^<<<<<<< /, /^>>>>>>> /' || true
  done
}

print_text() {
  local ours=${3//[^A-Za-z0-9 ._-]/?} theirs=${4//[^A-Za-z0-9 ._-]/?}
  { print_messages && print_hunks; } |
    sed -e "s/$1/$ours/g" -e "s/$2/$theirs/g" -e "s/^<<<<<<< HEAD/<<<<<<< $ours/" | awk 'NR <= 200'
}

main() {
  local verb=${1-} tree='' paths=() names=()
  case $verb:$# in
    -h:*) usage; exit 0 ;;
    paths:[56] | text:[56] | cause:6) ;;
    *) die 2 "a verb, two commits and their names are needed" "read-conflict.sh -h" ;;
  esac
  shift
  read_paths "$1" "$2"
  if [ -n "${FARM_CONFLICTS-}" ] && [ "$verb" != text ]; then
    mkdir -p "$FARM_CONFLICTS"
    print_text "$@" >"$FARM_CONFLICTS/${4//\//_}.txt"
  fi
  "print_$verb" "$@"
}
main "$@"
