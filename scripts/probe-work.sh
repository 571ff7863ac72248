#!/usr/bin/env bash
# Usage: probe-work.sh -b TARGET [-C REPO] <rows      rows: name<TAB>branch<TAB>path, as mk-worktrees.sh prints them
# Says how far the work in each worktree has come since its branch left TARGET: six of them at once, and without a lock.
# Prints one line a worktree, as soon as it is known: name<TAB>commits<TAB>lines (added and removed ones of tracked
# files, committed or not). A worktree that cannot be read has no line.
# Exit: 0 ok, 2 usage, 6 no git
set -euo pipefail
export GIT_OPTIONAL_LOCKS=0

say() { printf 'farm: %s\n' "$1" >&2; if [ -n "${2-}" ]; then printf '  try: %s\n' "$2" >&2; fi; }
fail() { say "$2" "${3-}"; exit "$1"; }

count_commits() { # BRANCH... -> lines: branch<TAB>commits that TARGET has not
  git -C "$repo" log --ignore-missing --format=%S --source "${@/#/refs/heads/}" --not "$target" -- 2>/dev/null |
    awk '{ count[$0]++ } END { for (name in count) printf "%s\t%d\n", substr(name, 12), count[name] }'
}

probe() { # NAME BRANCH PATH
  local commits=0 words word last='' lines=0
  words=$(git -C "$3" -c core.fsmonitor=false -c diff.autoRefreshIndex=false diff --merge-base --shortstat \
    --no-ext-diff --no-textconv "$target" -- 2>/dev/null) || return 0
  for word in $words; do # 3 files changed, 10 insertions(+), 2 deletions(-)
    case $word in insertion* | deletion*) lines=$((lines + last)) ;; esac
    last=$word
  done
  case $'\n'$counts in *$'\n'"$2"$'\t'*) commits=${counts#*"$2"$'\t'} ;; esac
  printf '%s\t%s\t%s\n' "$1" "${commits%%$'\n'*}" "$lines"
}

main() {
  local target='' repo=. option name branch path rest counts names=() branches=() paths=() i turn
  while getopts b:C:h option; do
    case $option in
      b) target=$OPTARG ;; C) repo=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  if [ -z "$target" ]; then fail 2 'against which branch?' 'mk-worktrees.sh | probe-work.sh -b main'; fi
  command -v git >/dev/null || fail 6 'git is missing' 'apt-get install git | dnf install git | brew install git'
  while IFS=$'\t' read -r name branch path rest || [ -n "$name" ]; do
    printf -v path %b "$path"
    names+=("$name") branches+=("$branch") paths+=("$path")
  done
  if [ "${#names[@]}" -eq 0 ]; then return; fi
  counts=$(count_commits "${branches[@]}") || true
  for ((turn = 0; turn < 6; turn++)); do # not all at once: whoever waits only for a while shall see some of them
    for ((i = turn; i < ${#names[@]}; i += 6)); do probe "${names[i]}" "${branches[i]}" "${paths[i]}"; done &
  done
  wait
}

main "$@"
