#!/usr/bin/env bash
# Usage: install-into.sh DEST
# Copies farm.py and scripts/ into the repo DEST, and the Makefile: as farm.mk when DEST has a makefile of its own.
# What is there is never touched: when a file of another content is in the way, nothing is copied at all.
# Prints each file: copied<TAB>path, or in-the-way<TAB>path
# Exit: 0 ok, 1 a file could not be written, 2 usage, 3 DEST is no folder, 4 something is in the way
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)

# Whether make finds a makefile in DEST that is not ours; GNUmakefile and makefile go before Makefile.
has_own_makefile() {
  [ -e "$1/GNUmakefile" ] || [ -e "$1/makefile" ] || { [ -e "$1/Makefile" ] && ! cmp -s "$here/Makefile" "$1/Makefile"; }
}

# FROM<TAB>TO of each file, below the toolkit and below DEST
list_files() {
  local file
  printf 'farm.py\tfarm.py\n'
  for file in "$here"/scripts/*; do
    if [ -f "$file" ]; then printf 'scripts/%s\tscripts/%s\n' "${file##*/}" "${file##*/}"; fi
  done
  if has_own_makefile "$1"; then printf 'Makefile\tfarm.mk\n'; else printf 'Makefile\tMakefile\n'; fi
}

is_in_the_way() { # FROM TO
  local folder=${2%/*}
  if [ -e "$folder" ] && [ ! -d "$folder" ]; then return 0; fi
  { [ -e "$2" ] || [ -L "$2" ]; } && ! cmp -s "$1" "$2"
}

main() {
  local dest=${1:-} files from to status=0
  case $dest in
    '' | -h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; [ -n "$dest" ] || exit 2; exit 0 ;;
  esac
  [ -d "$dest" ] || { printf 'farm: there is no folder %s\n  try: git clone it first\n' "$dest" >&2; exit 3; }
  dest=$(cd "$dest" && pwd) files=$(list_files "$dest")
  while IFS=$'\t' read -r from to; do
    is_in_the_way "$here/$from" "$dest/$to" || continue
    printf 'in-the-way\t%s\n' "$dest/$to"
    status=4
  done <<<"$files"
  if [ "$status" -ne 0 ]; then
    printf 'farm: files of another content are in the way in %s; nothing was copied\n  try: move them aside\n' "$dest" >&2
    exit "$status"
  fi
  mkdir -p "$dest/scripts"
  while IFS=$'\t' read -r from to; do
    [ ! -e "$dest/$to" ] || continue
    cp -p "$here/$from" "$dest/$to"
    printf 'copied\t%s\n' "$dest/$to"
  done <<<"$files"
  case $files in *farm.mk) to=' -f farm.mk' ;; *) to= ;; esac
  printf 'next: make -C %q%s farm\n' "$dest" "$to" >&2
}

main "$@"
