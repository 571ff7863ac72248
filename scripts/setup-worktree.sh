#!/usr/bin/env bash
# Usage: setup-worktree.sh [-u|-o] [-C REPO] PATH...
# Makes fresh worktrees fit for work. Files of the main worktree that git ignores and that match a
# line of its .worktreeinclude (as in a .gitignore) are copied, as clones where the filesystem can,
# with their modes; a file that is there stays. -u: what has come, changed or gone in the main one
# since does so here, unless somebody has edited it here; with -o even then. Then (with neither) an
# executable .farm/setup (the worktree's own, else the main one's) runs in it with FARM_REPO,
# FARM_WORKTREE and FARM_AGENT_NAME set, and prints to <git common dir>/farm-setup-logs/<name>.log.
# Beside it, for -u and -o: agent/set-aside.sh (else what has gone stays here)
# Exit: 0 ok, 1 a copy or a setup failed (stderr names the log), 2 usage
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done

say() { printf '%s\n' "farm: $1" ${2:+"  try: $2"} >&2; } # WHAT [HINT]
fail() { say "$2" "${3-}"; exit "$1"; } # CODE WHAT [HINT]

# Sets main, the farm's checkout: as is written down, else git's main worktree, else where $repo is.
find_main() {
  local noted='' place
  IFS= read -r noted 2>/dev/null <"$common/farm/main" || :
  for main in "$noted" "${common%/.git}"; do
    (cd -- "${main:-/none}" && place=$(git rev-parse --is-inside-work-tree --git-common-dir) &&
      [ "${place#true?}" -ef "$common" ]) 2>/dev/null && return
  done
  main=$(git -C "$repo" rev-parse --show-toplevel 2>/dev/null) || main=${common%/.git}
}

find_copy_command() { # sets copy: how files are cloned here; GNU's cp, that of macOS, then any
  local how
  for how in '-RpP --reflink=auto' -cRpP -RpP; do
    read -r -a copy <<<"cp $how"
    if "${copy[@]}" -- "$main/.worktreeinclude" "$list.try" 2>/dev/null; then return; fi
  done
}

list_included() { # names of files that are both ignored and included, each ended by NUL
  { git -C "$main" ls-files -z -o -i --exclude-from="$main/.worktreeinclude" |
    git -C "$main" check-ignore -z --stdin; } || [ $? -eq 1 ]
}

flush() { # WORKTREE /FOLDER: copies the collected files into it, but through no link
  local part at=$1 IFS=/
  if [ "${#batch[@]}" -eq 0 ]; then return; fi
  for part in ${2#/}; do at=$at/$part; [ ! -L "$at" ] || { say "$at is a link"; return 1; }; done
  mkdir -p -- "$at" && "${copy[@]}" -- "${batch[@]}" "$at/" || return 1
  batch=()
}

as_lines() { tr '\0\n' '\n\1'; }

# What was copied here last, and when: names in $mark, which is as old as the last copy. A file of
# that list whose inode has not changed since is as it came; any other is somebody's own.
find_mark() { # PATH -> sets mark and old, its names as lines
  mark=$(git -C "$1" rev-parse --absolute-git-dir)/farm-included old=$list.old; rm -f -- "$mark.new"
  if [ -s "$mark" ]; then as_lines <"$mark" >"$old"; else : >"$old"; fi
}

is_same() { # FILE FILE
  if [ -L "$1" ] && [ -L "$2" ]; then [ "$(readlink "$1")" = "$(readlink "$2")" ]; return; fi
  if [ -L "$1" ] || [ -L "$2" ]; then return 1; fi
  if [ -d "$1" ] && [ -d "$2" ]; then return; fi # a repo of its own: copied once
  if ! [ -f "$1" ] || ! [ -f "$2" ]; then return 1; fi # a FIFO would keep cmp waiting
  { ! [ "$1" -nt "$2" ] && ! [ "$1" -ot "$2" ]; } || cmp -s -- "$1" "$2"
}

is_as_it_came() { # PATH NAME
  local newer
  if [ -n "$overwrite" ]; then return; fi
  grep -qxF -e "${2//$'\n'/$'\1'}" "$old" && newer=$(find "$1/$2" -prune -cnewer "$mark") &&
    [ -z "$newer" ]
}

copy_included() { # PATH: one cp for each folder, or for each 200 files of it
  local file folder='' last='' batch=()
  while IFS= read -r -d '' file; do
    file=${file%/} folder=''
    case $file in */*) folder=/${file%/*} ;; esac
    if [ "$folder" != "$last" ] || [ "${#batch[@]}" -ge 200 ]; then
      flush "$1" "$last" || return 1
      last=$folder
    fi
    if ! [ -e "$1/$file" ] && ! [ -L "$1/$file" ]; then
      batch+=("$main/$file")
    elif is_same "$main/$file" "$1/$file"; then
      : # nothing to copy
    elif [ -n "$update" ] && is_as_it_came "$1" "$file"; then
      rm -f -- "$1/$file" || return 1
      batch+=("$main/$file")
    else
      [ ! "$main/$file" -nt "$mark" ] ||
        say "$file has changed in $main, and in $1 too, where it stays as it is"
      continue
    fi
    printf '%s\0' "$file" >&3
  done <"$list" 3>"$mark.new"
  flush "$1" "$last"
}

set_aside() { :; } # agent/set-aside.sh has another, if it is there

run_setup() { # PATH
  local path=$1 name=${1##*/} program=$1/.farm/setup status=0 log box=()
  name=${name%-worktree} log=$common/farm-setup-logs/$name.log
  [ -e "$program" ] || program=$main/.farm/setup && [ -e "$program" ] || return 0
  [ -x "$program" ] ||
    { say "$program is not executable, and was not run" "chmod +x $program"; return 0; }
  [ "${FARM_ISOLATE:-none}" = none ] || box=(bash "$here/sandbox/confine.sh" setup "$main" "$path")
  [ -z "${FARM_BASH_ENV-}" ] || box+=(env "BASH_ENV=$FARM_BASH_ENV")
  mkdir -p -- "${log%/*}" && (export FARM_REPO=$main FARM_WORKTREE=$path FARM_AGENT_NAME=$name
    cd -P -- "$path" && exec ${box[@]+"${box[@]}"} "$program") >"$log" 2>&1 </dev/null || status=$?
  if [ "$status" -eq 0 ]; then return; fi
  say "the setup of $name failed with exit status $status" "tail $log"; return 1
}

main() {
  local repo=. main common list='' copy=() path option code=0
  local update='' overwrite='' mark='' old='' here=${0%/*}
  while getopts C:uoh option; do
    case $option in
      C) repo=$OPTARG ;; u) update=yes ;; o) update=yes overwrite=yes ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1)); [ $# -gt 0 ] || fail 2 'which worktree?' 'setup-worktree.sh PATH'
  if [ -n "$update" ] && [ -r "$here/agent/set-aside.sh" ]; then . "$here/agent/set-aside.sh"; fi
  common=$(git -C "$repo" rev-parse --git-common-dir) || fail 2 "$repo is not a git repository"
  common=$(cd -- "$repo" && cd -P -- "$common" && pwd -P)
  find_main
  if [ -f "$main/.worktreeinclude" ]; then
    list=$(mktemp "${TMPDIR:-/tmp}/farm-setup.XXXXXX")
    find_copy_command
    list_included >"$list" || fail 1 "cannot tell which files $main/.worktreeinclude means"
  fi
  for path in "$@"; do
    if [ -n "$list" ]; then
      find_mark "$path"
      if { [ -n "$update" ] && ! set_aside "$path"; } || ! copy_included "$path"; then
        say "not every file of .worktreeinclude reached $path"; code=1; continue
      fi
      touch "$mark.new" && mv -f "$mark.new" "$mark" # younger than every copy
    fi
    if [ -z "$update" ]; then run_setup "$path" || code=1; fi
  done
  [ -z "$list" ] || rm -rf "$list" "$list".*
  return "$code"
}
main "$@"
