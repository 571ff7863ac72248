#!/usr/bin/env bash
# Usage: gate-here.sh FROM REF COMMIT SLOT COMMAND ISOLATE NETWORK CACHES     where the gate runs;
#          gate.sh sends it there
# Fetches COMMIT as REF of FROM (a URL, or a folder below HOME), and runs COMMAND on it. ISOLATE is
# the text of isolate.sh, if that is to run it: without a network where NETWORK is `none`, with a
# folder of its own in the place of each of CACHES, a line each. The first line of stdin is a word
# that the gate never sees; when stdin ends before the gate, so does it.
# Prints: the gate's output, then `farm-gate-exit WORD CODE HOST`; instead of CODE `changed`, and
#   what, when the gate has changed what it tests, or `no-sandbox`
# Exit: 0 the gate has ended, 1 it could not run, 2 usage
set -uo pipefail
if [ "${1-}" = -h ]; then sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; fi
[ $# -eq 8 ] || exit 2
cd "$HOME" || exit 1
from=$1 ref=$2 commit=$3 slot=$4 command=$5 isolate=$6
read -r word || exit 1
if [ -d "$from" ]; then from=$(cd "$from" && pwd -P); fi
folder=$HOME/.cache/farm-gates/$slot-$(printf %s "$from" | git hash-object --stdin | cut -c 1-8)
folder=$folder-${SLURMD_NODENAME:-${HOSTNAME:-host}}
at() {
  git -C "$folder" -c core.hooksPath=/dev/null -c core.fsmonitor=false -c gc.auto=0 \
    -c core.sparseCheckout=false "$@"
}

[ -d "$folder/.git" ] || git init -q "$folder" || exit 1
rm -f "$folder/.git/index.lock"
# a gate before this one may have made the clone sparse
if at ls-files -v | grep -a '^[a-zS] ' >/dev/null; then rm -f "$folder/.git/index"; fi
at fetch -q --no-tags "$from" "+$ref:refs/farm/gate" </dev/null || exit 1
at checkout -q --detach --force "$commit" -- </dev/null && at clean -ffdq || exit 1
[ "$(at rev-parse HEAD)" = "$commit" ] || exit 1
mkdir -p "$folder.tmp" && cd "$folder" || exit 1
host=${SLURMD_NODENAME:-$HOSTNAME}
tell() { printf '\nfarm-gate-exit %s %s %s\n' "$word" "$1" "$2"; } # CODE WHAT

box=()
if [ -n "$isolate" ]; then
  printf '%s\n' "$isolate" >"$folder.isolate.sh"
  box=(bash "$folder.isolate.sh" -x "${folder%/*}" -t "$folder.tmp")
  [ "$7" != none ] || box+=(-n)
  while IFS= read -r name; do
    [ -d "$HOME/$name" ] || continue
    mkdir -p "$folder.caches/$name" || exit 1
    # a link, on many clusters: bwrap puts nothing in the place of one
    box+=(-o "$(cd -P -- "$HOME/$name" && pwd)=$folder.caches/$name")
  done <<<"$8"
  box+=(-w "$folder.tmp" -w "$folder" -r "$folder/.git" --)
  "${box[@]}" true </dev/null || { tell no-sandbox "on $host"; exit; }
fi

# a group of its own, which is ended with it: what a gate leaves has no business to go on
set -m
TMPDIR=$folder.tmp FARM_SLOT=$folder GIT_TERMINAL_PROMPT=0 \
  ${box[@]+"${box[@]}"} bash -c "$command" </dev/null 2>&1 &
gate=$!
{ cat; kill -KILL -- -"$gate"; } <&0 >/dev/null 2>&1 &
watch=$!
disown "$watch"
set +m
wait "$gate" 2>/dev/null
code=$?
kill -KILL -- -"$watch"
kill -KILL -- -"$gate" 2>/dev/null

find "$folder" -name '.git*' -type p -exec rm -f {} +
changed=$(at status --porcelain --untracked-files=no --ignore-submodules=dirty 2>&1 |
  head -n 5 | tr -s "\n " " ")
[ "$(at rev-parse HEAD)" = "$commit" ] || changed="HEAD $changed"
if [ -n "$changed" ]; then code=changed; fi
tell "$code" "${changed:-$host}"
