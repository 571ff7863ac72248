#!/usr/bin/env bash
# Usage: . isolate-git.sh     sourced by isolate.sh for its -g; it is never run by itself
# add_git, which adds to `box` what a sandbox shows of a linked worktree's repo. Can be written: the
# worktree but for its .git, its entry but for commondir, gitdir and config.worktree, the refs that
# are named, and their logs; objects, but no pack that is there; what LFS keeps. The rest can be
# read as it is at any time, so that a `git pack-refs` outside does no harm: only what git keeps
# about other worktrees, and the farm's notes, are hidden. PRIVATE has its own tags, remotes, stash.
# Each fork costs a millisecond at the start of every agent, so there are few.
# Exit: none of its own; what fails ends isolate.sh
# shellcheck disable=SC2016,SC2034,SC2154  # box, fail, first and show are isolate.sh's

# Sets entry and common of a worktree, from files.
find_git() { # WORKTREE
  local line='' back='' up=/none
  { IFS= read -r line <"$1/.git" && entry=${line#gitdir: } && IFS= read -r up <"$entry/commondir" &&
    IFS= read -r back <"$entry/gitdir"; } 2>/dev/null || :
  case $up in
    /*) common=$up ;;
    ../..) common=${entry%/*/*} ;;
    *) common=$(cd -P -- "$entry/$up" 2>/dev/null && pwd) ;;
  esac
  { [ -d "${common:-/none}/objects" ] && [ "$back" -ef "$1/.git" ]; } ||
    fail 2 "$1 is not a linked worktree" 'git worktree list'
  [ ! -d "$common/reftable" ] ||
    fail 6 "$common has reftables, which cannot be shown in part" 'git refs migrate'
}

make() { # FOLDER...
  local path
  for path in "$@"; do [ -d "$path" ] || mkdir -p "$path" || return 1; done
}

keep() { # FILE: where an agent may have left a link, which leads nowhere
  set -C
  { : >"$1"; } 2>/dev/null || { rm -f -- "$1" && : >"$1"; }
  set +C
}

add_git() { # WORKTREE PRIVATE REFS...
  local entry common name private=$2 path
  find_git "$1"
  [ -e "$entry/config.worktree" ] || : >"$entry/config.worktree"
  make "$common"/objects/{info,pack} "$common/logs/refs/heads" "$common/refs/farm" || return 1
  show ro-bind "$common"
  box+=(--size 1048576 --tmpfs "$common/worktrees")
  show bind "$entry" "$common/objects"
  show ro-bind "$entry/commondir" "$entry/gitdir" "$entry/config.worktree" \
    "$common/objects/info" "$common/objects/pack"
  if [ -d "$common/farm" ]; then
    box+=(--size 1048576 --tmpfs "$common/farm")
    box+=(--ro-bind-try "$common/farm/main" "$common/farm/main")
  fi
  [ ! -d "$common/lfs" ] || show bind "$common/lfs" # named by content, as objects
  if [ -n "$private" ]; then
    make "$private"/{refs,logs/refs}/heads "$private"/{refs/farm,rr-cache} || return 1
    for name in tags remotes; do
      for path in "$common/refs/$name"/*; do
        if [ -e "$path" ]; then
          box+=(--ro-bind "$common/refs/$name" "/run/refs/$name")
          # by the sandbox: out here, a link that the agent has left there would lead anywhere
          first=(sh -c 'cp -Rpf /run/refs/* "$0"; exec "$@"' "$common/refs")
        fi
        break
      done
    done
    # logs/refs once more: a folder on the way to a mount can be renamed, and a link put there
    box+=(--bind "$private/refs" "$common/refs" --bind "$private/logs" "$common/logs"
      --bind "$private/logs/refs" "$common/logs/refs")
    show ro-bind "$common/refs/heads" "$common/logs/refs/heads" "$common/refs/farm"
    [ ! -d "$common/rr-cache" ] || box+=(--bind "$private/rr-cache" "$common/rr-cache")
  fi
  for name in "${@:3}"; do
    for path in "$common/refs/$name" "$common/logs/refs/$name"; do
      # a folder that is empty is removed by git, and with it what is mounted there
      make "$path" && { [ -f "$path/.keep" ] || keep "$path/.keep"; } || return 1
      show bind "$path"
    done
  done
  show bind "$1"
  show ro-bind "$1/.git"
}
