#!/usr/bin/env bash
# Usage: chain.sh -b TARGET [-B BASE_SHA] [-s merge|squash|rebase] [-C REPO] <ENTRIES
# Merge entries one on top of the other; no ref, index or checkout is touched, and the same input
# gives the same shas.
# Reads: id<TAB>commit<TAB>epoch<TAB>agent<TAB>title, the first to land first (fields escaped)
# Prints: base<TAB>-<TAB>sha<TAB>tree, then for each entry: id, status, commit, tree, detail
#   ok: the chain's commit and tree after it; detail: sha:tree of those that rebase puts before it
#   landed: it is in the base    empty: it changes nothing    missing: no such commit
#   unrelated: no common ancestor    conflict: with the base itself; detail: paths (blanks as \x20)
#   gitlink: it links to a commit that nobody else has; detail: the path, and what is missing
#   held: merges with the base but not with the chain; detail: the entry it is behind
# Environment: FARM_CONFLICTS=DIR gets ID.txt, a conflict's messages and hunks
#   FARM_MERGE=worktree: as git < 2.38 must merge
# Exit: 0 ok, 1 git failed, 2 usage or no repo, 3 no such branch
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
scratch=

# A folder of this process's own to merge in, with the base's attributes; those of the dead go.
open_scratch() {
  local old
  scratch=$GIT_DIR/farm-scratch.$$
  for old in "$GIT_DIR"/farm-scratch.*; do
    if [ "$old" = "$scratch" ] || ! kill -0 "${old##*.}" 2>/dev/null; then rm -rf "$old"; fi
  done
  trap 'rm -rf "$scratch"' EXIT
  mkdir -p "$scratch/tree" && export GIT_WORK_TREE=$scratch/tree
  GIT_INDEX_FILE=$scratch/index git -C "$scratch/tree" checkout -q "$base" -- \
    ':(glob)**/.gitattributes' 2>"$scratch/errors" || true
  merge=(git -C "$scratch/tree" merge-tree --write-tree -z --name-only)
  if [ "${FARM_MERGE-}" = worktree ] ||
    ! "${merge[@]}" "$base" "$base" >"$scratch/errors" 2>&1; then
    merge=("$here/scratch.sh" "$scratch")
  fi
}

# Merge two commits into $scratch/$3; sets `tree`. Returns 0 clean, 1 conflict, 2 unrelated.
merge_pair() {
  local code=0
  "${merge[@]}" "$1" "$2" >"$scratch/$3" 2>"$scratch/errors" </dev/null || code=$?
  if [ "$code" -gt 1 ]; then
    git merge-base "$1" "$2" >"$scratch/$3" || return 2
    die 1 "git could not merge $2 into $1: $(head -n 1 "$scratch/errors")" \
      "git fsck --connectivity-only"
  fi
  IFS= read -r -d '' tree <"$scratch/$3"
  return "$code"
}

# Sets status, detail and tree; what is not plainly ok is merged with the base alone as well.
classify() { # ID COMMIT
  local chain=0 alone=0 wanted read_conflict=$here/read-conflict.sh
  merge_pair "$join" "$2" chain || chain=$?
  [ "$chain" -ne 0 ] || [ "$tree" = "$tip_tree" ] || return 0
  wanted=$tree
  merge_pair "$base" "$2" alone || alone=$?
  case $chain$alone in *2*) status=unrelated ;; 11) status=conflict ;; 10) status=held ;; esac
  if [ "$alone" -eq 0 ] && [ "$tree" = "$base_tree" ]; then status=empty; fi
  tree=$wanted
  case $status in
    conflict)
      detail=$("$read_conflict" paths "$base" "$2" "$target" "$1" <"$scratch/alone") ;;
    held)
      set -- "$join" "$2" "$target and the work ahead" "$1" "$base"
      detail=$("$read_conflict" cause "$@" <"$scratch/chain") ;;
  esac
}

# Put entry (id, commit, epoch, agent, title) on the tip, its texts made one line without control
# characters. In every style the next one is merged with `join`, which knows what was merged before:
# so stacked work merges.
commit_entry() {
  local text trailers plain=()
  for text in "$1" "$4" "$5"; do
    printf -v text '%b' "$text"
    text=${text//[[:cntrl:]]/ } text=${text//$'\xc2'[$'\x80'-$'\x9f']/ }
    text=${text#"${text%%[! ]*}"}
    plain[${#plain[@]}]=${text%"${text##*[! ]}"}
  done
  set -- "${plain[0]}" "$2" "${3%%[!0-9]*}" "${plain[1]}" "${plain[2]}"
  export GIT_AUTHOR_DATE="@${3:-0} +0000" GIT_COMMITTER_DATE="@${3:-0} +0000"
  trailers="Farm-Task: $1"$'\n'"Farm-Agent: $4"$'\n'"Farm-Tested-Tree: $tree"
  join=$(git commit-tree "$tree" -p "$join" -p "$2" -m "Merge $1${5:+: $5}" -m "$trailers")
  set -- "$2" "${5:-$1}"
  case $style in
    merge) tip=$join ;;
    squash)
      set -- "$base" "$1" "$2" "$trailers" "$scratch/message" "$tree" "$tip"
      tip=$("$here/squash-message.sh" "$@") ;;
    rebase)
      set -- "$tip" "$1" "$tree" "$2" "$trailers" "${merge[@]}"
      detail=$("$here/replay-commits.sh" "$@") tip=${detail%% *} ;;
  esac
  tip_tree=$tree
}

# Whether the entry links to a commit of another repo that nobody else has. Sets detail.
find_bad_link() {
  local links
  links=$(git -c core.quotePath=false diff-tree -r "$tip_tree" "$tree" |
    grep '^:[0-9]* 160000 ') || return 1
  detail=$("$here/find-bad-link.sh" "$tree" <<<"$links")
  [ -n "$detail" ]
}

merge_entries() {
  local input known sha kind id epoch agent title fresh status detail tree n=0 shas=()
  input=$(grep . || true)
  if [ -z "$input" ]; then return; fi
  known=$(printf '%s\n' "$input" | cut -f 2 | sed 's/$/^{commit}/' | git cat-file --batch-check)
  while read -r sha kind _; do
    if [ "$kind" = commit ]; then shas[${#shas[@]}]=$sha; else shas[${#shas[@]}]=; fi
  done <<<"$known"
  fresh=$(printf '%s\n' "^$base" "${shas[@]}" | grep . | git rev-list --stdin)
  while IFS=$'\37' read -r -u 3 id _ epoch agent title; do
    sha=${shas[n]} n=$((n + 1)) status=missing detail='' tree=-
    if [ -n "$sha" ]; then status=landed; fi
    case $fresh in *"${sha:-none}"*) status=ok && classify "$id" "$sha" ;; esac
    if [ "$status" = ok ] && find_bad_link; then status=gitlink; fi
    case $status in
      ok)
        commit_entry "$id" "$sha" "$epoch" "$agent" "$title"
        printf '%s\tok\t%s\t%s\t%s\n' "$id" "$tip" "$tree" "${detail#"$tip"}" ;;
      landed) printf '%s\tlanded\t%s\t%s\t\n' "$id" "$base" "$base_tree" ;;
      *) printf '%s\t%s\t-\t-\t%s\n' "$id" "$status" "$detail" ;;
    esac
  done 3<<<"${input//$'\t'/$'\37'}"
}

main() {
  local repo=. target='' base='' style=merge option base_tree tip join tip_tree merge
  while getopts ':b:B:s:C:h' option; do
    case $option in
      b) target=$OPTARG ;; B) base=$OPTARG ;; s) style=$OPTARG ;; C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "chain.sh -h" ;;
    esac
  done
  [[ $style:$target =~ ^(merge|squash|rebase):. ]] ||
    die 2 "a branch (-b) and a known style are needed" "chain.sh -h"
  [ -n "${FARM_PINNED-}" ] || exec "$here/pinned-git.sh" "$repo" "$here/${0##*/}" "$@"
  base=$(git rev-parse -q --verify "${base:-refs/heads/$target}^{commit}") ||
    die 3 "there is no branch $target" "git branch"
  base_tree=$(git rev-parse "$base^{tree}") tip_tree=$base_tree tip=$base join=$base
  open_scratch
  printf 'base\t-\t%s\t%s\n' "$base" "$base_tree"
  merge_entries
}
main "$@"
