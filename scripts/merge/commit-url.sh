#!/usr/bin/env bash
# Usage: commit-url.sh [-C REPO] REMOTE
# Prints what a sha is put behind to see that commit in a browser: of GitHub, GitLab, Bitbucket,
# Codeberg, SourceHut, or a host of one's own that has such a name in its own (gitlab.example.org).
# Nothing where the remote's url names none. Credentials in the url are left out.
# Exit: 0 ok, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

find_path() { # FORGE
  case $1 in
    github | codeberg | sr) printf /commit/ ;;
    gitlab) printf /-/commit/ ;;
    bitbucket) printf /commits/ ;;
  esac
}

main() {
  local repo=. option url host place forge path
  local name='([A-Za-z0-9_.-]+)' rest='([A-Za-z0-9_./~-]+)$'
  local by_scheme="^[A-Za-z0-9_]+://([^@/[:space:]]+@)?$name(:[0-9]+)?/$rest"
  local by_ssh="^([^@/:[:space:]]+@)?$name(:)$rest"
  while getopts ':C:h' option; do
    case $option in
      C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "commit-url.sh -h" ;;
    esac
  done
  shift $((OPTIND - 1))
  [ $# -eq 1 ] || die 2 "a remote's name is needed" "commit-url.sh -h"
  url=$(git -C "$repo" config --get "remote.$1.url" 2>/dev/null) || exit 0
  if ! [[ $url =~ $by_scheme || $url =~ $by_ssh ]]; then exit 0; fi
  place=${BASH_REMATCH[4]%/}
  host=$(printf '%s' "${BASH_REMATCH[2]}" | tr '[:upper:]' '[:lower:]')
  case $host in *.*) forge=${host%.*} ;; *) exit 0 ;; esac
  for forge in ${forge//./ }; do
    path=$(find_path "$forge")
    if [ -n "$path" ]; then
      printf 'https://%s/%s%s\n' "$host" "${place%.git}" "$path"
      return
    fi
  done
}
main "$@"
