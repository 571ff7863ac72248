#!/usr/bin/env bash
# Usage: rescue.sh save [-C REPO] [-a AGENT] WORKTREE
#        rescue.sh list [-C REPO] | show [-C REPO] REF | restore [-C REPO] REF DIR
# save: keeps all that WORKTREE holds uncommitted (staged, unstaged, untracked, not ignored; also in the middle of a
#   merge or rebase) as a commit on HEAD, and a detached HEAD that no ref reaches. Its index, HEAD and files stay
#   untouched. Where the staged content is another than the files', the commit's second parent holds it.
#   Prints ref<TAB>sha; nothing when nothing is unsaved. The same state twice is kept once.
# list: prints ref<TAB>sha<TAB>date<TAB>subject      show: its files and its diff      restore: see restore-rescue.sh
# Exit: 0 ok, 1 git failed, 2 usage, 3 not found, 4 files in the way of a restore
set -euo pipefail
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX
export GIT_OPTIONAL_LOCKS=0 TZ=UTC
scratch=''

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }
swap_ends() { tr '\0\n' '\n\0'; } # names that end in NUL become lines, and back: grep -z is GNU's alone

own_index() { # git in the worktree, on the scratch index, with objects that survive a power cut
  GIT_INDEX_FILE=$scratch/index git -C "$top" -c core.safecrlf=false -c core.fsyncMethod=batch \
    -c core.fsync=committed,loose-object,reference "$@"
}

make_commit() { # TREE DATE MESSAGE -p PARENT...: with the configured identity, or the farm's own
  local tree=$1 message=$3
  local -x GIT_AUTHOR_DATE=$2 GIT_COMMITTER_DATE=$2
  shift 3
  own_index commit-tree "$tree" "$@" -m "$message" 2>/dev/null ||
    GIT_AUTHOR_NAME=farm GIT_AUTHOR_EMAIL=farm@localhost GIT_COMMITTER_NAME=farm GIT_COMMITTER_EMAIL=farm@localhost \
      own_index commit-tree "$tree" "$@" -m "$message"
}

add_everything() { # into the scratch index; the files of a repo inside the worktree are kept as files
  local inner
  own_index add -u --ignore-errors :/ >&2 || return 1
  own_index ls-files -o --exclude-standard -z | swap_ends >"$scratch/new" || return 1
  { grep -av '/$' "$scratch/new" || :; } | swap_ends | own_index update-index --add --remove -z --stdin >&2 || return 1
  { grep -a '/$' "$scratch/new" || :; } | swap_ends >"$scratch/inner"
  while IFS= read -r -d '' inner; do
    find "$top/$inner" -name .git -prune -o \( -type f -o -type l \) -print0
  done <"$scratch/inner" | own_index update-index --add --remove -z --stdin >&2
}

pin() { # SHA: under the first free name of this second
  local stem ref turn error
  stem=refs/farm/rescue/$agent/$(date -u +%Y%m%dT%H%M%SZ) ref=$stem
  for ((turn = 1; turn < 100; turn++)); do
    if error=$(own_index update-ref "$ref" "$1" '' 2>&1); then printf '%s\t%s\n' "$ref" "$1"; return; fi
    ref=$stem-$turn
  done
  fail 1 "cannot write $ref: $error"
}

find_same() { # TREE PARENTS -> ref<TAB>sha of a rescue that holds just that
  local known
  known=$'\n'$(own_index for-each-ref --format='%(tree) %(parent) %(refname)%09%(objectname)' "refs/farm/rescue/$agent")$'\n'
  case $known in *$'\n'"$1 $2 refs/"*) known=${known#*$'\n'"$1 $2 "}; printf '%s\n' "${known%%$'\n'*}" ;; *) return 1 ;; esac
}

save_uncommitted() { # HEAD BRANCH; 3 when nothing is uncommitted after all
  local head=$1 tree base staged parents=()
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/farm-rescue.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  # -p: git takes a file as unchanged only when it is older than the index, so the copy must not look younger.
  if ! cp -p -- "$git_dir/index" "$scratch/index" 2>/dev/null || ! own_index ls-files >/dev/null 2>&1; then
    rm -f "$scratch/index"
    own_index read-tree "${head:---empty}"
  fi
  staged=$(own_index write-tree 2>/dev/null) || staged=''
  add_everything || add_everything || fail 1 "not everything in $top could be kept" "git -C $top status"
  tree=$(own_index write-tree)
  if [ -n "$head" ]; then parents=(-p "$head"); base=$(own_index rev-parse "$head^{tree}"); else base=$(own_index mktree </dev/null); fi
  if [ "$tree" = "$base" ] && [ "${staged:-$base}" = "$base" ]; then return 3; fi
  if [ "${staged:-$base}" != "$base" ] && [ "$staged" != "$tree" ]; then
    staged=$(make_commit "$staged" '2000-01-01T00:00:00Z' "staged by $agent" ${parents[@]+"${parents[@]}"})
    parents+=(-p "$staged")
  fi
  staged="${parents[*]-}" staged=${staged//-p /}
  if find_same "$tree" "$staged"; then return; fi
  pin "$(make_commit "$tree" "$(date +%s) +0000" "rescue: unsaved work of $agent on $2"$'\n\n'"Agent: $agent
Branch: $2
Base: ${head:-none}" ${parents[@]+"${parents[@]}"})"
}

save() { # WORKTREE
  local status head branch git_dir top found
  found=$(git -C "$1" rev-parse --show-cdup --absolute-git-dir 2>&1) || fail 3 "no worktree: $1" 'git worktree list'
  top=$1/${found%%$'\n'*} git_dir=${found#*$'\n'}
  if [ -z "$agent" ]; then agent=$(CDPATH='' cd -- "$top" && pwd) agent=${agent##*/} agent=${agent%-worktree}; fi
  agent=${agent//[^A-Za-z0-9_-]/-}
  status=$(git -C "$top" status --porcelain=v2 --branch --ignore-submodules=dirty 2>/dev/null) ||
    status="# branch.oid $(git -C "$top" rev-parse HEAD)"$'\n# branch.head unknown\n! its index cannot be read'
  head=${status#*branch.oid } head=${head%%$'\n'*} branch=${status#*branch.head } branch=${branch%%$'\n'*}
  if [ "$head" = '(initial)' ]; then head=''; fi
  case $status in *$'\n'[12u?!]' '*) if save_uncommitted "$head" "$branch"; then return; fi ;; esac
  if [ "$branch" = '(detached)' ] && [ -z "$(git -C "$top" for-each-ref --count=1 --contains "$head")" ]; then pin "$head"; fi
}

main() {
  local verb=${1-} repo=. agent='' option
  case $verb in save | list | show | restore) shift ;; -h) ;; *) fail 2 'save, list, show or restore?' 'rescue.sh -h' ;; esac
  while getopts C:a:h option; do
    case $option in
      C) repo=$OPTARG ;; a) agent=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  case $verb:$# in
    save:1) save "$1" ;;
    list:0) git -C "$repo" for-each-ref --format='%(refname)%09%(objectname)%09%(committerdate:format-local:%Y-%m-%dT%H:%M:%SZ)%09%(subject)' \
      refs/farm/rescue ;;
    show:1) git -C "$repo" --no-pager show --first-parent -m --stat --patch --end-of-options "$1" -- ||
      fail 3 "no rescued work at $1" 'rescue.sh list' ;;
    restore:2) exec "$(dirname -- "$0")/restore-rescue.sh" -C "$repo" "$1" "$2" ;;
    *) fail 2 "wrong number of arguments for $verb" 'rescue.sh -h' ;;
  esac
}

main "$@"
