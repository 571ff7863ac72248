#!/usr/bin/env bash
# Usage: place-ssh.sh up JOB FILE 0 <LINES
#        place-ssh.sh end JOB FILE SECONDS <LINES
# place.sh on boxes that one can ssh to, all of them at once. FILE is brought there and run: it
# starts a spoke, or ends it. GIT_SSH_COMMAND names another ssh, as for git.
# Prints: HOST<TAB>what the box says, or why it was not reached
# Exit: 0 ok, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"

reach() { # BOX COMMAND
  bash -c "exec ${GIT_SSH_COMMAND:-ssh} -o BatchMode=yes -o ConnectTimeout=10 \
    -o ServerAliveInterval=10 \"\$@\"" ssh -- "$@"
}

ask() { # VERB HOST BOX NUMBER
  local file="farm-hosts/$job/$2.sh" said
  if said=$(reach "$3" "cd && mkdir -p farm-hosts/$job && cat >$file && bash -l $file $1 $2 $4" \
    <"$spoke" 2>&1); then
    said=${said##*$'\n'}
  else
    said="not reached, or it failed: ${said##*$'\n'}"
  fi
  if [ "$1:$said" != end:ended ]; then said="ssh $3: $said"; fi
  escape "$said"
  printf '%s\t%s\n' "$2" "$escaped"
}

main() {
  local verb=${1-} job=${2-} spoke=${3-} seconds=${4-} host engine count
  if [ "$verb" = -h ]; then usage; exit 0; fi
  [ $# -eq 4 ] || die 2 "a verb, a job, a file and seconds are needed" "place-ssh.sh -h"
  while IFS=$'\t' read -r host engine count; do
    if [ "$verb" = end ]; then count=$seconds; fi
    ask "$verb" "$host" "${engine#ssh:}" "$count" &
  done
  wait
}

main "$@"
