#!/usr/bin/env bash
# Usage: shared-state.sh [-C REPO]
# Prints what all worktrees of a repo share and an agent can change: the repo's own settings, hooks,
# remotes, attributes, cuts of its history. A line each (\\ \t \n \r escaped):
#   config:KEY<TAB>value   file:NAME<TAB>checksum
# Exit: 0 ok, 1 git failed, 2 usage or no repo
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

print_row() { # KEY VALUE
  local escaped
  escape "$2"
  printf '%s\t%s\n' "$1" "$escaped"
}

main() {
  local repo=. option common pair file
  while getopts C:h option; do
    case $option in
      C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  open_repo "$repo"
  # Tracking of branches comes and goes with them, and lfs and maintenance note things of their own.
  git config --file "$common/config" --no-includes -z --list | tr '\n\0' '\1\n' |
    while IFS= read -r pair; do
      case $pair in branch.* | lfs.* | maintenance.* | gc.* | submodule.*) continue ;; esac
      print_row "config:${pair%%$'\1'*}" "${pair#*$'\1'}"
    done
  for file in "$common"/hooks/* "$common"/info/{attributes,grafts} "$common/shallow"; do
    case $file in *.sample) continue ;; esac
    if [ -f "$file" ]; then print_row "file:${file#"$common"/}" "$(cksum <"$file")"; fi
  done
}

main "$@"
