#!/usr/bin/env bash
# Usage: mk-worktrees.sh -n COUNT [-b BASE] [-d DIR] [-p PREFIX] [-C REPO]
# Makes COUNT worktrees beside the repo, PREFIX-001 ... (agent-001 ...), each on a branch of its own that starts
# at BASE; one that is there already is reused as it is, a broken one is mended (by repair-worktree.sh).
#   -b BASE    branch, tag or commit to start from (default: what the main worktree has checked out)
#   -d DIR     where they go (default: $FARM_WORKTREES, else <repo>-farm beside the repo)
# Prints one line a worktree: name<TAB>branch<TAB>path<TAB>created|reused  (backslash, tab, newline, CR escaped)
# Exit: 0 ok, 1 git or a setup failed, 2 usage, 3 no such base or no commit, 4 something is in the way
set -euo pipefail
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }
run_git() { git -c core.hooksPath=/dev/null -c core.filesRefLockTimeout=10000 -c core.packedRefsTimeout=30000 "$@" >&2; }

find_start() { # BASE -> the commit to start from
  local ref
  for ref in "refs/heads/$1" "$1" "refs/remotes/origin/$1"; do
    git -C "$main" rev-parse -q --verify "$ref^{commit}" 2>/dev/null && return
  done
  if [ "$1" = HEAD ]; then fail 3 "$main has no commit yet" "git commit --allow-empty -m 'first commit'"; fi
  fail 3 "no branch or commit $1 in $main; there are: $(git -C "$main" for-each-ref --format='%(refname:short)' refs/heads | tr '\n' ' ')"
}

find_admin_dir() { # WORKTREE -> sets admin_dir, its folder in the common git dir (no fork: this is the way of reuse)
  local link=''
  IFS= read -r -d '' link 2>/dev/null <"$1/.git" || :
  link=${link%$'\n'} admin_dir=${link#gitdir: }
  case $admin_dir in "$link") return 1 ;; /*) ;; *) admin_dir=$1/$admin_dir ;; esac
  [ -s "$admin_dir/HEAD" ] && [ -s "$admin_dir/commondir" ] && [ "${admin_dir%/*}" -ef "$common/worktrees" ]
}

is_known() { case $known in *$'\n'"$1/.git"$'\n'*) ;; *) return 1 ;; esac; }
is_ready() { find_admin_dir "$1" && [ -e "$admin_dir/farm-ready" ]; }
is_free() { [ ! -L "$1" ] && { [ ! -e "$1" ] || { [ -d "$1" ] && [ -z "$(ls -A "$1")" ]; }; }; }

sort_out() { # which names have to be made; what is broken is mended first, and no work in it is lost
  local number name path known
  known=$'\n'$(cat "$common"/worktrees/*/gitdir 2>/dev/null || :)$'\n'
  for ((number = 1; number <= count; number++)); do
    printf -v name '%s-%03d' "$prefix" "$number"
    path=$dir/$name-worktree
    if is_known "$path" && is_ready "$path"; then names+=("$name"); continue; fi
    if is_known "$path" || ! is_free "$path"; then
      "$here/repair-worktree.sh" -C "$main" -a "$name" "$path" >&2 ||
        { say "$name cannot be used: $path" "mv it aside"; code=4; continue; }
    fi
    names+=("$name")
    if ! is_ready "$path"; then fresh+=("$name"); fi
  done
}

add_worktree() { # NAME: git's entry and the branch, no files yet
  local branch=farm/$1/work from=$start how=(--no-track -B "farm/$1/work")
  case $unmerged in *"/$branch"$'\n'*) from=$branch how=(); say "$branch has commits of its own and is used as it is" ;; esac
  run_git -C "$main" worktree add -q --lock --no-checkout ${how[@]+"${how[@]}"} -- "$dir/$1-worktree" "$from"
}

check_out() { # NAME: its files, its setup, then the mark that all of it is done
  local path=$dir/$1-worktree admin_dir
  run_git -c "checkout.workers=$workers" -C "$path" reset -q --hard --no-recurse-submodules || return 1
  if [ -e "$main/.worktreeinclude" ] || [ -e "$main/.farm/setup" ] || [ -e "$path/.farm/setup" ]; then
    if [ -x "$here/setup-worktree.sh" ]; then "$here/setup-worktree.sh" -C "$main" "$path" >&2 9>&- || return 1; fi
  fi
  find_admin_dir "$path" && : >"$admin_dir/farm-ready"
}

make_fresh() { # NAME...: entries one after the other, their files on all cores meanwhile
  local name unmerged cores workers pids=() first=0
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || printf 2)
  workers=$((cores > $# ? cores / $# : 1))
  unmerged=$(git -C "$main" for-each-ref --no-merged "$start" --format='%(refname)' "refs/heads/farm/$prefix-*/work")$'\n'
  for name in "$@"; do
    if ! find_admin_dir "$dir/$name-worktree" && ! add_worktree "$name"; then code=1; continue; fi
    check_out "$name" & pids+=($!)
    if [ $((${#pids[@]} - first)) -ge "$cores" ]; then wait "${pids[first]}" || code=1; first=$((first + 1)); fi
  done
  while [ "$first" -lt "${#pids[@]}" ]; do wait "${pids[first]}" || code=1; first=$((first + 1)); done
  if [ -e "$dir/$1-worktree/.gitmodules" ]; then say 'submodules are left empty' 'git submodule update --init in .farm/setup'; fi
}

print_rows() { # a row for each worktree that is complete
  local name path head state
  for name in "$@"; do
    path=$dir/$name-worktree state=reused
    is_ready "$path" || continue
    IFS= read -r head <"$admin_dir/HEAD" || :
    case $head in 'ref: refs/heads/'*) head=${head#ref: refs/heads/} ;; *) head=- ;; esac
    case " ${fresh[*]-} " in *" $name "*) state=created ;; esac
    path=${path//\\/\\\\} path=${path//$'\t'/\\t} path=${path//$'\n'/\\n} path=${path//$'\r'/\\r}
    printf '%s\t%s\t%s\t%s\n' "$name" "$head" "$path" "$state"
  done
}

main() {
  local count='' base=HEAD dir=${FARM_WORKTREES-} prefix=agent repo=. here option
  local common main start admin_dir='' names=() fresh=() code=0
  while getopts n:b:d:p:C:h option; do
    case $option in
      n) count=$OPTARG ;; b) base=$OPTARG ;; d) dir=$OPTARG ;; p) prefix=$OPTARG ;; C) repo=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  case $count in '' | 0* | *[!0-9]*) fail 2 "COUNT must be a whole number above 0, not '$count'" 'mk-worktrees.sh -n 10' ;; esac
  case $prefix in '' | *[!A-Za-z0-9_-]* | -*) fail 2 "PREFIX must be letters, digits, - and _, not '$prefix'" ;; esac
  here=$(dirname -- "$0")
  common=$(git -C "$repo" rev-parse --git-common-dir 2>&1) || fail 2 "${common#fatal: }" 'mk-worktrees.sh -C REPO -n 10'
  common=$(CDPATH='' cd -- "$repo" && cd -P -- "$common" && pwd -P)
  main=${common%/.git}
  start=$(find_start "$base") || exit
  dir=$(mkdir -p -- "${dir:=${main%.git}-farm}" && CDPATH='' cd -P -- "$dir" && pwd -P) || exit 1
  # Descriptor 9 holds the lock until this script and every git that it started have ended, even after a kill.
  { exec 9>>"$common/farm-worktrees.lock"; } 2>/dev/null || fail 1 "cannot write $common/farm-worktrees.lock"
  if command -v flock >/dev/null; then flock 9; else perl -e 'open(F, ">&=9") && flock(F, 2) or die "flock: $!\n"'; fi
  sort_out
  if [ "${#fresh[@]}" -gt 0 ]; then make_fresh "${fresh[@]}"; fi
  print_rows ${names[@]+"${names[@]}"}
  return "$code"
}

main "$@"
