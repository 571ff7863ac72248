#!/usr/bin/env bash
# Usage: find-broken.sh [-C REPO] -b TARGET <LINES      lines: id<TAB>commit
# Prints id<TAB>what git said (\\ \t \n \r escaped) for each commit of which git cannot read every object that TARGET lacks:
# one is gone, empty or garbled. It reads them all, so ask when something has failed, not before.
# Exit: 0 ok, 1 git was ended, 2 usage, 3 no such branch, or it is itself not readable
set -euo pipefail
export GIT_OPTIONAL_LOCKS=0 LC_ALL=C

die() { printf 'farm: %s\n  try: %s\n' "$2" "$3" >&2; exit "$1"; }

# Prints what git complains of: rev-list of what is gone, cat-file of what it cannot unpack. A complaint is no failure to it.
read_all() {
  git -C "$repo" rev-list --objects "$1" --not "refs/heads/$target" | cut -d ' ' -f 1 | git -C "$repo" cat-file --batch
}

main() {
  local repo=. target='' option id commit said code slash="\\\\" tab='\t' line='\n' return='\r'
  while getopts C:b:h option; do
    case $option in
      C) repo=$OPTARG ;; b) target=$OPTARG ;;
      h) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
      *) exit 2 ;;
    esac
  done
  git -C "$repo" ls-tree -r --name-only "refs/heads/$target" >/dev/null 2>&1 ||
    die 3 "the branch $target cannot be read" "git -C $repo fsck"
  while IFS=$'\t' read -r -u 3 id commit; do
    code=0
    said=$(read_all "$commit" 2>&1 >/dev/null) || code=$?
    case $code:$said in 0:) continue ;; 0:* | 128:*) ;; *) die 1 "git ended with $code: ${said%%$'\n'*}" "git -C $repo fsck" ;; esac
    said=${said//\\/"$slash"} said=${said//$'\t'/"$tab"} said=${said//$'\n'/"$line"}
    printf '%s\t%s\n' "$id" "${said//$'\r'/"$return"}"
  done 3<&0
}

main "$@"
