#!/usr/bin/env bash
# Usage: recover-landing.sh -b TARGET -o OLD -n NEW [-C REPO]
# Mend what a landing left that was killed half-way; all processes of that landing must be dead. May
# be repeated.
# Locks: those go that remove-stale-lock.sh proves to be the dead landing's; else they stay: exit 1.
# Files: where the branch still is at OLD, a checkout that was clean before the landing gets back
#   its files and index entries of OLD..NEW, and only these, after what lay there is kept under
#   refs/farm/rescue/landing/.
# Prints one line: landed<TAB>NEW   moved<TAB>sha   clean<TAB>OLD   restored<TAB>OLD<TAB>rescue ref
# Beside it: find-checkout.sh, remove-stale-lock.sh
# Exit: 0 the landing may run again, 1 git failed or a lock may be another's, 2 usage or no repo, 3
#   no such branch or commits
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"
scratch=

in_place() { quiet_git "$place" "$@"; }

# Lists and sets of paths are sorted lines in which \1 stands for a newline.
to_lines() { tr '\0\n' '\n\1'; }
to_records() { tr '\n\1' '\0\n'; }

# Lists where the index or the files are not OLD's: `extra`, index entries of files that only NEW
# has, and `differing`, paths of OLD; `remains` is both. What is extra shows when a copy of the
# index is asked that knows of all such files.
find_remains() {
  local compare=(diff --no-renames --ignore-submodules --name-only -z)
  in_place diff-tree -r -z --no-renames --diff-filter=A "$old" "$new" | to_lines |
    awk 'NR % 2 { entry = $2 " " $4; next } { print entry "\t" $0 }' >"$scratch/added"
  cp -p "$home/index" "$scratch/index"
  to_records <"$scratch/added" |
    GIT_INDEX_FILE=$scratch/index in_place update-index --add --replace -z --index-info
  GIT_INDEX_FILE=$scratch/index in_place "${compare[@]}" "$old" -- | to_lines |
    awk 'NR == FNR { shown[$0]; next } substr($0, index($0, "\t") + 1) in shown' \
      - "$scratch/added" >"$scratch/extra"
  in_place diff-tree -r -z --no-renames --diff-filter=a --name-only "$old" "$new" | to_lines |
    sort >"$scratch/changed"
  { in_place "${compare[@]}" --cached "$old" -- && in_place "${compare[@]}" "$old" --; } |
    to_lines | sort -u | comm -12 - "$scratch/changed" >"$scratch/differing"
  cut -f 2- "$scratch/extra" | sort - "$scratch/differing" >"$scratch/remains"
}

# Keep what lies at these paths now.
rescue() {
  local tree commit
  export GIT_AUTHOR_NAME=farm GIT_AUTHOR_EMAIL=farm@localhost
  export GIT_COMMITTER_NAME=farm GIT_COMMITTER_EMAIL=farm@localhost
  export GIT_INDEX_FILE=$scratch/rescue
  in_place read-tree "$old"
  to_records <"$scratch/remains" | in_place update-index --add --remove --replace -z --stdin
  tree=$(in_place write-tree)
  commit=$(in_place -c i18n.commitEncoding=UTF-8 commit-tree "$tree" -p "$old" \
    -m "Rescue of a landing cut short on $target")
  unset GIT_INDEX_FILE
  kept=refs/farm/rescue/landing/$(date -u +%Y%m%dT%H%M%SZ)-${commit:0:8}
  in_place update-ref "$kept" "$commit"
}

# First away with what only NEW has: it may be a folder where OLD has a file, or the other way
# round.
put_back() {
  if [ -s "$scratch/extra" ]; then
    to_records <"$scratch/extra" | in_place update-index --add --replace -z --index-info
    cut -f 2- "$scratch/extra" | to_records |
      in_place rm -q -f --pathspec-from-file=- --pathspec-file-nul
  fi
  if [ -s "$scratch/differing" ]; then
    to_records <"$scratch/differing" |
      in_place restore -S -W --source="$old" --pathspec-from-file=- --pathspec-file-nul
  fi
}

recover() {
  local now kind path place='' home='' state='' lock kept='' code=0 found
  if [ -e "$mark" ]; then { IFS= read -r home && IFS= read -r state; } <"$mark" || true; fi
  "$here/remove-stale-lock.sh" "$mark" "$common/$ref.lock" "$new"
  for lock in ${home:+"$home/index.lock" "$home/HEAD.lock" "$home/ORIG_HEAD.lock"}; do
    "$here/remove-stale-lock.sh" "$mark" "$lock"
  done
  now=$(git -C "$repo" rev-parse -q --verify "$ref^{commit}") ||
    die 3 "there is no branch $target" "git branch"
  git -C "$repo" merge-base "$old" "$new" >/dev/null 2>&1 ||
    die 3 "there is no commit $new" "git fsck"
  if git -C "$repo" merge-base --is-ancestor "$new" "$now"; then
    printf 'landed\t%s\n' "$new"
    return
  fi
  if [ "$now" != "$old" ]; then printf 'moved\t%s\n' "$now"; return; fi
  found=$("$here/find-checkout.sh" -C "$repo" "$target") || code=$?
  case $code in
    0 | 3) ;;
    *) die 1 "it cannot be told where $target is checked out" "find-checkout.sh $target" ;;
  esac
  while IFS=$'\t' read -r kind path; do
    [ "$kind" != checkout ] || printf -v place '%b' "$path"
  done <<<"$found"
  if [ "$state" = clean ] && [ -n "$place" ] &&
    [ "$home" = "$(in_place rev-parse --absolute-git-dir)" ]; then
    find_remains
    if [ -s "$scratch/remains" ]; then
      rescue
      put_back
      printf 'restored\t%s\t%s\n' "$old" "$kept"
      return
    fi
  fi
  printf 'clean\t%s\n' "$old"
}

main() {
  local repo=. target='' old='' new='' option ref common mark old_scratch
  while getopts ':b:o:n:C:h' option; do
    case $option in
      b) target=$OPTARG ;;
      o) old=$OPTARG ;;
      n) new=$OPTARG ;;
      C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "recover-landing.sh -h" ;;
    esac
  done
  case $target:$old:$new in
    :* | *::* | *:) die 2 "-b, -o and -n are needed" "recover-landing.sh -h" ;;
  esac
  export LC_ALL=C GIT_OPTIONAL_LOCKS=0 GIT_LITERAL_PATHSPECS=1 ref=refs/heads/$target
  open_repo "$repo"
  mark=$common/farm-landing scratch=$common/farm-recover.$$
  for old_scratch in "$common"/farm-recover.*; do
    kill -0 "${old_scratch##*.}" 2>/dev/null || rm -rf "$old_scratch"
  done
  trap 'rm -rf "$scratch"' EXIT
  mkdir -p "$scratch"
  recover
  rm -f "$mark"
}
main "$@"
