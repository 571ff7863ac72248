#!/usr/bin/env bash
# Usage: tame-filters.sh off REPO COMMAND [ARGUMENT]...
#        tame-filters.sh tree|slot REPO FOLDER COMMAND [ARGUMENT]...
# Runs COMMAND, git or what calls it, so that the user's settings start no program that an agent has
# written: a filter, a hook or a monitor of files may lie in the tree, whose attributes choose.
# Hooks and monitors are off. Filters, too, are
# off: for COMMANDs that look at agents' trees outside of a sandbox
# tree, slot: on, for what writes the files of FOLDER, which have to be as they make them; where the
#   settings have one and FARM_ISOLATE is bwrap, COMMAND runs in that sandbox of confine.sh
# Filters of git-lfs, which is on PATH, are no danger: they stay.
# Exit: COMMAND's own, 2 usage
set -uo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac

# Sets filters, the keys of those in the settings, one a line.
find_filters() { # REPO
  local key value list
  list=$(git -C "$1" config --get-regexp '^filter\..*\.(clean|smudge|process)$') || [ $? -eq 1 ] ||
    exit 1
  while read -r key value; do
    case $value in '' | 'git-lfs '* | 'git lfs '*) ;; *) filters=$filters$key$'\n' ;; esac
  done <<<"$list"
}

set_config() { # KEY VALUE
  local n=${GIT_CONFIG_COUNT:-0}
  export "GIT_CONFIG_KEY_$n=$1" "GIT_CONFIG_VALUE_$n=$2" GIT_CONFIG_COUNT=$((n + 1))
}

main() {
  local kind=${1-} repo=${2-} folder=${3-} filters='' key
  case $kind:$# in
    -h:*) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    off:[012] | tree:[0123] | slot:[0123]) exit 2 ;;
    off:*)
      shift 2
      find_filters "$repo"
      while IFS= read -r key; do
        if [ -n "$key" ]; then set_config "$key" ''; fi
      done <<<"$filters" ;;
    tree:* | slot:*)
      shift 3
      [ "${FARM_ISOLATE-}" != bwrap ] || find_filters "$repo"
      [ -z "$filters" ] ||
        set -- bash "$here/confine.sh" "$kind" "$repo" "$folder" "$@" ;;
    *) exit 2 ;;
  esac
  set_config core.hooksPath /dev/null
  set_config core.fsmonitor false
  exec "$@"
}
main "$@"
