#!/usr/bin/env bash
# Usage: rm-worktrees.sh [-C REPO] [-d DIR] [-p PREFIX] [-b TARGET] [NAME...]
# Removes the farm's worktrees (all PREFIX-* of DIR, or those named) that are provably safe to
# remove: nobody's working directory is inside, unsaved work is rescued first, and a detached HEAD
# is reachable from a ref. Their branches farm/<name>/* go too where TARGET (default: the main
# worktree's branch) or a pin has all their commits. A folder is renamed, then git's entry dropped,
# then the files deleted in the background.
# Beside it: rescue.sh (else unsaved work is kept), agent/judge-trees.sh (else ignored files, too),
#   repair-worktree.sh (for folders that are gone), agent/drop-branches.sh (else branches stay)
# Prints one line a worktree: name<TAB>removed|kept<TAB>reason
# Exit: 0 ok, 1 git failed, 2 usage, 3 no such worktree or TARGET, 4 something was kept
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done

export GIT_OPTIONAL_LOCKS=0
scratch=''

say() { printf '%s\n' "farm: $1" ${2:+"  try: $2"} >&2; } # WHAT [HINT]
fail() { say "$2" "${3-}"; exit "$1"; } # CODE WHAT [HINT]
keep() { printf '%s\tkept\t%s\n' "$1" "$2"; code=4; } # NAME REASON

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

find_entry() { # PATH -> sets entry, its folder in the common git dir
  local link=''
  IFS= read -r -d '' link 2>/dev/null <"$1/.git" || :
  link=${link%$'\n'} entry=${link#gitdir: }
  case $entry in "$link") return 1 ;; /*) ;; *) entry=$1/$entry ;; esac
  [ -d "$entry" ] && [ "${entry%/*}" -ef "$common/worktrees" ]
}

list_working_directories() { # of every process that can be seen, a line each
  if [ -e /proc/self/cwd ]; then readlink /proc/[0-9]*/cwd 2>/dev/null || :; return; fi
  command -v lsof >/dev/null && lsof -a -d cwd -Fn 2>/dev/null | sed -n 's/^n//p'
}

# Alone it knows of plain checkouts only: what git does not have or look at may be anything.
look_at_all() { # NAME...: what git says of each goes to a file
  local name path look=(status --porcelain=v2 --branch -unormal --ignored)
  if [ -x "$here/agent/judge-trees.sh" ]; then
    "$here/agent/judge-trees.sh" "$dir" "$scratch" "$@"
    return
  fi
  for name in "$@"; do
    path=$dir/$name-worktree
    { git -C "$path" "${look[@]}" | sed 's/^[!?]/kept: holds/' &&
      git -C "$path" ls-files -v | sed -n 's/^[^H]/kept: git may not look at/p'; } \
      >"$scratch/$name" 2>/dev/null || rm -f "$scratch/$name"
  done
}

make_safe() { # NAME PATH: 0 when nothing can be lost by removing it; else sets why
  local status saved ignored
  why="git cannot read it; mk-worktrees.sh mends it"
  [ -s "$scratch/$1" ] || return 1
  why='submodules are filled in, and only they know their commits'
  [ ! -d "$entry/modules" ] || return 1
  status=$'\n'$(<"$scratch/$1") why=${status#*$'\nkept: '} why=${why%%$'\n'*}
  case $status in
    *$'\nkept: '*) return 1 ;;
    *$'\n'[12u?]' '* | *'# branch.head (detached)'*)
      why='its unsaved work could not be kept by rescue.sh'
      saved=$("$here/rescue.sh" save -a "$1" "$2") || return 1
      [ -z "$saved" ] || notes="rescued as ${saved%%$'\t'*}" ;;
  esac
  ignored=$(grep -c '^! ' "$scratch/$1" || :)
  [ "$ignored" -eq 0 ] || notes="$notes; $ignored ignored files or folders went with it"
}

remove() { # NAME PATH
  local why entry='' notes=clean trash=$dir/.trash-$$-$1
  find_entry "$2" || { keep "$1" 'not a complete worktree of this repo'; return; }
  why='a process has its working directory inside'
  case $'\n'$inside$'\n' in *$'\n'"$2"[/$'\n']*) keep "$1" "$why"; return ;; esac
  make_safe "$1" "$2" || { keep "$1" "$why"; return; }
  mv -- "$2" "$trash" || { keep "$1" 'it cannot be renamed'; return; }
  rm -rf "$entry" "$dir/tmp/$1"
  removed+=("$1")
  printf '%s\tremoved\t%s\n' "$1" "$notes"
}

delete_trash() { # of this run and of earlier ones; nothing waits for it
  [ -n "$(find "$dir" -mindepth 1 -maxdepth 1 ! -name '.trash-*' ! -name .gitignore)" ] ||
    rm -f "$dir/.gitignore"
  (
    trap '' HUP
    rm -rf "$dir"/.trash-* || { chmod -R u+rwX "$dir"/.trash-*; rm -rf "$dir"/.trash-*; }
    rmdir "$dir/tmp" "$dir"
  ) </dev/null >/dev/null 2>&1 9>&- &
}

main() {
  local dir=${FARM_WORKTREES-} prefix=agent target=HEAD repo=. option here common main path inside
  local code=0 removed=()
  while getopts C:d:p:b:h option; do
    case $option in
      C) repo=$OPTARG ;; d) dir=$OPTARG ;; p) prefix=$OPTARG ;; b) target=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  here=$(dirname -- "$0")
  common=$(git -C "$repo" rev-parse --git-common-dir) ||
    fail 2 "$repo is not a git repository" 'rm-worktrees.sh -C REPO'
  common=$(cd -- "$repo" && cd -P -- "$common" && pwd -P)
  find_main
  target=$(git -C "$main" rev-parse -q --verify "refs/heads/$target^{commit}" ||
    git -C "$main" rev-parse -q --verify "$target^{commit}") ||
    fail 3 "no branch or commit to measure by" 'rm-worktrees.sh -b main'
  if [ -z "$dir" ]; then dir=${main%.git}-farm; fi
  [ -d "$dir" ] || mkdir -p -- "$dir" 2>/dev/null || return 0
  dir=$(cd -P -- "$dir" && pwd -P)
  { exec 9>>"$common/farm-worktrees.lock"; } 2>/dev/null ||
    fail 1 "cannot write $common/farm-worktrees.lock"
  flock 9 2>/dev/null || perl -e 'open(F, ">&=9") && flock(F, 2) or die "flock: $!\n"'
  # One whose folder somebody deleted has its index and HEAD still: it is mended, then judged.
  [ ! -x "$here/repair-worktree.sh" ] ||
    "$here/repair-worktree.sh" -C "$main" -g "$dir/$prefix-" || :
  if [ $# -eq 0 ]; then
    for path in "$dir/$prefix"-*-worktree; do
      [ ! -e "$path" ] || { path=${path##*/}; set -- "$@" "${path%-worktree}"; }
    done
  fi
  inside=$(list_working_directories) ||
    fail 4 'cannot tell whether somebody is inside the worktrees' 'install lsof'
  trap 'rm -rf "$scratch"' EXIT
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/farm-rm.XXXXXX")
  look_at_all "$@"
  for path in "$@"; do
    [ -d "$dir/$path-worktree" ] || { say "no worktree of $path"; code=3; continue; }
    remove "$path" "$dir/$path-worktree"
  done
  [ "${#removed[@]}" -eq 0 ] || [ ! -x "$here/agent/drop-branches.sh" ] ||
    "$here/agent/drop-branches.sh" -C "$main" -b "$target" "${removed[@]}" || code=1
  delete_trash
  return "$code"
}
main "$@"
