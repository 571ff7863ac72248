#!/usr/bin/env bash
# Usage: setup-worktree.sh [-C REPO] PATH...
# Makes fresh worktrees fit for work. Files of the main worktree that git ignores and that match a line of its
# .worktreeinclude (written like a .gitignore) are copied, as clones where the filesystem can, with their modes;
# a file that is there already stays. Then an executable .farm/setup (the worktree's own, else the main one's) runs
# in the worktree with FARM_REPO, FARM_WORKTREE and FARM_AGENT_NAME set; what it prints goes to
# <git common dir>/farm-setup-logs/<name>.log.
# Exit: 0 ok, 1 a copy or a setup failed (stderr names the log), 2 usage
set -euo pipefail
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }

find_copy_command() { # -> sets copy: how files are cloned here; GNU's cp, then that of macOS, then any
  copy=(cp -pP --reflink=auto)
  if "${copy[@]}" -- "$main/.worktreeinclude" "$list.try" 2>/dev/null; then return; fi
  copy=(cp -cpP)
  if "${copy[@]}" -- "$main/.worktreeinclude" "$list.try" 2>/dev/null; then return; fi
  copy=(cp -pP)
}

list_included() { # names of the main worktree's files that are both ignored and included, each ended by NUL
  { git -C "$main" ls-files -z -o -i --exclude-from="$main/.worktreeinclude" | git -C "$main" check-ignore -z --stdin; } || [ $? -eq 1 ]
}

flush() { # FOLDER: copies the collected files into this folder of the worktree
  if [ "${#batch[@]}" -eq 0 ]; then return; fi
  mkdir -p -- "$1" && "${copy[@]}" -- "${batch[@]}" "$1/" || return 1
  batch=()
}

copy_included() { # PATH: one cp for each folder, or for each 200 files of it
  local file folder='' last='' batch=()
  while IFS= read -r -d '' file; do
    case $file in */*) folder=/${file%/*} ;; *) folder='' ;; esac
    if [ "$folder" != "$last" ] || [ "${#batch[@]}" -ge 200 ]; then flush "$1$last" || return 1; last=$folder; fi
    if ! [ -e "$1/$file" ] && ! [ -L "$1/$file" ]; then batch+=("$main/$file"); fi
  done <"$list"
  flush "$1$last"
}

run_setup() { # PATH
  local path=$1 name=${1##*/} program status=0
  name=${name%-worktree}
  program=$path/.farm/setup
  if ! [ -e "$program" ]; then program=$main/.farm/setup; fi
  if ! [ -e "$program" ]; then return; fi
  if ! [ -x "$program" ]; then say "$program is not executable, and was not run" "chmod +x $program"; return; fi
  mkdir -p -- "$common/farm-setup-logs"
  (CDPATH='' cd -P -- "$path" && FARM_REPO=$main FARM_WORKTREE=$path FARM_AGENT_NAME=$name exec "$program") \
    >"$common/farm-setup-logs/$name.log" 2>&1 </dev/null || status=$?
  if [ "$status" -eq 0 ]; then return; fi
  say "the setup of $name failed with exit status $status" "tail $common/farm-setup-logs/$name.log"
  return 1
}

main() {
  local repo=. main common list='' copy=() path option code=0
  while getopts C:h option; do
    case $option in
      C) repo=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ $# -eq 0 ]; then fail 2 'which worktree?' 'setup-worktree.sh PATH'; fi
  common=$(git -C "$repo" rev-parse --git-common-dir) || fail 2 "$repo is not a git repository"
  common=$(CDPATH='' cd -- "$repo" && cd -P -- "$common" && pwd -P)
  main=${common%/.git}
  if [ -f "$main/.worktreeinclude" ]; then
    list=$(mktemp "${TMPDIR:-/tmp}/farm-setup.XXXXXX")
    find_copy_command
    list_included >"$list" || fail 1 "cannot tell which files $main/.worktreeinclude means"
  fi
  for path in "$@"; do
    if [ -n "$list" ] && ! copy_included "$path"; then say "not every file of .worktreeinclude reached $path"; code=1; continue; fi
    run_setup "$path" || code=1
  done
  if [ -n "$list" ]; then rm -f "$list" "$list.try"; fi
  return "$code"
}

main "$@"
