#!/usr/bin/env bash
# Usage: look.sh work [-C REPO] -b TARGET <ROWS          name<TAB>branch<TAB>path of each worktree
#        look.sh partners [-C REPO] -b TARGET COMMIT
#        look.sh broken [-C REPO] -b TARGET <LINES       id<TAB>commit
# Looks, and changes nothing, not even a lock is taken.
# work: how far the work in each worktree has come since its branch left TARGET, a line each as soon
#   as it is known: name<TAB>commits<TAB>lines (added and removed ones of tracked files, committed
#   or not). A worktree that cannot be read has no line.
# partners: which landed tasks changed files that COMMIT's work changes too, most files in common
#   first: task<TAB>files in common, separated by spaces
# broken: id<TAB>what git said for each commit of which git cannot read every object that TARGET
#   lacks: one is gone, empty or garbled. It reads them all, so ask when something has failed.
# In fields, backslash, tab, newline and return are written \\ \t \n \r.
# Exit: 0 ok (also when there is none), 1 git was ended, 2 usage, 3 no repo, branch or commit, or it
#   cannot be read, 6 no git
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
export GIT_OPTIONAL_LOCKS=0 LC_ALL=C

# -- work

count_commits() { # BRANCH... -> lines: branch<TAB>commits that TARGET has not
  git -C "$repo" log --ignore-missing --format=%S --source "${@/#/refs/heads/}" \
    --not "$target" -- 2>/dev/null |
    awk '{ n[$0]++ } END { for (name in n) printf "%s\t%d\n", substr(name, 12), n[name] }'
}

probe() { # NAME BRANCH PATH
  local commits=0 words word last='' lines=0
  words=$(git -C "$3" -c core.fsmonitor=false -c diff.autoRefreshIndex=false diff --merge-base \
    --shortstat --no-ext-diff --no-textconv --ignore-submodules=dirty "$target" \
    -- 2>/dev/null) || return 0
  for word in $words; do # 3 files changed, 10 insertions(+), 2 deletions(-)
    case $word in insertion* | deletion*) lines=$((lines + last)) ;; esac
    last=$word
  done
  case $'\n'$counts in *$'\n'"$2"$'\t'*) commits=${counts#*"$2"$'\t'} ;; esac
  printf '%s\t%s\t%s\n' "$1" "${commits%%$'\n'*}" "$lines"
}

look_at_work() {
  local name branch path rest counts names=() branches=() paths=() i first
  command -v git >/dev/null ||
    die 6 'git is missing' 'apt-get install git | dnf install git | brew install git'
  while IFS=$'\t' read -r name branch path rest || [ -n "$name" ]; do
    printf -v path %b "$path"
    names+=("$name") branches+=("$branch") paths+=("$path")
  done
  if [ "${#names[@]}" -eq 0 ]; then return; fi
  if git -C "$repo" show-ref -q --verify "refs/heads/$target"; then
    target=refs/heads/$target # a tag may have that name too
  fi
  counts=$(count_commits "${branches[@]}") || true
  # Six at once, and not all: whoever waits only for a while shall see some of them.
  for ((first = 0; first < 6; first++)); do
    for ((i = first; i < ${#names[@]}; i += 6)); do
      probe "${names[i]}" "${branches[i]}" "${paths[i]}"
    done &
  done
  wait
}

# -- partners

look_for_partners() { # COMMIT
  local base mine
  base=$(git -C "$repo" merge-base "refs/heads/$target" "$1" 2>/dev/null) || exit 3
  mine=$(git -C "$repo" diff --name-only "$base" "$1" | sort)
  git -C "$repo" log --first-parent --diff-merges=first-parent --name-only -n 200 \
    --format='farm-task %(trailers:key=Farm-Task,valueonly,separator=%x2C)' \
    "$base..refs/heads/$target" |
    awk -v mine="$mine" '
      BEGIN { n = split(mine, names, "\n"); for (i = 1; i <= n; i++) wanted[names[i]] = 1 }
      /^farm-task / { task = $2; next }
      task != "" && ($0 in wanted) {
        files[task] = files[task] (files[task] == "" ? "" : " ") $0
        count[task]++
      }
      END { for (task in files) printf "%d\t%s\t%s\n", count[task], task, files[task] }' |
    sort -rn | cut -f2-
}

# -- broken

# Prints what git complains of: rev-list of what is gone, cat-file of what it cannot unpack. A
# complaint is no failure to it.
read_all() { # COMMIT
  git -C "$repo" rev-list --objects "$1" --not "refs/heads/$target" | cut -d ' ' -f 1 |
    git -C "$repo" cat-file --batch
}

look_for_broken() {
  local id commit said code escaped
  git -C "$repo" ls-tree -r --name-only "refs/heads/$target" >/dev/null 2>&1 ||
    die 3 "the branch $target cannot be read" "git -C $repo fsck"
  while IFS=$'\t' read -r -u 3 id commit; do
    code=0
    said=$(read_all "$commit" 2>&1 >/dev/null) || code=$?
    case $code:$said in
      0:) continue ;;
      0:* | 128:*) ;;
      *) die 1 "git ended with $code: ${said%%$'\n'*}" "git -C $repo fsck" ;;
    esac
    escape "$said"
    printf '%s\t%s\n' "$id" "$escaped"
  done 3<&0
}

main() {
  local verb=${1-} repo=. target='' option
  if [ "$verb" = -h ]; then usage; exit 0; fi
  shift || true
  while getopts C:b:h option; do
    case $option in
      C) repo=$OPTARG ;;
      b) target=$OPTARG ;;
      h) usage; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  case $verb:${target:+yes}:$# in
    work:yes:0) look_at_work ;;
    partners:yes:1) look_for_partners "$1" ;;
    broken:yes:0) look_for_broken ;;
    work::*) die 2 'against which branch?' 'mk-worktrees.sh | look.sh work -b main' ;;
    *) die 2 'work, partners or broken, and against which branch?' 'look.sh -h' ;;
  esac
}
main "$@"
