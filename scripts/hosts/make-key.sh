#!/usr/bin/env bash
# Usage: make-key.sh [-o FILE] REPO HOST
# A key for HOST, by which it can work on the farm of REPO and do nothing else here. FILE (default:
# ~/.ssh/farm-HOST) gets the private half, FILE.pub the other; a FILE that is there is kept.
# Prints: the line for ~/.ssh/authorized_keys
# Exit: 0 ok, 1 ssh-keygen failed, 2 usage, 6 ssh-keygen is missing
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"

main() {
  local file='' option command
  while getopts o:h option; do
    case $option in
      o) file=$OPTARG ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  [ $# -eq 2 ] || die 2 "a repo and a host are needed" "make-key.sh -h"
  command -v ssh-keygen >/dev/null ||
    die 6 "ssh-keygen is not installed" "apt install openssh-client"
  file=${file:-$HOME/.ssh/farm-$2} here=$(cd "$here" && pwd -P)
  if [ ! -e "$file" ]; then
    mkdir -p "$(dirname "$file")" && chmod go-rwx "$(dirname "$file")"
    ssh-keygen -q -t ed25519 -N '' -C "farm host $2" -f "$file"
  fi
  command=$(printf 'FARM_PYTHON=%q %q %q %q' "${FARM_PYTHON:-python3}" "$here/door.sh" "$1" "$2")
  command=${command//\\/\\\\}
  printf 'command="%s",restrict %s\n' "${command//\"/\\\"}" "$(cat "$file.pub")"
  say "take the private key, $file, to the host, and add the line to ~/.ssh/authorized_keys"
}

main "$@"
