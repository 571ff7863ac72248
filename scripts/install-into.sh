#!/usr/bin/env bash
# Usage: install-into.sh DEST
# Copies farm.py and scripts/ into the repo DEST, touching nothing that is there, and a farm.mk with the make targets when
# DEST has a Makefile of its own (else the Makefile itself). Prints each file that was copied or kept.
# Exit: 0 ok, 2 usage, 3 DEST is no folder, 4 a file of another content is there already (nothing of it is replaced)
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)

copy() {
  local from=$1 to=$2
  if [ -e "$to" ] || [ -L "$to" ]; then
    cmp -s "$from" "$to" && return 0
    printf 'kept\t%s\n' "$to"
    return 4
  fi
  mkdir -p "$(dirname "$to")"
  cp -p "$from" "$to"
  printf 'copied\t%s\n' "$to"
}

main() {
  local dest=${1:-} file status=0
  case $dest in
    '' | -h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; [ -n "$dest" ] || exit 2; exit 0 ;;
  esac
  [ -d "$dest" ] || { printf 'farm: there is no folder %s\n  try: git clone it first\n' "$dest" >&2; exit 3; }
  copy "$here/farm.py" "$dest/farm.py" || status=$?
  for file in "$here"/scripts/*; do
    [ -f "$file" ] || continue
    copy "$file" "$dest/scripts/$(basename "$file")" || status=$?
  done
  if [ -e "$dest/Makefile" ]; then
    copy "$here/Makefile" "$dest/farm.mk" || status=$?
    printf 'next: make -C %s -f farm.mk farm\n' "$dest" >&2
  else
    copy "$here/Makefile" "$dest/Makefile" || status=$?
    printf 'next: make -C %s farm\n' "$dest" >&2
  fi
  exit "$status"
}

main "$@"
