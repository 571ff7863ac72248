#!/usr/bin/env bash
# Usage: rm-worktrees.sh [-C REPO] [-d DIR] [-p PREFIX] [-b TARGET] [NAME...]
# Removes the farm's worktrees (all PREFIX-* of DIR, or those named) that are provably safe to remove: nobody's working
# directory is inside, unsaved work is rescued first (by rescue.sh beside this; without it such a tree is kept), and
# a detached HEAD is reachable from a ref. Their branches farm/<name>/* go too where TARGET (default: the main
# worktree's branch) or a pin below refs/farm/ has all their commits. A folder is renamed, then git's entry
# dropped, then the files deleted in the background.
# Prints one line a worktree: name<TAB>removed|kept<TAB>reason
# Exit: 0 ok, 1 git failed, 2 usage, 3 no such worktree or TARGET, 4 something was kept
set -euo pipefail
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX
export GIT_OPTIONAL_LOCKS=0
scratch=''

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }
keep() { printf '%s\tkept\t%s\n' "$1" "$2"; code=4; }

list_working_directories() { # of every process that can be seen, a line each
  if [ -e /proc/self/cwd ]; then readlink /proc/[0-9]*/cwd 2>/dev/null || :
  elif command -v lsof >/dev/null; then lsof -a -d cwd -Fn 2>/dev/null | sed -n 's/^n//p'
  else return 1; fi
}

find_entry() { # PATH -> sets entry, its folder in the common git dir
  local link=''
  IFS= read -r -d '' link 2>/dev/null <"$1/.git" || :
  link=${link%$'\n'} entry=${link#gitdir: }
  case $entry in "$link") return 1 ;; /*) ;; *) entry=$1/$entry ;; esac
  [ -d "$entry" ] && [ "${entry%/*}" -ef "$common/worktrees" ]
}

mend_deleted() { # a worktree whose folder somebody deleted has its index and HEAD still: it is mended, then judged
  local file link=''
  if ! [ -x "$here/repair-worktree.sh" ]; then return; fi
  for file in "$common"/worktrees/*/gitdir; do
    IFS= read -r -d '' link 2>/dev/null <"$file" || :
    link=${link%$'\n'}
    case $link in "$dir/$prefix"-*-worktree/.git) [ -e "$link" ] || "$here/repair-worktree.sh" -C "$main" "${link%/.git}" || : ;; esac
  done
}

look_at_all() { # NAME...: git's status of each goes to a file, on all cores (it reads every file's date)
  local name jobs=0 cores
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || printf 2)
  for name in "$@"; do
    git -C "$dir/$name-worktree" status --porcelain=v2 --branch >"$scratch/$name" 2>/dev/null || rm -f "$scratch/$name" &
    jobs=$((jobs + 1))
    if [ $((jobs % (cores * 4))) -eq 0 ]; then wait; fi
  done
  wait
}

make_safe() { # NAME PATH: 0 when nothing can be lost by removing it; else sets why
  local status saved
  why="git cannot read it; mk-worktrees.sh mends it"
  if ! [ -s "$scratch/$1" ]; then return 1; fi
  why='submodules are filled in, and only they know their commits'
  if [ -d "$entry/modules" ]; then return 1; fi
  status=$(<"$scratch/$1")
  case $status in
    *$'\n'[12u?]' '* | *'# branch.head (detached)'*)
      why='unsaved work, and no rescue.sh to keep it'
      if ! [ -x "$here/rescue.sh" ]; then return 1; fi
      why='its unsaved work could not be kept'
      saved=$("$here/rescue.sh" save -a "$1" "$2") || return 1
      why="a repo of its own is inside, and its history is nowhere else; its files are rescued: ${saved%%$'\t'*}"
      if git -C "$2" ls-files -z -o --exclude-standard | tr '\0' '\n' | grep -q '/$'; then return 1; fi
      if [ -n "$saved" ]; then notes="rescued as ${saved%%$'\t'*}"; fi ;;
  esac
}

remove() { # NAME PATH
  local why entry='' notes=clean trash=$dir/.trash-$$-$1
  if ! find_entry "$2"; then keep "$1" 'not a complete worktree of this repo'; return; fi
  case $'\n'$inside$'\n' in *$'\n'"$2"$'\n'* | *$'\n'"$2"/*) keep "$1" 'a process has its working directory inside'; return ;; esac
  if ! make_safe "$1" "$2"; then keep "$1" "$why"; return; fi
  mv -- "$2" "$trash" || { keep "$1" 'it cannot be renamed'; return; }
  rm -rf "$entry"
  removed+=("$1")
  printf '%s\tremoved\t%s\n' "$1" "$notes"
}

delete_branches() { # NAME...: those whose commits TARGET or a pin has, and that no worktree is on
  local patterns=("${@/#/refs/heads/farm/}") ref sha merged
  merged=$'\n'$(git -C "$main" for-each-ref --merged "$target" --format='%(refname)' "${patterns[@]}")$'\n'
  git -C "$main" for-each-ref --format='%(if)%(worktreepath)%(then)%(else)%(refname) %(objectname)%(end)' "${patterns[@]}" | sed '/^$/d' |
    while read -r ref sha; do
      case $merged in *$'\n'"$ref"$'\n'*) ;; *) [ -n "$(git -C "$main" for-each-ref --count=1 --contains "$sha" refs/farm)" ] || continue ;; esac
      printf 'delete %s %s\n' "$ref" "$sha"
    done | git -C "$main" -c core.filesRefLockTimeout=10000 -c core.packedRefsTimeout=30000 update-ref --stdin
}

delete_trash() { # of this run and of earlier ones; nothing waits for it
  (trap '' HUP; rm -rf "$dir"/.trash-* || { chmod -R u+rwX "$dir"/.trash-*; rm -rf "$dir"/.trash-*; }; rmdir "$dir") </dev/null >/dev/null 2>&1 9>&- &
}

main() {
  local dir=${FARM_WORKTREES-} prefix=agent target=HEAD repo=. option here common main path inside code=0 removed=()
  while getopts C:d:p:b:h option; do
    case $option in
      C) repo=$OPTARG ;; d) dir=$OPTARG ;; p) prefix=$OPTARG ;; b) target=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  here=$(dirname -- "$0")
  common=$(git -C "$repo" rev-parse --git-common-dir) || fail 2 "$repo is not a git repository" 'rm-worktrees.sh -C REPO'
  common=$(CDPATH='' cd -- "$repo" && cd -P -- "$common" && pwd -P)
  main=${common%/.git}
  target=$(git -C "$main" rev-parse -q --verify "$target^{commit}") || fail 3 "no branch or commit to measure by" 'rm-worktrees.sh -b main'
  if [ -z "$dir" ]; then dir=${main%.git}-farm; fi
  if ! [ -d "$dir" ] && ! mkdir -p -- "$dir" 2>/dev/null; then return; fi
  dir=$(CDPATH='' cd -P -- "$dir" && pwd -P)
  { exec 9>>"$common/farm-worktrees.lock"; } 2>/dev/null || fail 1 "cannot write $common/farm-worktrees.lock"
  if command -v flock >/dev/null; then flock 9; else perl -e 'open(F, ">&=9") && flock(F, 2) or die "flock: $!\n"'; fi
  mend_deleted
  if [ $# -eq 0 ]; then
    for path in "$dir/$prefix"-*-worktree; do path=${path##*/}; if [ -e "$dir/$path" ]; then set -- "$@" "${path%-worktree}"; fi; done
  fi
  inside=$(list_working_directories) || fail 4 'cannot tell whether somebody is inside the worktrees' 'install lsof'
  trap 'rm -rf "$scratch"' EXIT
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/farm-rm.XXXXXX")
  look_at_all "$@"
  for path in "$@"; do
    if [ -d "$dir/$path-worktree" ]; then remove "$path" "$dir/$path-worktree"; else say "no worktree of $path"; code=3; fi
  done
  if [ "${#removed[@]}" -gt 0 ]; then delete_branches "${removed[@]}" || code=1; fi
  delete_trash
  return "$code"
}

main "$@"
