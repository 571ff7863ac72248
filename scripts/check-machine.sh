#!/usr/bin/env bash
# Usage: check-machine.sh [-n AGENTS] FOLDER
# What in this machine's limits would be too little for so many agents (default 10), and whether
# FOLDER lies on a file system where locks may not hold.
# Prints: what<TAB>what to do about it, a line each
# Exit: 0 looked (nothing printed: all is well), 2 usage
set -uo pipefail
export LC_ALL=C

row() { printf '%s\t%s\n' "$1" "$2"; }

kind_of() { # FOLDER: its file system, as `mount` calls it on Linux (type nfs4) and on macOS ((nfs)
  local point
  point=$(df -P -- "$1" 2>/dev/null | awk 'NR == 2 { sub(/^.*%[[:space:]]+/, ""); print }')
  mount 2>/dev/null | POINT=" on $point " awk '
    at = index($0, ENVIRON["POINT"]) { line = substr($0, at + length(ENVIRON["POINT"])) }
    END { sub(/^(type |[(])/, "", line); sub(/[, )].*/, "", line); print line }'
}

main() {
  local agents=10 option limit needed kind
  while getopts ':n:h' option; do
    case $option in
      n) agents=$OPTARG ;;
      h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) printf 'farm: -%s is unknown or lacks its value\n' "$OPTARG" >&2; exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  case $#:$agents in 1:*[!0-9]* | 1: | [!1]*) echo 'farm: a folder is needed' >&2; exit 2 ;; esac
  limit=$(ulimit -u) needed=$((64 * agents))
  case $limit in
    *[!0-9]* | '') ;;
    *) if [ "$limit" -lt "$needed" ]; then
      row "only $limit processes are allowed, for $agents agents" "ulimit -u $needed"
    fi ;;
  esac
  needed=$((4 * agents))
  if { read -r limit </proc/sys/fs/inotify/max_user_instances; } 2>/dev/null &&
    [ "$limit" -lt "$needed" ]; then
    row "only $limit inotify instances are allowed, for $agents agents" \
      "sudo sysctl fs.inotify.max_user_instances=$needed"
  fi
  kind=$(kind_of "$1")
  case $kind in
    nfs* | cifs* | smb* | fuse.sshfs* | 9p*)
      row "$1 lies on $kind, where flock may not hold" "move the repo to a local disk" ;;
  esac
}
main "$@"
