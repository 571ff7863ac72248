#!/usr/bin/env bash
# Usage: rescue.sh save [-C REPO] [-a AGENT] WORKTREE
#        rescue.sh list [-C REPO] | show [-C REPO] REF | restore [-C REPO] REF DIR
# save: keeps all that WORKTREE holds uncommitted (staged, unstaged, untracked, edits that git was
#   told not to look at; not ignored) as a commit on HEAD, whose second parent holds what is staged
#   and not in the files; also in the middle of a merge or rebase, with what that has put aside; and
#   a detached HEAD that no ref reaches. Its index, HEAD and files stay untouched.
#   Prints ref<TAB>sha; nothing when nothing is unsaved. The same state twice is kept once.
# list: ref<TAB>sha<TAB>date<TAB>subject    show: files and diff    restore: by restore-rescue.sh
# Exit: 0 ok, 1 git failed, 2 usage, 3 not found, 4 files in the way, 6 no restore-rescue.sh
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done
export GIT_OPTIONAL_LOCKS=0 TZ=UTC
scratch=''

fail() { printf '%s\n' "farm: $2" ${3:+"  try: $3"} >&2; exit "$1"; } # CODE WHAT [HINT]
swap_ends() { tr '\0\n' '\n\0'; } # names that end in NUL become lines, and back: for grep

own_index() { # git in the worktree, on the scratch index, with objects that survive a power cut
  GIT_INDEX_FILE=$scratch/index git -C "$top" -c core.safecrlf=false -c core.fsyncMethod=batch \
    -c core.fsync=committed,loose-object,reference "$@"
}

make_commit() { # TREE DATE MESSAGE -p PARENT...: with the configured identity, or the farm's own
  local -x GIT_AUTHOR_DATE=$2 GIT_COMMITTER_DATE=$2
  own_index commit-tree "$1" "${@:4}" -m "$3" 2>/dev/null ||
    GIT_AUTHOR_NAME=farm GIT_AUTHOR_EMAIL=farm@localhost \
      GIT_COMMITTER_NAME=farm GIT_COMMITTER_EMAIL=farm@localhost \
      own_index commit-tree "$1" "${@:4}" -m "$3"
}

# Names of files that git was told not to look at and that are there, each ended by NUL.
list_unwatched() { # WORKTREE
  local entry
  git -C "$1" ls-files -v -z | swap_ends | { LC_ALL=C grep -a '^[a-zS] ' || :; } | swap_ends |
    while IFS= read -r -d '' entry; do
      if [ -e "$1/${entry#? }" ] || [ -L "$1/${entry#? }" ]; then printf '%s\0' "${entry#? }"; fi
    done
}

add_everything() { # to the scratch index; the files of a repo inside the worktree are kept as files
  local inner marked=$scratch/unwatched
  list_unwatched "$top" >"$marked" 2>/dev/null || : >"$marked" # a damaged index has no marks
  if [ -s "$marked" ]; then
    own_index update-index --no-assume-unchanged -z --stdin <"$marked" || return 1
    own_index update-index --no-skip-worktree -z --stdin <"$marked" || return 1
  fi
  own_index add --sparse -u --ignore-errors :/ >&2 || return 1
  own_index ls-files -o --exclude-standard -z | swap_ends >"$scratch/new" || return 1
  { grep -av '/$' "$scratch/new" || :; } | swap_ends |
    own_index update-index --add --remove -z --stdin >&2 || return 1
  { grep -a '/$' "$scratch/new" || :; } | swap_ends >"$scratch/inner"
  while IFS= read -r -d '' inner; do
    find "$top/$inner" -name .git -prune -o \( -type f -o -type l \) -print0
  done <"$scratch/inner" | own_index update-index --add --remove -z --stdin >&2
}

pin() { # SHA: under the first free name of this second
  local stem ref turn error
  stem=refs/farm/rescue/$agent/$(date -u +%Y%m%dT%H%M%SZ) ref=$stem
  for ((turn = 1; turn < 100; turn++)); do
    error=$(own_index update-ref "$ref" "$1" '' 2>&1) &&
      { printf '%s\t%s\n' "$ref" "$1"; return; }
    ref=$stem-$turn
  done
  fail 1 "cannot write $ref: $error"
}

save_uncommitted() { # HEAD BRANCH; 3 when nothing is uncommitted after all
  local head=$1 tree base staged text known parents=()
  local form='%(tree) %(parent) %(refname)%09%(objectname)'
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/farm-rescue.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  # -p: a file counts as unchanged only when it is older than the index, whose date stays.
  if ! cp -p -- "$git_dir/index" "$scratch/index" 2>/dev/null ||
    ! own_index ls-files >/dev/null 2>&1; then
    rm -f "$scratch/index"
    own_index read-tree "${head:---empty}"
  fi
  staged=$(own_index write-tree 2>/dev/null) || staged=''
  add_everything || add_everything ||
    fail 1 "not everything in $top could be kept" "git -C $top status"
  tree=$(own_index write-tree)
  [ -z "$head" ] || parents=(-p "$head")
  base=$(own_index rev-parse -q --verify "$head^{tree}" || own_index mktree </dev/null)
  if [ "$tree" = "$base" ] && [ "${staged:-$base}" = "$base" ]; then return 3; fi
  if [ "${staged:-$base}" != "$base" ] && [ "$staged" != "$tree" ]; then
    staged=$(make_commit "$staged" '2000-01-01T00:00:00Z' "staged by $agent" \
      ${parents[@]+"${parents[@]}"})
    parents+=(-p "$staged")
  fi
  staged="${parents[*]-}" staged=${staged//-p /}
  known=$'\n'$(own_index for-each-ref --format="$form" "refs/farm/rescue/$agent")$'\n'
  case $known in *$'\n'"$tree $staged refs/"*) ;; *) known='' ;; esac
  known=${known#*$'\n'"$tree $staged "}
  if [ -n "$known" ]; then printf '%s\n' "${known%%$'\n'*}"; return; fi
  text="rescue: unsaved work of $agent on $2"$'\n\n'
  text=$text"Agent: $agent"$'\n'"Branch: $2"$'\n'"Base: ${head:-none}"
  pin "$(make_commit "$tree" "$(date +%s) +0000" "$text" ${parents[@]+"${parents[@]}"})"
}

save() { # WORKTREE
  local status head branch git_dir top found
  found=$(git -C "$1" rev-parse --show-cdup --absolute-git-dir 2>&1) ||
    fail 3 "no worktree: $1" 'git worktree list'
  top=$1/${found%%$'\n'*} git_dir=${found#*$'\n'}
  [ -n "$agent" ] || agent=$(cd -- "$top" && pwd) agent=${agent##*/} agent=${agent%-worktree}
  agent=${agent//[^A-Za-z0-9_-]/-}
  status=$(git -C "$top" status --porcelain=v2 --branch -unormal --ignore-submodules=dirty \
    2>/dev/null) || status="branch.oid $(git -C "$top" rev-parse HEAD)"$'\nbranch.head unknown\n! '
  { cat "$git_dir"/rebase-*/autostash "$git_dir/MERGE_AUTOSTASH" 2>/dev/null || :; } |
    sed "s|.*|update refs/farm/rescue/$agent/autostash-& &|" | git -C "$top" update-ref --stdin
  head=${status#*branch.oid } head=${head%%$'\n'*} head=${head#'(initial)'}
  branch=${status#*branch.head } branch=${branch%%$'\n'*}
  [ -z "$(list_unwatched "$top" 2>/dev/null | tr -d '\0' | head -c 1)" ] ||
    status=$status$'\n! some files are not looked at'
  case $status in *$'\n'[12u?!]' '*) if save_uncommitted "$head" "$branch"; then return; fi ;; esac
  if [ "$branch" != '(detached)' ]; then return; fi
  [ -n "$(git -C "$top" for-each-ref --count=1 --contains "$head")" ] || pin "$head"
}

main() {
  local verb=${1-} repo=. agent='' option form
  [ "$verb" = -h ] || shift || :
  while getopts C:a:h option; do
    case $option in
      C) repo=$OPTARG ;; a) agent=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  case $verb:$# in
    save:1) save "$1" ;;
    list:0)
      form='%(committerdate:format-local:%Y-%m-%dT%H:%M:%SZ)%09%(subject)'
      git -C "$repo" for-each-ref --format="%(refname)%09%(objectname)%09$form" refs/farm/rescue ;;
    show:1)
      git -C "$repo" --no-pager show --first-parent -m --stat -p --end-of-options "$1" -- ||
        fail 3 "no rescued work at $1" 'rescue.sh list' ;;
    restore:2)
      [ -x "$(dirname -- "$0")/restore-rescue.sh" ] ||
        fail 6 'restore-rescue.sh is not beside this' "git -C $repo worktree add --detach DIR $1"
      exec "$(dirname -- "$0")/restore-rescue.sh" -C "$repo" "$1" "$2" ;;
    *) fail 2 'save, list, show or restore, and what?' 'rescue.sh -h' ;;
  esac
}
main "$@"
