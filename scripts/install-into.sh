#!/usr/bin/env bash
# Usage: install-into.sh DEST
# Copies farm.py and scripts/ into the repo DEST, and the Makefile: as farm.mk when DEST has a
# makefile of its own. What is there is never touched: when a file of another content is in the way,
# nothing is copied at all. The toolkit is the one that this lies in, else that of FARM_HOME.
# Prints each file: copied<TAB>path, or in-the-way<TAB>path
# Exit: 0 ok, 1 a file could not be written, 2 usage, 3 DEST is no folder, 4 something is in the way
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done

fail() { printf 'farm: %s\n  try: %s\n' "$2" "$3" >&2; exit "$1"; } # CODE WHAT HINT

here=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$here/farm.py" ] || here=${FARM_HOME:-}

# Whether make finds a makefile in DEST that is not ours; GNUmakefile and makefile go first.
has_own_makefile() {
  [ -e "$1/GNUmakefile" ] || [ -e "$1/makefile" ] ||
    { [ -e "$1/Makefile" ] && ! cmp -s "$here/Makefile" "$1/Makefile"; }
}

# FROM<TAB>TO of each file, below the toolkit and below DEST
list_files() {
  local file
  printf 'farm.py\tfarm.py\n'
  for file in "$here"/scripts/* "$here"/scripts/*/*; do
    file=${file#"$here"/}
    if [ -f "$here/$file" ]; then printf '%s\t%s\n' "$file" "$file"; fi
  done
  if has_own_makefile "$1"; then
    printf 'Makefile\tfarm.mk\n'
  else
    printf 'Makefile\tMakefile\n'
  fi
}

is_in_the_way() { # FROM TO
  local folder=$2
  while [ "$folder" != "${folder%/*}" ] && folder=${folder%/*} && [ -n "$folder" ]; do
    if [ -e "$folder" ] && [ ! -d "$folder" ]; then return 0; fi
  done
  { [ -e "$2" ] || [ -L "$2" ]; } && ! cmp -s "$1" "$2"
}

main() {
  local dest=${1:-} files from to status=0
  case $dest in
    '' | -h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; [ -n "$dest" ] || exit 2; exit 0 ;;
  esac
  [ -n "$here" ] || fail 2 'there is no toolkit to copy' 'FARM_HOME=TOOLKIT install-into.sh DEST'
  [ -d "$dest" ] || fail 3 "there is no folder $dest" 'git clone it first'
  dest=$(cd "$dest" && pwd) files=$(list_files "$dest")
  while IFS=$'\t' read -r from to; do
    is_in_the_way "$here/$from" "$dest/$to" || continue
    printf 'in-the-way\t%s\n' "$dest/$to"
    status=4
  done <<<"$files"
  [ "$status" -eq 0 ] ||
    fail 4 "files of another content are in the way in $dest; nothing was copied" 'move them aside'
  while IFS=$'\t' read -r from to; do
    [ ! -e "$dest/$to" ] || continue
    mkdir -p "$(dirname "$dest/$to")"
    cp -p "$here/$from" "$dest/$to"
    printf 'copied\t%s\n' "$dest/$to"
  done <<<"$files"
  case $files in *farm.mk) to=' -f farm.mk' ;; *) to= ;; esac
  printf 'next: make -C %q%s farm\n' "$dest" "$to" >&2
}

main "$@"
