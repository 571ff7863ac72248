#!/usr/bin/env bash
# Usage: edit-text.sh FILE
# Opens FILE in the user's editor, as `git commit` would: GIT_EDITOR, core.editor, VISUAL, EDITOR,
# else vi; but core.editor from the user's own settings, not from a repo's, which an agent may have
# changed. Prints nothing of its own.
# Exit: the editor's own; 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
editor=${GIT_EDITOR-}
. "$here/common.sh"

main() {
  if [ "${1-}" = -h ]; then usage; exit 0; fi
  [ $# -eq 1 ] || die 2 "a file is needed" "edit-text.sh -h"
  [ -n "$editor" ] || editor=$(cd / && git var GIT_EDITOR)
  bash -c "$editor \"\$1\"" bash "$1"
}
main "$@"
