#!/usr/bin/env bash
# Usage: recover-landing.sh -b TARGET -o OLD -n NEW [-C REPO]
# Mend what a landing left that was killed half-way; all processes of that landing must be dead. May be repeated.
# Locks: one on the branch that holds NEW is ours; another goes only when it is newer than the landing's mark, every git
#   that lives now and so could hold it has ended, and nobody has it open. Else it stays: exit 1.
# Files: where the branch still is at OLD, a checkout that was clean before the landing gets back its files and index
#   entries of OLD..NEW, and only these, after what lay there is kept under refs/farm/rescue/landing/.
# Prints one line: landed<TAB>NEW   moved<TAB>sha   clean<TAB>OLD   restored<TAB>OLD<TAB>rescue ref
# Beside it: find-checkout.sh
# Exit: 0 the landing may run again, 1 git failed or a lock may be another's, 2 usage or no repo, 3 no such branch
set -euo pipefail
here=$(dirname "$0") scratch=

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
die() { printf 'farm: %s\n  try: %s\n' "$1" "$2" >&2; exit "${3:-1}"; }
in_place() { git -C "$place" -c core.hooksPath=/dev/null -c submodule.recurse=false -c gc.auto=0 "$@"; }

list_gits() {
  local folder name
  if [ ! -r "/proc/$$/stat" ]; then
    ps -A -o pid= -o stat= -o comm= | awk '$2 !~ /^Z/ && $3 ~ /(^|\/)git/ { print $1 }'
    return
  fi
  for folder in /proc/[0-9]*; do
    { IFS= read -r name <"$folder/stat"; } 2>/dev/null || continue
    case $name in *"(git"*") Z"*) ;; *"(git"*) printf '%s\n' "${folder#/proc/}" ;; esac
  done
}

is_open() {
  if [ -r "/proc/$$/stat" ]; then
    find /proc/[0-9]*/fd -maxdepth 1 -lname "$1" 2>/dev/null | grep -q .
  else
    lsof -- "$1" >/dev/null 2>&1
  fi
}

# A git that starts after this one has looked found the lock there, and so does not hold it.
outlive_holders() {
  local pid tries=$((${FARM_LOCK_SECONDS:-10} * 10))
  for pid in $(list_gits); do
    while [ -e "$1" ] && list_gits | grep -qx "$pid"; do
      [ "$tries" -gt 0 ] || return 1
      tries=$((tries - 1))
      sleep 0.1
    done
  done
  ! is_open "$1"
}

remove_lock() {
  [ -e "$1" ] || return 0
  if [ "$1" = "$common/$ref.lock" ] && [ "$(cat "$1")" = "$new" ]; then
    rm -f "$1"
  elif [ -e "$mark" ] && [ ! "$1" -ot "$mark" ] && outlive_holders "$1"; then
    rm -f "$1"
  else
    die "$1 may be another git's lock" "ls -l $1; remove it when no git is running"
  fi
}

# Lists and sets of paths are sorted lines in which \1 stands for a newline.
to_lines() { tr '\0\n' '\n\1'; }
to_records() { tr '\n\1' '\0\n'; }

# Makes two lists: `added`, index entries of the files that only NEW has, and `remains`, the paths of OLD..NEW at which the
# index or the files are not OLD's. A copy of the index is asked that knows of the added files, so that these show.
find_remains() {
  in_place diff-tree -r -z --no-renames --name-only "$old" "$new" | to_lines | sort >"$scratch/changed"
  in_place diff-tree -r -z --no-renames --diff-filter=A "$old" "$new" | to_lines |
    awk 'NR % 2 { entry = $2 " " $4; next } { print entry "\t" $0 }' >"$scratch/added"
  cp "$home/index" "$scratch/index"
  to_records <"$scratch/added" | GIT_INDEX_FILE=$scratch/index in_place update-index --add --replace -z --index-info
  {
    in_place diff --cached --no-renames --ignore-submodules --name-only -z "$old" --
    GIT_INDEX_FILE=$scratch/index in_place diff --no-renames --ignore-submodules --name-only -z "$old" --
  } | to_lines | sort -u | comm -12 - "$scratch/changed" >"$scratch/remains"
}

# Keep what lies at these paths now.
rescue() {
  local tree commit
  export GIT_AUTHOR_NAME=farm GIT_AUTHOR_EMAIL=farm@localhost GIT_COMMITTER_NAME=farm GIT_COMMITTER_EMAIL=farm@localhost
  export GIT_INDEX_FILE=$scratch/rescue
  in_place read-tree "$old"
  to_records <"$scratch/remains" | in_place update-index --add --remove --replace -z --stdin
  tree=$(in_place write-tree)
  commit=$(in_place -c i18n.commitEncoding=UTF-8 commit-tree "$tree" -p "$old" -m "Rescue of a landing cut short on $target")
  unset GIT_INDEX_FILE
  kept=refs/farm/rescue/landing/$(date -u +%Y%m%dT%H%M%SZ)-${commit:0:8}
  in_place update-ref "$kept" "$commit"
}

put_back() {
  to_records <"$scratch/added" | in_place update-index --add --replace -z --index-info
  to_records <"$scratch/remains" |
    in_place --literal-pathspecs restore --source="$old" --staged --worktree --pathspec-from-file=- --pathspec-file-nul
}

recover() {
  local now kind path place='' home='' state='' lock kept=
  if [ -e "$mark" ]; then { IFS= read -r home && IFS= read -r state; } <"$mark" || true; fi
  for lock in ${home:+"$home/index.lock" "$home/HEAD.lock" "$home/ORIG_HEAD.lock"} "$common/$ref.lock"; do remove_lock "$lock"; done
  now=$(git -C "$repo" rev-parse -q --verify "$ref^{commit}") || die "there is no branch $target" "git branch" 3
  if git -C "$repo" merge-base --is-ancestor "$new" "$now"; then printf 'landed\t%s\n' "$new"; return; fi
  if [ "$now" != "$old" ]; then printf 'moved\t%s\n' "$now"; return; fi
  while IFS=$'\t' read -r kind path; do
    [ "$kind" != checkout ] || printf -v place '%b' "$path"
  done < <("$here/find-checkout.sh" -C "$repo" "$target")
  if [ "$state" = clean ] && [ -n "$place" ] && [ "$home" = "$(in_place rev-parse --absolute-git-dir)" ]; then
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
  local repo=. target='' old='' new='' option ref common mark
  while getopts ':b:o:n:C:h' option; do
    case $option in
      b) target=$OPTARG ;;
      o) old=$OPTARG ;;
      n) new=$OPTARG ;;
      C) repo=$OPTARG ;;
      h) usage; exit 0 ;;
      *) die "-$OPTARG is unknown or lacks its value" "recover-landing.sh -h" 2 ;;
    esac
  done
  case $target:$old:$new in :* | *::* | *:) die "-b, -o and -n are needed" "recover-landing.sh -h" 2 ;; esac
  unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_COMMON_DIR GIT_OBJECT_DIRECTORY GIT_NAMESPACE
  export LC_ALL=C ref=refs/heads/$target
  common=$(git -C "$repo" rev-parse --path-format=absolute --git-common-dir 2>/dev/null) || die "$repo is no git repo" "git init" 2
  mark=$common/farm-landing scratch=$common/farm-recover.$$
  trap 'rm -rf "$scratch"' EXIT
  mkdir -p "$scratch"
  recover
  rm -f "$mark"
}
main "$@"
