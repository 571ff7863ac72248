#!/usr/bin/env bash
# Usage: mk-worktrees.sh -n COUNT [-b BASE] [-d DIR] [-p PREFIX] [-C REPO]
# Makes COUNT worktrees beside the repo, PREFIX-001 ... (agent-001 ...), each on its own branch from
# BASE; one that is there already is reused as it is, a broken one is mended.
#   -b BASE    branch, tag or commit to start from (default: what the main worktree has checked out)
#   -d DIR     where they go (default: $FARM_WORKTREES, else <repo>-farm beside the repo)
# Beside it: repair-worktree.sh (else a broken one stays so), setup-worktree.sh (else no setup runs)
# Prints a line each: name<TAB>branch<TAB>path<TAB>created|reused  (\\ \t \n \r escaped)
# Exit: 0 ok, 1 git or a setup failed, 2 usage, 3 no such base or no commit, 4 something in the way
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done

say() { printf '%s\n' "farm: $1" ${2:+"  try: $2"} >&2; } # WHAT [HINT]
fail() { say "$2" "${3-}"; exit "$1"; } # CODE WHAT [HINT]
run_git() { # git without hooks, which waits for the others' locks
  ${box[@]+"${box[@]}"} git -c core.hooksPath=/dev/null -c core.fsmonitor=false \
    -c core.filesRefLockTimeout=10000 -c core.packedRefsTimeout=30000 "$@" >&2
}

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

find_start() { # BASE -> the commit to start from
  local ref there
  for ref in "refs/heads/$1" "$1" "refs/remotes/origin/$1"; do
    git -C "$main" rev-parse -q --verify "$ref^{commit}" 2>/dev/null && return
  done
  [ "$1" != HEAD ] || fail 3 "$main has no commit yet" "git commit --allow-empty -m 'first commit'"
  there=$(git -C "$main" for-each-ref --format='%(refname:short)' refs/heads | tr '\n' ' ')
  fail 3 "no branch or commit $1 in $main; there are: $there"
}

find_admin_dir() { # WORKTREE -> sets admin_dir, its folder in the common git dir, without a fork
  local link=''
  IFS= read -r -d '' link 2>/dev/null <"$1/.git" || :
  link=${link%$'\n'} admin_dir=${link#gitdir: }
  case $admin_dir in "$link") return 1 ;; /*) ;; *) admin_dir=$1/$admin_dir ;; esac
  [ -f "$admin_dir/HEAD" ] && [ -s "$admin_dir/HEAD" ] && [ -s "$admin_dir/commondir" ] &&
    [ "${admin_dir%/*}" -ef "$common/worktrees" ]
}

has_setup() { [ -e "$main/.worktreeinclude" ] || [ -e "$main/.farm" ] || [ -e "$1/.farm" ]; }
is_known() { case $known in *$'\n'"$1/.git"$'\n'*) ;; *) return 1 ;; esac; }
is_ready() { find_admin_dir "$1" && [ -e "$admin_dir/farm-ready" ]; }
is_free() { [ ! -L "$1" ] && { [ ! -e "$1" ] || { [ -d "$1" ] && [ -z "$(ls -A "$1")" ]; }; }; }

sort_out() { # which names have to be made; what is broken is mended first, and no work in it lost
  local number name path known
  known=$'\n'$(cat "$common"/worktrees/*/gitdir 2>/dev/null || :)$'\n'
  for ((number = 1; number <= count; number++)); do
    printf -v name '%s-%03d' "$prefix" "$number"
    path=$dir/$name-worktree
    if is_known "$path" && is_ready "$path"; then names+=("$name"); continue; fi
    { ! is_known "$path" && is_free "$path"; } ||
      "$here/repair-worktree.sh" -C "$main" -a "$name" "$path" >&2 ||
      { say "$name cannot be used: $path" "mv it aside"; code=4; continue; }
    names+=("$name")
    is_ready "$path" || fresh+=("$name")
  done
}

add_worktree() { # NAME: git's entry and the branch, no files yet
  local branch=farm/$1/work from=$start how=(--no-track -B "farm/$1/work")
  case $unmerged in *"/$branch"$'\n'*) from=$branch how=() ;; esac
  [ "$from" = "$start" ] || say "$branch has commits of its own and is used as it is"
  [ -z "$has_branches" ] || from=$branch how=()
  run_git -C "$main" worktree add -q --lock --no-checkout ${how[@]+"${how[@]}"} \
    -- "$dir/$1-worktree" "$from"
}

check_out() { # NAME: its files, its setup, then the mark that all of it is done
  local path=$dir/$1-worktree tame=$here/sandbox/tame-filters.sh admin_dir box=()
  [ "${FARM_ISOLATE:-none}" = none ] || box=(bash "$tame" tree "$main" "$path")
  run_git -c checkout.workers="$workers" -C "$path" reset -q --hard --no-recurse-submodules &&
    { ! has_setup "$path" || ! [ -x "$here/setup-worktree.sh" ] ||
      "$here/setup-worktree.sh" -C "$main" "$path" >&2 9>&-; } &&
    find_admin_dir "$path" && rm -f "$admin_dir/farm-ready" && : >"$admin_dir/farm-ready"
}

make_fresh() { # NAME...: entries one after the other, their files on all cores meanwhile
  local name unmerged cores workers pids=() first=0 theirs="refs/heads/farm/$prefix-*/work"
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || printf 2)
  workers=$((cores > $# ? cores / $# : 1))
  unmerged=$(git -C "$main" for-each-ref --no-merged "$start" --format='%(refname)' "$theirs")$'\n'
  # One git for all branches, where none of them is there yet.
  ! printf "create refs/heads/farm/%s/work $start\n" "$@" |
    run_git -C "$main" update-ref --stdin 2>/dev/null || has_branches=1
  for name in "$@"; do
    find_admin_dir "$dir/$name-worktree" || add_worktree "$name" || { code=1; continue; }
    check_out "$name" & pids+=($!)
    [ $((${#pids[@]} - first)) -lt "$cores" ] || wait "${pids[first++]}" || code=1
  done
  while [ "$first" -lt "${#pids[@]}" ]; do wait "${pids[first++]}" || code=1; done
  [ ! -e "$dir/$1-worktree/.gitmodules" ] ||
    say 'submodules are left empty' 'git submodule update --init in .farm/setup'
}

print_rows() { # NAME...: a row for each worktree that is complete
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
  local common main start admin_dir='' names=() fresh=() has_branches='' code=0 box=()
  while getopts n:b:d:p:C:h option; do
    case $option in
      n) count=$OPTARG ;; b) base=$OPTARG ;; d) dir=$OPTARG ;; p) prefix=$OPTARG ;;
      C) repo=$OPTARG ;; h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  [[ $count =~ ^[1-9][0-9]*$ ]] || fail 2 "a COUNT of '$count'; it is 1 or more" "${0##*/} -n 10"
  [[ $prefix =~ ^[A-Za-z0-9_][A-Za-z0-9_-]*$ ]] ||
    fail 2 "PREFIX must be letters, digits, - and _, not '$prefix'"
  here=$(dirname -- "$0")
  common=$(git -C "$repo" rev-parse --git-common-dir 2>&1) ||
    fail 2 "${common#fatal: }" 'mk-worktrees.sh -C REPO -n 10'
  common=$(cd -- "$repo" && cd -P -- "$common" && pwd -P)
  find_main; start=$(find_start "$base") || exit
  dir=$(mkdir -p -- "${dir:=${main%.git}-farm}" && cd -P -- "$dir" && pwd -P) || exit 1
  # Inside a repo (FARM_WORKTREES=wt, a submodule) they are none of its files.
  [ -e "$dir/.gitignore" ] || ! git -C "$dir" rev-parse 2>/dev/null || echo '*' >"$dir/.gitignore"
  # Descriptor 9 holds the lock until this and every git that it started have ended, even by a kill.
  { exec 9>>"$common/farm-worktrees.lock"; } 2>/dev/null ||
    fail 1 "cannot write $common/farm-worktrees.lock"
  flock 9 2>/dev/null || perl -e 'open(F, ">&=9") && flock(F, 2) or die "flock: $!\n"'
  sort_out
  [ "${#fresh[@]}" -eq 0 ] || make_fresh "${fresh[@]}"
  print_rows ${names[@]+"${names[@]}"} && return "$code"
}
main "$@"
