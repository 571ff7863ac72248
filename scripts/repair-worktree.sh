#!/usr/bin/env bash
# Usage: repair-worktree.sh [-C REPO] [-a AGENT] PATH | -g STEM
# Makes the worktree at PATH usable again, after its folder, its .git file or git's entry for it was
# deleted, moved or half written. Nothing in it is lost: files that git does not have are rescued
# first (rescue.sh beside this script), the index and HEAD are kept, and files of a deleted folder
# come back from its index. Says on stderr what it did. Where only an empty shell was left, that is
# taken away, and PATH is free. Run by mk-worktrees.sh under its lock. -g: that is done for each
# worktree whose path begins with STEM and whose folder is gone.
# Exit: 0 mended or free, 1 git failed, 2 usage, 4 PATH is something else, and was left alone
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done

say() { printf '%s\n' "farm: $1" ${2:+"  try: $2"} >&2; } # WHAT [HINT]
fail() { say "$2" "${3-}"; exit "$1"; } # CODE WHAT [HINT]
run_git() { ${box[@]+"${box[@]}"} git -c core.hooksPath=/dev/null "$@" >&2; }
# Sets REPLY: the path in FILE, without its `gitdir: `, made absolute from BASE.
read_path() { # FILE BASE
  REPLY=''
  IFS= read -r -d '' REPLY 2>/dev/null <"$1" || :
  REPLY=${REPLY%$'\n'} REPLY=${REPLY#gitdir: }
  case $REPLY in '' | /*) ;; *) REPLY=$2/$REPLY ;; esac
}

find_entry() { # git's entry for this path -> sets entry
  local candidate
  for candidate in "$common"/worktrees/*; do
    read_path "$candidate/gitdir" "$candidate"
    if [ "$REPLY" = "$path/.git" ] ||
      { [ -e "$path/.git" ] && [ "$REPLY" -ef "$path/.git" ]; }; then
      entry=$candidate
      return
    fi
  done
  return 1
}

# The folder or the repo was moved: the entry that the folder means names a place that is gone.
find_moved_entry() { # ENTRY
  local linked=$1
  entry=$common/worktrees/${linked##*/}
  if ! [ -e "$entry/gitdir" ]; then return 1; fi
  read_path "$entry/gitdir" "$entry"
  if [ -e "$REPLY" ]; then fail 4 "$path is a copy of the worktree ${REPLY%/.git}"; fi
  say "$path was moved: git knows it again"
}

# Git has no entry for these files any more: they get a new one, on the agent's branch.
adopt_files() {
  local aside=$path.adopted.$$ branch=farm/$agent/work how=(--detach)
  if git -C "$common" show-ref -q --verify "refs/heads/$branch"; then how=(); else branch=HEAD; fi
  mv -- "$path" "$aside"
  if run_git -C "$common" worktree add -q --lock --no-checkout ${how[@]+"${how[@]}"} -- "$path" \
    "$branch"; then
    mv -f -- "$path/.git" "$aside/.git" && rmdir -- "$path"
  fi
  mv -- "$aside" "$path"
  find_entry || fail 1 "git gave $path no new entry"
  say "git had lost its entry for $path: it has a new one"
}

# An entry whose HEAD names no commit gets the last one that its log knows, else the agent's branch.
mend_head() {
  local last=''
  if git -C "$path" rev-parse -q --verify 'HEAD^{commit}' >/dev/null 2>&1; then return; fi
  if ! [ -s "$entry/commondir" ]; then printf '../..\n' >"$entry/commondir"; fi
  if git -C "$path" symbolic-ref -q HEAD >/dev/null 2>&1; then return; fi
  if [ -s "$entry/logs/HEAD" ]; then last=$(tail -n 1 "$entry/logs/HEAD" | cut -d ' ' -f 2); fi
  [[ $last =~ ^[0-9a-f]+$ ]] && git -C "$common" cat-file -e "$last^{commit}" 2>/dev/null || last=''
  if [ -z "$last" ] && git -C "$common" show-ref -q --verify "refs/heads/farm/$agent/work"; then
    last="ref: refs/heads/farm/$agent/work"
  fi
  if [ -z "$last" ]; then last=$(git -C "$common" rev-parse HEAD); fi
  printf '%s\n' "$last" >"$entry/HEAD"
  say "$path had no HEAD: it is at ${last#ref: refs/heads/} again"
}

# Of a worktree that was never finished: a plain checkout that was cut short leaves nothing to keep.
rescue_leftovers() {
  local saved
  saved=$(${box[@]+"${box[@]}"} git -C "$path" status --porcelain -unormal | grep -v '^ D ') ||
    return 0
  saved=$(${box[@]+"${box[@]}"} "$(dirname -- "$0")/rescue.sh" save -a "$agent" "$path") ||
    fail 4 "$path has unsaved work, and it could not be kept by rescue.sh beside this script"
  say "kept what $path held: ${saved%%$'\t'*}" 'rescue.sh list'
}

# Each worktree of that stem whose folder is gone is mended by a call of its own.
mend_gone() { # STEM
  local file
  for file in "$common"/worktrees/*/gitdir; do
    read_path "$file" "${file%/*}"
    [[ $REPLY != "$1"*-worktree/.git ]] || [ -e "$REPLY" ] ||
      "$0" -C "$repo" "${REPLY%/.git}" || :
  done
}

main() {
  local repo=. agent='' path common entry='' option gone='' stem='' box=() sandbox=${0%/*}/sandbox
  while getopts C:a:g:h option; do
    case $option in
      C) repo=$OPTARG ;; a) agent=$OPTARG ;; g) stem=$OPTARG ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  if [ $# -ne 1 ] && [ -z "$stem" ]; then fail 2 'which worktree?' 'repair-worktree.sh PATH'; fi
  common=$(git -C "$repo" rev-parse --git-common-dir) || fail 2 "$repo is not a git repository"
  common=$(cd -- "$repo" && cd -P -- "$common" && pwd -P)
  if [ -n "$stem" ]; then mend_gone "$stem"; return; fi
  path=$1
  if [ -z "$agent" ]; then agent=${path##*/} agent=${agent%-worktree}; fi
  if [ -L "$path" ] || [ -d "$path/.git" ] || { [ -e "$path" ] && ! [ -d "$path" ]; }; then
    fail 4 "$path is no worktree"
  fi
  if ! [ -e "$path/.git" ] && [ -z "$(ls -A "$path" 2>/dev/null)" ]; then gone=yes; fi
  if ! find_entry; then
    if ! [ -s "$path/.git" ]; then
      fail 4 "$path is a folder of its own, not a worktree of this repo"
    fi
    read_path "$path/.git" "$path"
    if [ -e "$REPLY" ] && ! [ "${REPLY%/*}" -ef "$common/worktrees" ]; then
      fail 4 "$path belongs to another repo: $REPLY"
    fi
    find_moved_entry "$REPLY" || adopt_files
  fi
  mkdir -p -- "$path"
  find "$entry" ! -type d ! -type f -delete # links, through which we would write elsewhere
  if ! [ -e "$entry/index" ] && ! [ -e "$entry/farm-ready" ] &&
    [ -z "$(find "$path" -mindepth 1 -maxdepth 1 ! -name .git)" ]; then
    rm -rf "$entry" "$path"
    return
  fi
  printf 'gitdir: %s\n' "$entry" >"$path/.git"
  printf '%s\n' "$path/.git" >"$entry/gitdir"
  mend_head
  [ "${FARM_ISOLATE:-none}" = none ] || box=(bash "$sandbox/tame-filters.sh" tree "$repo" "$path")
  # These are ours: nobody was let in yet.
  if ! [ -e "$entry/farm-ready" ]; then rm -f "$entry/index.lock" "$entry/HEAD.lock"; fi
  if ! [ -s "$entry/index" ]; then run_git -C "$path" read-tree HEAD; fi
  if ! [ -e "$entry/farm-ready" ]; then rescue_leftovers; return; fi
  if [ -z "$gone" ]; then say "$path was cut off from git, and is whole again"; return; fi
  run_git -C "$path" checkout-index -a -q -u ||
    say "$path: not every file could be put back" "git -C $path status"
  say "the folder $path was gone: its files were put back from its index"
}

main "$@"
