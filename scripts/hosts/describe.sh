#!/usr/bin/env bash
# Usage: describe.sh
# Which version of the toolkit this is, as its hub and its hosts compare it: by content, for a copy
# without .git is one, too.
# Prints: a hash of farm.py and of all scripts
# Exit: 0 ok, 1 git failed, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"

if [ $# -gt 0 ]; then
  usage
  if [ "$1" = -h ]; then exit 0; else exit 2; fi
fi
cd "$here/../.."
export LC_ALL=C
find farm.py scripts -type f ! -path '*/__pycache__/*' | sort | while IFS= read -r name; do
  printf '%s\n' "$name"
  cat "$name"
done | git hash-object --stdin
