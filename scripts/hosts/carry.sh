#!/usr/bin/env bash
# Usage: carry.sh clone -u URL -b TARGET [-i IDENTITY] FOLDER
#                                                   FOLDER is a clone of the hub's repo afterwards,
#                                                   on no branch; IDENTITY, NAME<TAB>EMAIL, is for
#                                                   a host where nobody has told git who commits
#        carry.sh fetch -C REPO -b TARGET <LINES    TARGET as the hub has it, and for each line
#                                                   "FROM TO" its ref FROM as TO
#        carry.sh push -C REPO -t HOST <LINES       for each line "FROM FENCE KNOWN" the commit FROM
#                                                   to refs/farm/in/HOST/FENCE; FROMs that are not
#                                                   there, or are KNOWN, are passed over
# How code goes between a host's clone and the hub, its remote `hub`. fetch drops what the target
# has: branches of tasks that landed, and their pins. The hub takes no content of Git LFS: that goes
# to a server that both reach, before the commit that names it, and without one there is no clone.
# Prints: fetch: each TO that is there; push: FENCE<TAB>sha, or FENCE<TAB>-<TAB>why not
# Exit: 0 ok, 1 git failed, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"
export GIT_TERMINAL_PROMPT=0 LC_ALL=C

has_lfs() { # FOLDER COMMIT
  git -C "$1" grep -q -e 'filter=lfs' "$2" -- ':(glob)**/.gitattributes'
}

settle_lfs() { # FOLDER
  has_lfs "$1" "refs/heads/$target" || return 0
  git -C "$1" lfs install --local >/dev/null 2>&1 ||
    die 6 "the repo has files in Git LFS, and git-lfs is missing here" \
      "apt install git-lfs, or brew install git-lfs"
  git -C "$1" config lfs.url >/dev/null || git -C "$1" config remote.hub.lfsurl >/dev/null ||
    git -C "$1" config --blob "refs/heads/$target:.lfsconfig" lfs.url >/dev/null ||
    die 4 "the repo has files in Git LFS, and no server for them that hosts and the hub reach" \
      "git config -f .lfsconfig lfs.url URL, committed; or git config --global lfs.url URL here"
}

push_lfs() { # COMMIT
  local said
  has_lfs "$repo" "$1" || return 0
  said=$(git -C "$repo" lfs push hub "$1" 2>&1 </dev/null) ||
    die 1 "LFS content of ${1:0:10} could not be pushed: ${said##*$'\n'}" \
      "git -C $repo lfs push hub $1"
}

make_clone() { # FOLDER
  local said
  if [ ! -e "$1/.git/farm/cloned" ]; then
    rm -rf "$1.new"
    said=$(git clone --quiet --no-checkout --origin hub --config gc.auto=0 "$url" "$1.new" 2>&1) ||
      case $said in
        *'promisor remote'*)
          die 4 "the hub's repo is a partial clone, and lacks objects that its hosts need" \
            "there: git config --unset remote.origin.partialCloneFilter; git fetch --refetch" ;;
        *) printf '%s\n' "$said" >&2; exit 1 ;;
      esac
    quiet_git "$1.new" fetch --quiet hub "+refs/heads/$target:refs/heads/$target" \
      --update-head-ok
    settle_lfs "$1.new"
    quiet_git "$1.new" checkout --quiet --detach "refs/heads/$target"
    mkdir -p "$1.new/.git/farm" && : >"$1.new/.git/farm/cloned"
    if [ -e "$1" ]; then die 1 "$1 is there, and no clone of the farm's" "--folder ANOTHER"; fi
    mv "$1.new" "$1"
  fi
  git -C "$1" remote set-url hub "$url"
  settle_lfs "$1"
  if [ -n "${identity//$'\t'/}" ] && ! git -C "$1" config user.email >/dev/null; then
    git -C "$1" config user.name "${identity%%$'\t'*}"
    git -C "$1" config user.email "${identity#*$'\t'}"
  fi
}

# Git brings nothing to a branch that is checked out, and an agent may have done that in its
# worktree: it goes on on no branch, at the same commit.
free_target() {
  local kind path
  bash "$here/../merge/find-checkout.sh" -C "$repo" "$target" |
    while IFS=$'\t' read -r kind path; do
      printf -v path '%b' "$path"
      [ "$kind" != checkout ] || quiet_git "$path" update-ref --no-deref HEAD HEAD
    done || :
}

fetch_refs() {
  local from to said
  free_target
  quiet_git "$repo" fetch --quiet --no-tags hub "+refs/heads/$target:refs/heads/$target" </dev/null
  bash "$here/../merge/tidy-refs.sh" list -C "$repo" -b "$target" |
    sed -n 's/^\([^	]*\)	\([^	]*\)	in$/\1 \2/p' |
    bash "$here/../merge/tidy-refs.sh" drop -C "$repo"
  bash "$here/../merge/pins.sh" drop -C "$repo" -b "$target" >/dev/null || : # at the next one
  while read -r from to; do
    case $from in refs/*) ;; *) from=refs/heads/$from ;; esac
    if said=$(quiet_git "$repo" fetch --quiet --no-tags hub "+$from:$to" 2>&1 </dev/null); then
      printf '%s\n' "$to"
    else # a host that was lost before it had pushed has left nothing to begin from
      case $said in *'find remote ref'*) ;; *) printf '%s\n' "$said" >&2 && return 1 ;; esac
    fi
  done
}

# Pushes SPECs; fails where the hub's fsck takes an object of them for broken, and sets why.
send() { # SPEC...
  local said
  said=$(quiet_git "$repo" push --quiet hub "$@" 2>&1 </dev/null) && return
  why=$(grep -m 1 '^remote: error: ' <<<"$said") || why=$said
  case $said in *'fsck error'*) return 1 ;; esac
  printf '%s\n' "$said" >&2
  exit 1
}

# All at once; where one of them is broken, each by itself: the others are not to wait for that.
push_refs() {
  local from fence known sha why i escaped specs=() told=()
  while read -r from fence known; do
    sha=$(git -C "$repo" rev-parse -q --verify "$from^{commit}") || continue
    if [ "$sha" = "$known" ]; then continue; fi
    push_lfs "$sha"
    specs+=("+$sha:refs/farm/in/$host/$fence")
    told+=("$fence"$'\t'"$sha")
  done
  [ "${#specs[@]}" -gt 0 ] || return 0
  if send "${specs[@]}"; then printf '%s\n' "${told[@]}" && return; fi
  for ((i = 0; i < ${#specs[@]}; i++)); do
    if send "${specs[i]}"; then printf '%s\n' "${told[i]}" && continue; fi
    escape "${why#remote: error: }"
    printf '%s\t-\t%s\n' "${told[i]%$'\t'*}" "$escaped"
  done
}

main() {
  local verb=${1-} repo=. url='' target='' host='' identity='' option
  if [ "$verb" = -h ]; then usage; exit 0; fi
  shift || true
  while getopts ':C:u:b:t:i:h' option; do
    case $option in
      C) repo=$OPTARG ;; u) url=$OPTARG ;; b) target=$OPTARG ;; t) host=$OPTARG ;;
      i) identity=$OPTARG ;; h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "carry.sh -h" ;;
    esac
  done
  shift $((OPTIND - 1))
  case $verb:$# in
    clone:1) make_clone "$1" ;;
    fetch:0) fetch_refs ;;
    push:0) push_refs ;;
    *) die 2 "clone, fetch or push?" "carry.sh -h" ;;
  esac
}

main "$@"
