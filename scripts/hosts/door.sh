#!/usr/bin/env bash
# Usage: door.sh REPO HOST      (as the forced command of HOST's key; `farm spoke-key` prints it)
# What a host may do on the hub, whatever it asks for by SSH_ORIGINAL_COMMAND: make the moves of its
# own agents (farm serve), fetch from REPO, and push below refs/farm/in/HOST/. All else is refused.
# The repo and the host are this line's own: what the client names is not looked at. No hook of
# REPO runs, and nothing is written into it but what is pushed.
# Exit: that of what was asked for, 2 usage, 4 refused
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"

main() {
  if [ "${1-}" = -h ]; then usage; exit 0; fi
  [ $# -eq 2 ] || die 2 "a repo and a host are needed" "door.sh -h"
  export FARM_HOST=$2
  case ${SSH_ORIGINAL_COMMAND-} in
    'farm serve') exec "$here/../farm" --repo "$1" serve "$2" ;;
    'git-upload-pack '* | 'git upload-pack '*)
      exec git -c uploadpack.allowFilter=true upload-pack --strict "$(git_dir "$1")" ;;
    'git-receive-pack '* | 'git receive-pack '*)
      # what is pushed outlives a power cut, and starts no housekeeping in the user's repo; what git
      # says to it is read by carry.sh
      LC_ALL=C exec git -c core.hooksPath="$here" -c core.fsync=committed -c receive.autogc=false \
        -c receive.fsckObjects=true receive-pack "$(git_dir "$1")" ;;
    *)
      die 4 "this key is the farm's for $2: it can serve, fetch, and push to refs/farm/in/$2/" \
        "farm spoke -h" ;;
  esac
}

git_dir() { git -C "$1" rev-parse --path-format=absolute --git-common-dir; }

main "$@"
